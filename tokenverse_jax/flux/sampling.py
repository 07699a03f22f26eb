"""From noise to samples along a velocity field.

Axes: B batch, N image tokens, D channels of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from runtime_jax.finite import all_finite
from runtime_jax.prng import example_keys
from runtime_jax.sharding import Axis, constrain

# Velocity [B, N, D] at tokens [B, N, D] and times [B].
Velocity = Callable[[Float[Array, "B N D"], Float[Array, "B"]], Float[Array, "B N D"]]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a run samples its images: arguments of `Pipeline.generate`."""

    num_steps: int = 28
    guidance: float | None = None
    cfg_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UsualSampling(SamplingConfig):
    """How a model is meant to be sampled, unless told otherwise: `sampling.json` in its folder, which is our own file.

    size: side of its images, pixels.
    """

    size: int = 1024


def initial_noise(
    key: Key[Array, ""], indices: Int[Array, "B"] | Int[np.ndarray, "B"], shape: tuple[int, int]
) -> Float[Array, "B N D"]:
    """Standard normal tokens of `shape` (N, D) for each example.

    They depend on the key and the example's index alone, so images do not change with the batches or devices that
    examples are spread over.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(example_keys(key, indices))
    return constrain(noise, Axis.BATCH, None, None)


class Sampled(NamedTuple):
    """What `euler` ends with."""

    tokens: Float[Array, "B N D"]
    finite: Bool[Array, "steps"]  # whether they were finite after each step


def euler(
    velocity: Velocity, noise: Float[Array, "B N D"], sigmas: Float[Array, "T"] | Float[np.ndarray, "T"]
) -> Sampled:
    """Follows the velocity from `noise` at time sigmas[0] to time sigmas[-1] by Euler steps, in one scan.

    To be called in a jitted function that has the model's parameters among its arguments.

    Args:
      velocity: the model; traced once.
      noise: the start, float32.
      sigmas: decreasing times, see `schedule.sigmas`.
    """

    def step(x, times):
        now, after = times
        x = x + (after - now) * velocity(x, jnp.full(len(x), now)).astype(jnp.float32)
        return constrain(x, Axis.BATCH, None, None), all_finite(x)

    sigmas = jnp.asarray(sigmas, jnp.float32)
    return Sampled(*lax.scan(step, noise, (sigmas[:-1], sigmas[1:])))


def with_cfg(conditional: Velocity, negative: Velocity, scale: float | Float[Array, ""]) -> Velocity:
    """True classifier-free guidance: negative + scale (conditional - negative); scale 1 is no guidance."""

    def velocity(x, times):
        away = negative(x, times).astype(jnp.float32)
        return away + scale * (conditional(x, times).astype(jnp.float32) - away)

    return velocity
