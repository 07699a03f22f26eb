"""The loss of self-distillation (DINO): every view predicts what the averaged network says about the others.

Axes: V views, G whole (global) views, B batch, P prototypes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SINKHORN_ROUNDS = 3


def targets(cosines: Float[Array, "G B P"], temperature: float, rounds: int = SINKHORN_ROUNDS) -> Float[Array, "G B P"]:
    """The averaged network's distributions, sharpened, and centred by Sinkhorn and Knopp's algorithm.

    Over the batch, all prototypes get about the same share (SwAV, Caron et al. 2020; DINOv2). No gradient flows.
    """
    logits = jax.lax.stop_gradient(cosines).astype(jnp.float32) / temperature
    for _ in range(rounds):
        logits = logits - jax.scipy.special.logsumexp(logits, axis=(0, 1), keepdims=True)
        logits = jax.nn.log_softmax(logits, axis=-1)
    return jnp.exp(logits)


def distillation(
    student: Float[Array, "V B P"], targets: Float[Array, "G B P"], temperature: float
) -> Float[Array, ""]:
    """Mean cross-entropy of each target with the student's distribution for every other view of the same picture.

    Args:
      student: cosines; the first G views are those of the targets.
      targets: distributions.
      temperature: of the student.
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    pairs = -jnp.einsum("gbp,vbp->gv", targets, log_student) / targets.shape[1]
    others = 1.0 - jnp.eye(*pairs.shape)
    return jnp.sum(pairs * others) / jnp.sum(others)


class Spread(NamedTuple):
    """What shows a collapse, in nats: if all images look the same to a network, both entropies are equal."""

    entropy: Float[Array, ""]  # of the distribution of an image; mean
    entropy_of_mean: Float[Array, ""]  # of the mean distribution


def spread(cosines: Float[Array, "G B P"], temperature: float) -> Spread:
    """Of the distributions before they are centred: after that, no collapse would show."""
    p = jax.nn.softmax(cosines.astype(jnp.float32) / temperature, axis=-1)
    return Spread(jnp.mean(_entropy(p)), jnp.squeeze(_entropy(jnp.mean(p, axis=(0, 1), keepdims=True))))


def _entropy(p: Float[Array, "*n P"]) -> Float[Array, "*n"]:
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
