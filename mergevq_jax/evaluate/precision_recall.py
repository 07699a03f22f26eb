"""Improved precision and recall of samples (Kynkäänniemi et al., arXiv 1904.06991).

Distances are computed in float32 on the default device, for a block of images and all others at a time: 50,000 images
of 2048 features need about 2 GB.

Axes: N, M images, F features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from mergevq_jax.evaluate.frechet import as_features

BLOCK = 1024  # images


class PrecisionRecall(NamedTuple):
    """Shares of images in [0, 1]."""

    precision: float  # samples on the manifold of real images
    recall: float  # real images on the manifold of samples


def precision_recall(
    samples: Num[np.ndarray, "N F"], real: Num[np.ndarray, "M F"], *, k: int = 3, block: int = BLOCK
) -> PrecisionRecall:
    """How many samples look real, and how much of the real variety they cover.

    A set's manifold is the union of balls around its members, each as large as the distance to the k-th nearest other
    member. Both shares depend on the numbers of images: compare equal numbers only (10,000 and more are usual).

    Raises:
      ValueError: not more than k images in a set, shapes that differ, or features that are not finite.
    """
    samples, real = (as_features(features, np.shape(real)[-1]) for features in (samples, real))
    if not 1 <= k < min(len(samples), len(real)):
        raise ValueError(f"k={k} neighbours of {len(samples)} and {len(real)} images: fewer than the images are needed")
    center = real.mean(axis=0)  # distances stay the same and lose fewer digits
    samples, real = (jnp.asarray(features - center, jnp.float32) for features in (samples, real))
    return PrecisionRecall(_covered(samples, real, k, block), _covered(real, samples, k, block))


def _covered(features: Float[Array, "N F"], others: Float[Array, "M F"], k: int, block: int) -> float:
    """Share of images on the manifold of the others."""
    radii = _blockwise(functools.partial(_radii, k=k), others, others, block=block)
    return float(_blockwise(_within, features, others, radii, block=block).mean())


def _blockwise(function: Callable[..., Array], features: Float[Array, "N F"], *rest: Any, block: int) -> np.ndarray:
    """`function(rows, *rest)` of all rows, some at a time; the last are padded, so that it is compiled once."""
    count = len(features)
    block = min(block, count)
    parts = []
    for start in range(0, count, block):
        rows = features[start : start + block]
        padded = jnp.pad(rows, ((0, block - len(rows)), (0, 0)))
        parts.append(np.asarray(function(padded, *rest))[: len(rows)])
    return np.concatenate(parts)


@jax.jit(static_argnames="k")
def _radii(rows: Float[Array, "B F"], features: Float[Array, "N F"], k: int) -> Float[Array, "B"]:
    """Squared distance to the k-th nearest neighbour; the nearest of all is the image itself."""
    return -jax.lax.top_k(-_distances(rows, features), k + 1)[0][:, -1]


@jax.jit
def _within(rows: Float[Array, "B F"], features: Float[Array, "N F"], radii: Float[Array, "N"]) -> Bool[Array, "B"]:
    """Whether each row lies in one of the balls around `features`."""
    return (_distances(rows, features) <= radii[None]).any(axis=1)


def _distances(rows: Float[Array, "B F"], features: Float[Array, "N F"]) -> Float[Array, "B N"]:
    """Squared distances, at least 0."""
    products = jnp.matmul(rows, features.T, precision="highest")
    squares = jnp.square(rows).sum(axis=1)[:, None] + jnp.square(features).sum(axis=1)[None]
    return jnp.maximum(squares - 2 * products, 0)
