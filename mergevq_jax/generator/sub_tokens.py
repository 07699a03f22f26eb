"""Code indices as sub-tokens: an index is a number whose digits are the sub-tokens, the first the least significant.

With vocabularies that are powers of two, a sub-token is a run of an index's bits (paper section 4.1).
"""

import math
from collections.abc import Sequence

from jax import lax
from jaxtyping import Array, Int


def split_indices(indices: Int[Array, "*batch"], vocab_sizes: Sequence[int]) -> tuple[Int[Array, "*batch"], ...]:
    """The sub-tokens of each index, 0 to prod(vocab_sizes) - 1; one array for each vocabulary."""
    return tuple(
        lax.rem(lax.div(indices, _like(stride, indices)), _like(size, indices))
        for stride, size in zip(_strides(vocab_sizes), vocab_sizes, strict=True)
    )


def join_indices(sub_tokens: Sequence[Int[Array, "*batch"]], vocab_sizes: Sequence[int]) -> Int[Array, "*batch"]:
    """The inverse of `split_indices`."""
    return sum(part * stride for part, stride in zip(sub_tokens, _strides(vocab_sizes), strict=True))


def _strides(vocab_sizes: Sequence[int]) -> list[int]:
    return [math.prod(vocab_sizes[:part]) for part in range(len(vocab_sizes))]


def _like(number: int, indices: Array) -> Array:
    return lax.full_like(indices, number)
