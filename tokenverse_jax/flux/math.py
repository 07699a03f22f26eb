"""The fixed functions of FLUX's transformer: sinusoids, rotary positions, normalisation; all in float32.

Axes: B batch, S tokens, H heads, D width.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

LAYER_NORM_EPSILON = 1e-6
ROPE_THETA = 10_000
TIME_FACTOR = 1000.0  # times and guidance strengths are scaled before the sinusoids
TIME_PERIOD = 10_000  # of the slowest sinusoid, divided by 2 pi
TIME_CHANNELS = 256


def timestep_embedding(t: Float[Array, " B"]) -> Float[Array, "B channels"]:
    """Cosines, then sines, of 1000 t at 128 frequencies from 1 down to almost 1/10000."""
    half = TIME_CHANNELS // 2
    # As in FLUX, exponents are rounded to float32, which changes angles of 1000 rad by up to 5e-4.
    exponents = np.float32(-np.log(TIME_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = TIME_FACTOR * t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope(ids: Float[Array, "S axes"], axes_dims: tuple[int, ...]) -> Float[Array, "2 S pairs"]:
    """Cosines and sines of the angles that rotate each pair of a head's channels.

    Args:
      ids: position of every token on each axis.
      axes_dims: how many channels of a head each axis rotates; even numbers.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = (float(ROPE_THETA) ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)
        angles.append(ids.astype(jnp.float32)[:, axis, None] * frequencies[None])
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def layer_norm(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Every token with mean 0 and variance 1; nothing learned; float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
