"""RandAR: the sequence and its loss, several codes at a time against teacher forcing, and what is asked of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generator_tools import CONFIG, random_codes, random_params, relative_error
from golden_tools import jit

from mergevq_jax.generator.kinds import positions, randar
from mergevq_jax.generator.kinds.randar import Codes
from mergevq_jax.generator.sampling import random_order as randar_sampling
from mergevq_jax.generator.sampling.plan import SamplingConfig, make_plan
from mergevq_jax.generator.sampling.random_order import (
    RandarSampler,
    Step,
    cosine_counts,
    make_randar_plan,
    randar_sample,
)
from mergevq_jax.generator.transformer import SHARDING_RULES, init_params
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.sharding import param_shardings, shard_batch

RANDAR = dataclasses.replace(CONFIG, position_instruction=True)
L, K = RANDAR.length, 9
LABELS, MERGE = np.asarray([0, 5, 3], np.int32), np.full(3, 1, np.int32)
KEYS = example_keys(stream_key(0, Stream.ORDER), np.arange(3))


NOTHING_COUNTED = positions.new_counts(RANDAR)


@pytest.fixture(scope="module")
def params():
    return random_params(RANDAR)


@pytest.fixture(scope="module")
def codes():
    places = positions.draw_positions(positions.shares(NOTHING_COUNTED, RANDAR)[np.full(3, 1), 0], KEYS, K)
    return Codes(jnp.asarray(random_codes(3)[:, :K]), places)


@jit
def teacher_forced(params, codes, labels, merge):
    return randar.randar_logits(params, codes, labels, merge, config=RANDAR)


def logits(params, codes, labels=LABELS):
    return teacher_forced(params, codes, labels, MERGE)


# The sequence.


def test_a_group_is_where_its_first_member_is():
    source_map = jnp.asarray([[2, 0, 2, 1, 0, 1]])
    indices = jnp.asarray([[7, 5, 7, 9, 5, 9]])
    codes = randar.merged_codes(indices, source_map, 3)
    np.testing.assert_array_equal(codes.positions, [[1, 3, 0]])
    np.testing.assert_array_equal(codes.indices, [[5, 9, 7]])


def test_orders_are_of_each_example(codes):
    shuffle = jit(randar.shuffled)
    mixed, part = shuffle(codes, KEYS), shuffle(Codes(*(x[1:] for x in codes)), KEYS[1:])
    jax.tree.map(lambda whole, part: np.testing.assert_array_equal(whole[1:], part), mixed, part)
    for row in range(3):
        pairs = [sorted(zip(*(np.asarray(x[row]).tolist() for x in each), strict=True)) for each in (codes, mixed)]
        assert pairs[0] == pairs[1]
    order = np.argmax(np.asarray(codes.positions)[:, None] == np.asarray(mixed.positions)[..., None], axis=-1)
    assert len(np.unique(order, axis=0)) == 3


def test_logits_depend_on_the_codes_before_and_the_position_asked_for(params, codes):
    expected, place = logits(params, codes), 4
    free = np.asarray([min(set(range(L)) - set(row)) for row in np.asarray(codes.positions).tolist()])
    for name, changed, first in (
        ("indices", codes.indices.at[:, place].set(codes.indices[:, place] ^ 1), 1),  # a bit of the first sub-token
        ("positions", codes.positions.at[:, place].set(free), 0),
    ):
        got = logits(params, codes._replace(**{name: changed}))
        for part, (a, b) in enumerate(zip(got, expected, strict=True)):
            moved = (np.abs(np.asarray(a) - np.asarray(b)) > 1e-4).any(axis=(0, 2))
            assert np.flatnonzero(moved).tolist() == list(range(place + max(first - part, 0), K))


# The loss.


randar_loss = functools.partial(randar.randar_loss, config=RANDAR, compute=Compute(), keep=K)
loss = jit(lambda params, batch, key=None: randar_loss(params, batch, key))
gradient = jit(jax.grad(lambda params, batch: randar_loss(params, batch, None)[0]))


def tokens(batch):
    rng = np.random.default_rng(0)
    groups = np.stack([rng.permutation(np.r_[:K, rng.integers(0, K, L - K)]) for _ in range(batch)]).astype(np.int32)
    indices = np.take_along_axis(random_codes(batch), groups, axis=1)
    index = np.arange(batch)
    return {"indices": indices, "source_map": groups, "label": index.astype(np.int32) % 5, "example": index}


def test_a_new_model_loses_as_many_nats_as_codes_have():
    new = jit(functools.partial(init_params, RANDAR))(jax.random.key(0))
    assert new["position_emb"].shape == (1, RANDAR.dim)
    value, means = loss(new, tokens(3))
    assert value == pytest.approx(np.log(RANDAR.vocab_size), rel=1e-5)
    assert value == means["loss"] and means["loss/1"] == pytest.approx(np.log(8), rel=1e-5)


def test_order_and_dropout_are_of_the_key_and_the_example(params):
    batch = tokens(4)
    values = [float(loss(params, batch, key)[0]) for key in (None, *jax.random.split(jax.random.key(0)))]
    assert len(set(values)) == 3
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    assert np.mean([loss(params, part)[0] for part in parts]) == pytest.approx(values[0], rel=1e-5)


def test_every_parameter_learns_on_any_mesh(params):
    batch = tokens(8)
    expected = gradient(params, batch)
    norms = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), expected)
    assert min(jax.tree.leaves(norms)) > 1e-6
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, SHARDING_RULES, mesh))
        assert relative_error(gradient(placed, shard_batch(batch, mesh)), expected) < 1e-4


# Parallel decoding.


def test_counts_follow_a_cosine():
    for codes in (1, 2, 9, 40, 144):
        for steps in {1, 2, 3, codes // 3 or 1, codes - 1 or 1, codes} & set(range(1, codes + 1)):
            counts = cosine_counts(codes, steps)
            assert len(counts) == steps and sum(counts) == codes and counts[0] >= 1
            assert list(counts) == sorted(counts)
    assert cosine_counts(9, 9) == (1,) * 9
    counts = cosine_counts(144, 64)
    assert counts[:20] == (1,) * 20 and counts[-1] == 4
    shares = np.cumsum(cosine_counts(144, 8)) / 144
    np.testing.assert_allclose(shares, 1 - np.cos(np.pi / 2 * np.arange(1, 9) / 8), atol=0.01)


@functools.partial(jit, static_argnames="steps")
def decoded(params, codes, *, steps):
    """Logits of the given codes, asked for in so many steps through the KV cache."""
    plan, knobs = make_randar_plan(RANDAR, SamplingConfig(), K, steps, Compute())
    sampler = RandarSampler(params, plan, knobs)
    carry, hidden = sampler.start(jnp.asarray(LABELS), jnp.asarray(MERGE)), []
    for count, *now in zip(plan.counts, *plan.steps, strict=True):
        here = slice(now[0], now[0] + plan.width)
        indices, positions = (jnp.pad(part, ((0, 0), (0, plan.width)))[:, here] for part in codes)
        outputs, asked, rope, kv_cache = sampler.ask(carry, Step(*now), positions)
        known = sampler.apply(indices, method="embed_codes")
        carry = randar_sampling.Carry(kv_cache, randar.alternating(asked, known), jnp.repeat(rope, 2, axis=2))
        hidden.append(outputs[:, :count])
    return sampler.apply(jnp.concatenate(hidden, axis=1), codes.indices, method="predict")


def test_one_by_one_is_teacher_forcing(params, codes):
    assert relative_error(decoded(params, codes, steps=K), logits(params, codes)) < 1e-5


def test_side_by_side_each_code_is_predicted_as_if_it_came_next(params, codes):
    got, start = decoded(params, codes, steps=4), 0
    counts = cosine_counts(K, 4)
    assert counts[-1] > 2
    for count in counts:
        for place in range(start, start + count):
            order = [*range(start), place, *(other for other in range(start, K) if other != place)]
            expected = logits(params, Codes(*(part[:, np.asarray(order)] for part in codes)))
            assert relative_error([x[:, place] for x in got], [x[:, start] for x in expected]) < 1e-5
        start += count


def draw(params, labels=LABELS, *, steps=4, seed=0, examples=None, starts=NOTHING_COUNTED, places=None, **settings):
    drawn = randar_sample(
        params,
        labels,
        K,
        config=RANDAR,
        sampling=SamplingConfig(**settings),
        seed=seed,
        steps=steps,
        examples=examples,
        start_counts=starts,
        positions=places,
    )
    return jax.device_get(drawn)


def test_greedy_codes_are_the_likeliest(params):
    """One by one, under linear guidance, whose scale differs at every code."""
    drawn = draw(params, steps=K, greedy=True, cfg_scale=3.0, cfg_schedule="linear")
    assert len(np.unique(drawn.indices)) > 3
    null = logits(params, drawn, np.full_like(LABELS, RANDAR.null_class))
    scale = np.linspace(1, 3, K)[:, None]
    guided = [b + scale * (a - b) for a, b in zip(*jax.device_get((logits(params, drawn), null)), strict=True)]
    values = drawn.indices & 3, drawn.indices >> 2
    for scores, part in zip(guided, values, strict=True):
        np.testing.assert_array_equal(scores.argmax(-1), part)


def test_codes_depend_on_seed_and_example_alone(params):
    whole = draw(params, cfg_scale=2.0)
    part = draw(params, LABELS[1:], examples=np.arange(1, 3), cfg_scale=2.0)
    jax.tree.map(np.testing.assert_array_equal, part, jax.tree.map(lambda x: x[1:], whole))
    one, all_of_them = draw(params, LABELS[:1]), draw(params)
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda x: x[:1], all_of_them))
    other = draw(params, cfg_scale=2.0, seed=1)
    assert (other.indices != whole.indices).any(axis=1).all()


def test_positions_are_drawn_for_the_class_and_for_k(params):
    """Each has had groups at certain cells only, and the null class has all of them."""
    rng = np.random.default_rng(0)
    cells = rng.permuted(np.tile(np.arange(1, L), (3, 5, 1)), axis=-1)[..., : K - 1]
    counts = np.zeros((3, 5, L), np.int32)
    np.put_along_axis(counts, cells, 10**7, axis=-1)
    counts[..., 0] = 10**7
    labels = np.asarray([3, 0, 4], np.int32)
    drawn = draw(params, labels, starts=counts)
    for label, places in zip(labels, drawn.positions, strict=True):
        assert set(places.tolist()) == {0, *cells[RANDAR.keeps.index(K), label].tolist()}
    given = draw(params, labels, places=drawn.positions)
    jax.tree.map(np.testing.assert_array_equal, given, drawn)
    assert set(draw(params, np.full(99, RANDAR.null_class), starts=counts).positions.flat) == set(range(L))


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "0 steps: allowed are 1 to 9"),
        ({"steps": K + 1}, "10 steps: allowed are 1 to 9, the number of codes"),
        ({"capacity": 9, "top_k": 5}, "sampling: top_k=5: .*; capacity=9: for raster order"),
        ({"policy": "full"}, "policy=full: for raster order"),
        ({"labels": np.asarray([0, 6])}, "classes are 0 to 4"),
        ({"starts": None}, "positions of the codes, or start_counts to draw them from, are needed"),
        ({"places": np.zeros((3, 8), np.int32)}, r"positions \[3, 8\]: one for each code of each .* \[3, 9\]"),
        ({"places": np.zeros((3, 9), np.int32)}, "positions: different numbers from 0 to 11"),
        ({"places": np.tile(np.arange(4, 13), (3, 1))}, "positions: different numbers from 0 to 11"),
    ],
    ids=str,
)
def test_requests_that_are_not_possible(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw({}, **arguments)


def test_a_generator_is_of_one_kind():
    with pytest.raises(ValueError, match="this generator has no position instruction"):
        make_randar_plan(CONFIG, SamplingConfig(), K, 4, Compute())
    with pytest.raises(ValueError, match="this generator draws codes in random order"):
        make_plan(RANDAR, SamplingConfig(), K, Compute())
