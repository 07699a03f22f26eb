"""Which tokens a position sees while MergeAR trains (paper section 4.2, figure 4).

Axes: B batch, L raster tokens, P prefix tokens, N = P + L positions.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def first_of_group(groups: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Raster position of the first token in each token's group.

    Args:
      groups: a number shared by the tokens of a group: the tokenizer's source map, or the code indices, by which the
        sampler tells groups apart.
    """
    return jnp.argmax(groups[:, :, None] == groups[:, None, :], axis=-1).astype(jnp.int32)


def merge_mask(first: Int[Array, "B L"], *, window: int | Int[Array, ""], prefix: int) -> Bool[Array, "B N N"]:
    """True where a position (row) sees another: the prefix, itself, the `window` tokens before it, and the first token
    of each older group.

    Args:
      first: of `first_of_group`.
      window: number of recent tokens that are always seen; L or more is plain autoregression.
      prefix: number of tokens before the raster.
    """
    position = jnp.arange(-prefix, first.shape[1])
    distance = position[:, None] - position[None, :]
    kept = jnp.pad(first == position[None, prefix:], ((0, 0), (prefix, 0)), constant_values=True)
    return (distance >= 0)[None] & ((distance <= window)[None] | kept[:, None])


def causal_mask(length: int) -> Bool[Array, "1 n n"]:
    """True where a position sees another in plain autoregression."""
    return jnp.tri(length, dtype=bool)[None]
