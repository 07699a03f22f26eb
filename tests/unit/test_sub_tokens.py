"""Indices as sub-tokens: there and back, and powers of two are runs of bits."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mergevq_jax.generator.sub_tokens import join_indices, split_indices
from mergevq_jax.tokenizer.quantizers import lfq


@pytest.mark.parametrize("vocab_sizes", [(64, 4096), (512, 512), (2**18,), (2, 4, 2**15), (8, 5, 5, 5), (3, 7)])
def test_there_and_back(vocab_sizes):
    codes = math.prod(vocab_sizes)
    indices = np.random.default_rng(0).integers(0, codes, (4, 50), dtype=np.int32)
    indices[0, :2] = 0, codes - 1
    parts = split_indices(jnp.asarray(indices), vocab_sizes)
    for part, size in zip(parts, vocab_sizes, strict=True):
        assert part[0, 0] == 0 and part[0, 1] == size - 1 and 0 <= part.min() <= part.max() < size
    np.testing.assert_array_equal(join_indices(parts, vocab_sizes), indices)


def test_the_first_sub_token_varies_fastest():
    first, second = split_indices(jnp.arange(6), (3, 2))
    assert first.tolist() == [0, 1, 2, 0, 1, 2] and second.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_first_channels_of_lfq_are_the_first_sub_token():
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 2**18, 50, dtype=np.int32))
    codes = lfq.from_indices(indices, 18)
    first, second = split_indices(indices, (2**6, 2**12))
    np.testing.assert_array_equal(first, lfq.to_indices(codes[:, :6]))
    np.testing.assert_array_equal(second, lfq.to_indices(codes[:, 6:]))


def test_another_number_of_sub_tokens():
    with pytest.raises(ValueError, match="zip"):
        join_indices([jnp.zeros(3, jnp.int32)], (64, 4096))
