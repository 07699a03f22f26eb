"""Which tokens a position sees while MergeAR is trained (paper section 4.2, figure 4).

Axes: B batch, L raster tokens, P prefix tokens, N = P + L positions.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def first_of_group(groups: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Raster position of the first token in each token's group.

    Args:
      groups: a number that the tokens of one group share: the tokenizer's source map, or the code indices themselves,
        which is what the sampler can tell groups by.
    """
    return jnp.argmax(groups[:, :, None] == groups[:, None, :], axis=-1).astype(jnp.int32)


def merge_mask(first: Int[Array, "B L"], *, window: int | Int[Array, ""], prefix: int) -> Bool[Array, "B N N"]:
    """True where a position (row) sees another: the prefix, itself, the `window` tokens before it, and of the older
    ones the first of each group; never later ones.

    Args:
      first: of `first_of_group`.
      window: recent tokens that are always seen; L or more is plain autoregression.
      prefix: tokens in front of the raster.
    """
    position = jnp.arange(-prefix, first.shape[1])
    distance = position[:, None] - position[None, :]
    kept = jnp.pad(first == position[None, prefix:], ((0, 0), (prefix, 0)), constant_values=True)
    return (distance >= 0)[None] & ((distance <= window)[None] | kept[:, None])


def causal_mask(length: int) -> Bool[Array, "1 n n"]:
    """True where a position sees another, in plain autoregression."""
    return jnp.tri(length, dtype=bool)[None]
