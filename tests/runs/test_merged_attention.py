"""Attention over merged keys is attention under MergeAR's mask, with fewer FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq_jax.generator.mask import first_of_group, merge_mask
from mergevq_jax.generator.merged_attention import MergedKeys, merged_attention, merged_keys
from runtime_jax.cost import count_flops
from runtime_jax.nn.attention import attention

LENGTH, KEEP = 20, 9


def tokens(seed: int, positions: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, positions, 3, 4)), jnp.float32) for _ in range(4)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    groups=st.integers(1, KEEP),
    window=st.sampled_from([0, 1, 2, 7, LENGTH + 3]),
    prefix=st.integers(1, 2),
    last=st.booleans(),
)
def test_it_is_attention_under_the_mask(seed, groups, window, prefix, last):
    """Values and gradients, for images with K groups and with fewer, with and without the last position."""
    codes = np.random.default_rng(seed).integers(groups, size=(2, LENGTH))
    first = first_of_group(jnp.asarray(codes, jnp.int32))
    positions = prefix + LENGTH - 1 + last
    *inputs, cotangent = tokens(seed, positions)
    mask = merge_mask(first, window=window, prefix=prefix)[:, :positions, :positions]
    keys = merged_keys(first, KEEP, window=window, prefix=prefix)

    expected, pull = jax.vjp(lambda *x: attention(*x, mask=mask), *inputs)
    found, pull_found = jax.vjp(lambda *x: merged_attention(*x, keys), *inputs)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for mine, other in zip(pull_found(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(mine, other, atol=5e-6)


def test_positions_of_the_papers_example():
    """Groups 1 1 3 3 5 5 5 8 8 of nine tokens, after two prefix tokens; two keys more than there are groups."""
    first = jnp.asarray([[0, 0, 2, 2, 4, 4, 4, 7, 7]], jnp.int32)
    keys = merged_keys(first, 6, window=2, prefix=2)
    np.testing.assert_array_equal(keys.positions, [[0, 1, 2, 4, 6, 9, 11, 11]])


@pytest.mark.parametrize(("keep", "share"), [(16, 0.35), (32, 0.6)])
def test_it_costs_the_share_of_the_keys(keep, share):
    """FLOPs at L = 64 against those of the mask, whose rate K / L is the aim."""
    positions = 66
    *inputs, _ = tokens(0, positions)
    keys = MergedKeys(jnp.zeros((2, 2 + keep), jnp.int32), window=2)
    masked = jax.make_jaxpr(lambda *x: attention(*x, mask=jnp.ones((1, positions, positions), bool)))(*inputs)
    merged = jax.make_jaxpr(lambda *x: merged_attention(*x, keys))(*inputs)
    assert count_flops(merged.jaxpr) < share * count_flops(masked.jaxpr)
