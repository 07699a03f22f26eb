"""From noise to samples along a velocity field.

Axes: B batch, N image tokens, D channels of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """A model's own settings, used unless others are given: `sampling.json` in its folder, a file of ours."""

    size: int = 1024  # side of its images, pixels

    def arguments(self, **given: Any) -> dict[str, Any]:
        """Arguments of `Pipeline.generate`; those in `given` replace the model's own."""
        own = vars(self) | {"height": self.size, "width": self.size}
        del own["size"]
        return own | given


def initial_noise(
    key: Key[Array, ""], examples: Int[Array, "B"] | Int[np.ndarray, "B"], shape: tuple[int, int]
) -> Float[Array, "B N D"]:
    """Standard normal tokens of `shape` (N, D) for each example, a function of the key and the example's number alone.

    So an image is the same however examples are batched or spread over devices.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(example_keys(key, examples))
    return constrain(noise, Axis.BATCH, None, None)


def euler(
    velocity: Velocity, noise: Float[Array, "B N D"], sigmas: Float[Array, "T"] | Float[np.ndarray, "T"]
) -> tuple[Float[Array, "B N D"], Bool[Array, "steps"]]:
    """Follows the velocity from `noise` at time sigmas[0] to time sigmas[-1] by Euler steps, in one scan.

    Call it in a jitted function that has the model's parameters among its arguments.

    Args:
      velocity: the model; traced once.
      noise: the start, float32.
      sigmas: decreasing times, see `schedule.sigmas`.

    Returns:
      The tokens at the end, and whether all of them were finite after each step.
    """

    def step(x, times):
        now, after = times
        x = x + (after - now) * velocity(x, jnp.full(len(x), now)).astype(jnp.float32)
        return constrain(x, Axis.BATCH, None, None), all_finite(x)

    sigmas = jnp.asarray(sigmas, jnp.float32)
    return lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))


def with_cfg(conditional: Velocity, negative: Velocity, scale: float | Float[Array, ""]) -> Velocity:
    """True classifier-free guidance: negative + scale (conditional - negative); scale 1 is no guidance."""

    def velocity(x, times):
        away = negative(x, times).astype(jnp.float32)
        return away + scale * (conditional(x, times).astype(jnp.float32) - away)

    return velocity
