"""Rotary position embedding: turns queries and keys by angles that depend on their tokens' positions.

Axes: B batch, S tokens, H heads.
"""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def apply_rope(x: Float[Array, "B S H head"], pe: Float[Array, "2 *batch S pairs"]) -> Float[Array, "B S H head"]:
    """Turns the neighbouring channels (2 i, 2 i + 1) of every head by the angles of `pe`; float32.

    Args:
      x: queries or keys; `head` is twice `pairs`.
      pe: cosines and sines of the angles of every token; [2, B, S, pairs] if each example has its own.
    """
    cos, sin = (pe if pe.ndim == 4 else pe[:, None])[..., None, :]
    even, odd = rearrange(x.astype(jnp.float32), "b s h (pairs two) -> two b s h pairs", two=2)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rearrange(turned, "b s h pairs two -> b s h (pairs two)")
