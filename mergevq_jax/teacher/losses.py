"""The loss of self-distillation (DINO): every view predicts what the averaged network says about the others.

Axes: V views, G whole (global) views, B batch, P prototypes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Distillation(NamedTuple):
    """The loss, and what shows a collapse, all in nats.

    If every image gets the same target, `entropy_of_mean` equals `entropy`: near 0 if one prototype takes all, near
    log P if none is preferred. While a network learns, the entropy is lower than that of the mean.
    """

    loss: Float[Array, ""]  # mean cross-entropy
    entropy: Float[Array, ""]  # mean of the targets' entropies
    entropy_of_mean: Float[Array, ""]  # entropy of the targets' mean


def targets(
    cosines: Float[Array, "G B P"], centre: Float[Array, "P"], temperature: Float[Array, ""] | float
) -> Float[Array, "G B P"]:
    """The averaged network's distributions, centred and sharpened; no gradient flows through them."""
    centred = jax.lax.stop_gradient(cosines).astype(jnp.float32) - centre[None, None]
    return jax.nn.softmax(centred / temperature, axis=-1)


def distillation(student: Float[Array, "V B P"], targets: Float[Array, "G B P"], temperature: float) -> Distillation:
    """Cross-entropy of each target with the student's distribution for every other view of the same picture.

    Args:
      student: cosines; the first G views are those of the targets.
      targets: distributions.
      temperature: of the student.
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    pairs = -jnp.einsum("gbp,vbp->gv", targets, log_student) / targets.shape[1]
    others = 1.0 - jnp.eye(*pairs.shape)
    mean = jnp.mean(targets, axis=(0, 1))
    return Distillation(
        jnp.sum(pairs * others) / jnp.sum(others), jnp.mean(_entropy(targets)), jnp.squeeze(_entropy(mean[None]))
    )


def _entropy(p: Float[Array, "*n P"]) -> Float[Array, "*n"]:
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
