"""Weighted k nearest neighbours (DINO's protocol, after Wu et al. 2018).

Axes: N training images, M test images, b a block of either, F features, C classes, k neighbours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NEIGHBOURS, TEMPERATURE = 20, 0.07
BLOCK = 4096  # images that are compared at once, on either side


def predict(
    train: Float[np.ndarray, "N F"],
    labels: Int[np.ndarray, "N"],
    test: Float[np.ndarray, "M F"],
    *,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    block: int = BLOCK,
) -> Int[np.ndarray, "M"]:
    """The class that the k training images of the greatest cosine vote for, each with exp(cosine / temperature).

    Features are compared block by block, so that neither all cosines nor all features lie on a device at once.

    Raises:
      ValueError: fewer training images than neighbours.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k-NN: {k} neighbours of {len(train)} training images; 1 to {len(train)} are possible")
    train = _unit(np.asarray(train, np.float32))
    found = []
    for start in range(0, len(test), block):
        queries = jnp.asarray(_unit(np.asarray(test[start : start + block], np.float32)))
        best = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        for first in range(0, len(train), block):
            part = slice(first, first + block)
            best = _nearest(queries, *best, jnp.asarray(train[part]), jnp.asarray(labels[part], jnp.int32), k)
        found.append(np.asarray(_vote(*best, classes, temperature)))
    return np.concatenate(found)


def _unit(features: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    queries: Float[Array, "b F"],
    cosines: Float[Array, "b k"],
    labels: Int[Array, "b k"],
    train: Float[Array, "n F"],
    train_labels: Int[Array, "n"],
    k: int,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k nearest of those found so far and of more training images; of equal ones, the first."""
    more = jnp.einsum("bf,nf->bn", queries, train, precision="highest")
    of_more = jnp.broadcast_to(train_labels[None], more.shape)
    best, rows = jax.lax.top_k(jnp.concatenate([cosines, more], axis=1), k)
    return best, jnp.take_along_axis(jnp.concatenate([labels, of_more], axis=1), rows, axis=1)


@functools.partial(jax.jit, static_argnames=("classes", "temperature"))
def _vote(cosines: Float[Array, "b k"], labels: Int[Array, "b k"], classes: int, temperature: float) -> Int[Array, "b"]:
    weights = jnp.exp((cosines - cosines[:, :1]) / temperature)  # the factor changes no vote, and keeps exp small
    return jnp.einsum("bk,bkc->bc", weights, jax.nn.one_hot(labels, classes)).argmax(axis=1)
