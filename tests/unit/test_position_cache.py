"""What the KV cache keeps, and that decoding through it equals attention over the whole sequence under the mask."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generator_tools import CODES_OF_NINE, CONFIG, FIRST_OF_NINE, NINE, random_codes, random_params, relative_error
from golden_tools import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from mergevq_jax.generator.mask import causal_mask, first_of_group, merge_mask
from mergevq_jax.generator.sampling import decode, position_cache
from mergevq_jax.generator.sampling.position_cache import POLICIES
from mergevq_jax.generator.transformer import Generator, rope_table
from runtime_jax.nn.compute import Compute

L = CONFIG.length

# The cache against a list of tokens.


class Token(NamedTuple):
    position: int
    code: int
    first: bool


def simulate(codes, window, capacity, policy):
    """Positions held, whether the token is a first occurrence, and overflows so far, after each token."""
    held, overflows = [], 0
    for position, code in enumerate(codes):
        held = [token for token in held if token.first or token.position >= position - window]
        outside = [token for token in held if token.position < position - window]
        if len(outside) > capacity:
            held.remove(outside[0] if policy == "evict-oldest" else outside[-1])
            overflows += 1
        first = not any(token.first and token.code == code for token in held)
        held.append(Token(position, int(code), first))
        yield {token.position for token in held}, first, overflows


@functools.partial(jit, static_argnames="policy")
def insert_all(codes, window, capacity, *, policy):
    """Every example's codes one after another into a cache with a slot for each of them."""

    def insert(cache, token):
        position, code = token
        placed = position_cache.insert(cache, code, position, window=window, capacity=capacity, policy=POLICIES[policy])
        return placed.cache, (placed.cache.positions, placed.cache.overflows, placed.slot, placed.first)

    tokens = jnp.arange(codes.shape[1]), codes.T
    return lax.scan(insert, position_cache.empty_cache(*codes.shape), tokens)[1]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), values=st.integers(1, 20), window=st.integers(1, L), capacity=st.integers(1, L))
def test_the_cache_holds_what_a_list_holds(policy, seed, values, window, capacity):
    codes = random_codes(3, seed=seed, values=values)
    steps = jax.device_get(insert_all(codes, window, capacity, policy=policy))
    for example, row in enumerate(codes):
        places = {}
        for step, (held, is_first, overflows) in enumerate(simulate(row, window, capacity, policy)):
            positions, *counted = (array[step, example] for array in steps)
            assert set(positions[positions >= 0].tolist()) == held
            # No token ever moves, and none needs more slots than the KV cache has.
            places[step] = counted[1]
            assert counted == [overflows, places[step], is_first]
            assert all(positions[places[position]] == position for position in held)
            assert places[step] < position_cache.token_slots(L, window=window, capacity=capacity)


@pytest.mark.parametrize(("policy", "kept"), [("evict-oldest", {3, 4, 5}), ("full", {0, 4, 5})])
def test_an_overflow_of_distinct_codes(policy, kept):
    """Window 1, capacity 1: when token 2 has come token 0 is outside, and each later token overflows once."""
    positions, overflows, _, first = jax.device_get(insert_all(jnp.arange(6)[None], 1, 1, policy=policy))
    assert set(positions[-1, 0].tolist()) - {position_cache.EMPTY} == kept
    assert first.all() and overflows[:, 0].tolist() == [0, 0, 0, 1, 2, 3]


def test_an_evicted_code_is_new_again():
    """Also when a duplicate of it is still in the window; the second 7 here, when the third comes."""
    codes = jnp.asarray([[7, 1, 7, 7, 2, 7]])
    *_, first = jax.device_get(insert_all(codes, 1, 1, policy="evict-oldest"))
    assert first[:, 0].tolist() == [True, True, False, True, True, False]


def test_the_nine_token_example_row_by_row():
    held, _, _, first = jax.device_get(insert_all(jnp.asarray(CODES_OF_NINE), 2, 4, policy="full"))
    for row, seen in NINE.items():
        assert set((held[row - 1, 0] + 1).tolist()) - {position_cache.EMPTY + 1} == seen
    assert (np.flatnonzero(first[:, 0]) == np.unique(FIRST_OF_NINE)).all()


def test_visible_slots():
    visible = jit(lambda seen: position_cache.visible(position_cache.empty_cache(2, 3), prefix=2, seen=seen))
    for seen in (1, 2):
        np.testing.assert_array_equal(visible(seen), [[True, seen == 2, False, False, False]] * 2)


# The central invariant.

SPLITS = {
    "6+12": dataclasses.replace(CONFIG, vocab_sizes=(64, 4096)),
    "9+9": dataclasses.replace(CONFIG, vocab_sizes=(512, 512)),
    "1+2+2, plain prefix": dataclasses.replace(CONFIG, vocab_sizes=(2, 4, 4), merge_instruction=False),
}


@functools.partial(jit, static_argnames="config")
def attended(params, indices, labels, merge, groups, window, *, config):
    """Teacher forcing under the mask of these groups."""
    mask = merge_mask(first_of_group(groups), window=window, prefix=config.prefix)
    return Generator(config).apply({"params": params}, indices, labels, merge, mask)


@functools.partial(jit, static_argnames="config")
def decoded(params, indices, labels, merge, window, capacity, *, config):
    """The same codes one by one through the KV cache."""
    compute, prefix, batch = Compute(), config.prefix, len(labels)
    apply = functools.partial(Generator(config).apply, {"params": params})
    layers = decode.unstacked(params["spatial_blocks"])
    x = jnp.concatenate(
        [apply(labels, merge, method=Generator.embed_prefix), apply(indices[:, :-1], method=Generator.embed_codes)],
        axis=1,
    )
    codes = jnp.pad(indices[:, :-1], ((0, 0), (prefix, 0)))

    def step(carry, inputs):
        kv_cache, cache = carry
        time, rope, x, code = inputs
        placed = position_cache.insert(
            cache, code, time - prefix, window=window, capacity=capacity, policy=POLICIES["evict-oldest"]
        )
        cache = jax.tree.map(lambda new, old: jnp.where(time < prefix, old, new), placed.cache, cache)
        slot = jnp.where(time < prefix, time, prefix + placed.slot)
        visible = position_cache.visible(cache, prefix=prefix, seen=time + 1)
        x, kv_cache = decode.step(
            layers, kv_cache, x[:, None], rope[:, None], slot[:, None], visible[:, None], config=config, compute=compute
        )
        return (kv_cache, cache), x[:, 0]

    kv_cache = decode.new_kv_cache(config, compute, layers=config.num_layers, rows=batch, slots=prefix + L)
    steps = x.shape[1]
    rope = jnp.asarray(rope_table(config)[:, :steps]).swapaxes(0, 1)
    inputs = jnp.arange(steps), rope, x.swapaxes(0, 1), codes.T
    (_, cache), hidden = lax.scan(step, (kv_cache, position_cache.empty_cache(batch, L)), inputs)
    return apply(hidden.swapaxes(0, 1)[:, prefix - 1 :], indices, method=Generator.predict), cache.overflows


def random_groups(seed, batch=3, config=CONFIG):
    """Groups [B, L] of any number and shape, and codes that are equal exactly in a group."""
    rng = np.random.default_rng(seed)
    groups = np.stack([rng.integers(0, rng.integers(1, L + 1), L) for _ in range(batch)]).astype(np.int32)
    codes = config.vocab_size
    names = np.stack([rng.choice(codes, L, replace=False) for _ in range(batch)]).astype(np.int32)
    return groups, np.take_along_axis(names, groups, axis=1)


def both(config, indices, groups, window, capacity):
    labels = np.resize(np.asarray([0, 5, 3], np.int32), len(indices))
    merge = np.resize(np.asarray([0, 2, 1], np.int32), len(indices)) if config.merge_instruction else None
    params = random_params(config)
    expected = attended(params, indices, labels, merge, groups, window, config=config)
    got, overflows = decoded(params, indices, labels, merge, window, capacity, config=config)
    return got, expected, overflows


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), batch=st.sampled_from([1, 4]), window=st.integers(1, L), spare=st.integers(0, L))
def test_decoding_through_the_store_equals_masked_attention(split, seed, batch, window, spare):
    groups, indices = random_groups(seed, batch, SPLITS[split])
    capacity = min(L, max(len(set(row)) for row in groups.tolist()) + spare)
    got, expected, overflows = both(SPLITS[split], indices, groups, window, capacity)
    assert relative_error(got, expected) < 1e-5
    assert not np.asarray(overflows).any()


def test_a_store_for_all_tokens_is_plain_autoregression():
    """Distinct codes with capacity L, or any codes with a window of L: nothing is ever left out."""
    distinct, equal = np.tile(np.arange(L, dtype=np.int32), (3, 1)), random_codes(3, values=2)
    for indices, window in ((distinct, 1), (equal, L)):
        got, expected, _ = both(CONFIG, indices, distinct, window, L)
        assert relative_error(got, expected) < 1e-5
    plain = merge_mask(jnp.asarray(distinct[:1]), window=1, prefix=2)
    np.testing.assert_array_equal(plain, causal_mask(L + 2))


def test_too_small_a_store_changes_the_logits_and_says_so():
    groups, indices = random_groups(4)
    got, expected, overflows = both(CONFIG, indices, groups, 1, 1)
    assert relative_error(got, expected) > 1e-2
    assert np.asarray(overflows).min() > 0
