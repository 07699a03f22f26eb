"""Sampling: the loop against teacher forcing, random numbers, the KV cache's memory, and what is asked of it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generator_tools import CONFIG, random_params, teacher_forced
from golden_tools import jit
from test_position_cache import simulate

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.mask import first_of_group, merge_mask
from mergevq_jax.generator.sampling import raster as sampling
from mergevq_jax.generator.sampling.draw import draw, guidance_scales, keep_likely
from mergevq_jax.generator.sampling.plan import SamplingConfig, make_plan
from mergevq_jax.generator.sampling.raster import sample
from mergevq_jax.generator.sub_tokens import split_indices
from mergevq_jax.generator.transformer import SHARDING_RULES, Generator, param_shapes
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.sharding import param_shardings

L = CONFIG.length
LABELS = np.asarray([0, 3, 4, 5], np.int32)  # the last is the null class
NUMBER, WINDOW = 9, 2


@pytest.fixture(scope="module")
def params():
    return random_params()


def codes(params, labels=LABELS, *, seed=0, examples=None, **settings):
    settings = SamplingConfig(**settings)
    drawn = sample(params, labels, NUMBER, config=CONFIG, sampling=settings, seed=seed, examples=examples)
    return jax.device_get(drawn)


def masked_logits(params, indices, labels):
    mask = jit(functools.partial(merge_mask, window=WINDOW, prefix=2))(first_of_group(jnp.asarray(indices)))
    merge = np.full(len(labels), CONFIG.keeps.index(NUMBER), np.int32)
    return [np.asarray(part) for part in teacher_forced(params, indices, labels, merge, mask)]


# The loop.


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.5)], ids=["unguided", "guided"])
def test_greedy_codes_are_the_likeliest_under_teacher_forcing(scales, params):
    """Linear guidance, whose scale differs at every step; capacity 9 holds all distinct codes."""
    drawn = codes(params, greedy=True, cfg_scale=scales, cfg_schedule="linear")
    assert not drawn.overflows.any() and len(np.unique(drawn.indices)) > 3
    logits = masked_logits(params, drawn.indices, LABELS)
    null = masked_logits(params, drawn.indices, np.full_like(LABELS, CONFIG.null_class))
    steps = guidance_scales(scales, L, "linear")
    for part, values in enumerate(split_indices(jnp.asarray(drawn.indices), CONFIG.vocab_sizes)):
        mixed = null[part] + steps[:, part, None] * (logits[part] - null[part])
        np.testing.assert_array_equal(mixed.argmax(-1), values)


def test_temperature_top_k_and_top_p_are_those_of_each_sub_token(params):
    """Each makes a draw the likeliest value in its own way, for the sub-tokens that it is said of and no other."""
    likeliest = codes(params, greedy=True).indices
    for settings in ({"temperature": 1e-5}, {"top_k": 1}, {"top_p": 1e-6}):
        np.testing.assert_array_equal(codes(params, **settings).indices, likeliest)
    free, first, second = codes(params), codes(params, top_k=(1, 0)), codes(params, top_p=(1.0, 1e-6))
    parts = [split_indices(jnp.asarray(drawn.indices[:, 0]), CONFIG.vocab_sizes) for drawn in (free, first, second)]
    best = split_indices(jnp.asarray(likeliest[:, 0]), CONFIG.vocab_sizes)
    np.testing.assert_array_equal(parts[1][0], best[0])
    np.testing.assert_array_equal(parts[2][0], parts[0][0])
    assert (parts[0][0] != best[0]).any() and (parts[1][1] != best[1]).any()
    hot = codes(params, temperature=100.0).indices
    assert len(np.unique(hot)) > len(np.unique(likeliest))


@pytest.mark.parametrize("policy", ["evict-oldest", "full"])
def test_a_report_of_what_the_store_held(policy, params):
    """With room for two tokens the KV cache overflows, as a list of tokens does."""
    drawn = codes(params, capacity=2, policy=policy)
    assert drawn.overflows.min() > 0
    for row in range(len(LABELS)):
        held, first, overflows = zip(*simulate(drawn.indices[row], WINDOW, 2, policy), strict=True)
        np.testing.assert_array_equal(drawn.first_occurrence[row], first)
        assert set(np.flatnonzero(drawn.kept[row])) == set(held[-1])
        np.testing.assert_array_equal(drawn.occupancy[row], [2 + len(tokens) for tokens in held])
        assert drawn.overflows[row] == overflows[-1]
    assert drawn.occupancy.max() <= make_plan(CONFIG, SamplingConfig(capacity=2), NUMBER, Compute())[0].slots


def test_codes_depend_on_seed_and_example_alone(params):
    whole = codes(params, cfg_scale=2.0)
    for part in (slice(0, 2), slice(2, 4)):
        got = codes(params, LABELS[part], examples=np.arange(4)[part], cfg_scale=2.0)
        jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(lambda x, part=part: x[part], whole))
    one = codes(params, LABELS[1:2], examples=np.arange(1, 2))  # a KV cache without an axis of rows
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda x: x[1:2], codes(params)))
    again, other = codes(params, cfg_scale=2.0), codes(params, cfg_scale=2.0, seed=1)
    np.testing.assert_array_equal(again.indices, whole.indices)
    assert (other.indices != whole.indices).any(axis=1).all()


def test_a_mesh_draws_the_same_codes(params):
    expected = codes(params, cfg_scale=2.0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, SHARDING_RULES, mesh))
        got = codes(placed, cfg_scale=2.0)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_bfloat16_draws_what_float32_finds_likeliest_or_nearly(params):
    settings, half = SamplingConfig(greedy=True), Compute(dtype="bfloat16")
    drawn = sample(params, LABELS, NUMBER, config=CONFIG, sampling=settings, seed=0, compute=half)
    logits = masked_logits(params, drawn.indices, LABELS)
    merge = np.full(len(LABELS), CONFIG.keeps.index(NUMBER), np.int32)
    for part in teacher_forced(params, drawn.indices, LABELS, merge, module=Generator(CONFIG, half)):
        # Summed in float32: few values would be bfloat16's by chance.
        assert part.dtype == jnp.float32 and (part.astype(jnp.bfloat16).astype(jnp.float32) == part).mean() < 0.1
    for scores, values in zip(logits, split_indices(drawn.indices, CONFIG.vocab_sizes), strict=True):
        chosen = np.take_along_axis(scores, np.asarray(values)[..., None], axis=-1)[..., 0]
        assert (scores.max(-1) - chosen).max() < 0.01 * scores.std()  # measured: 0


def test_numbers_change_without_compiling(params):
    codes(params, cfg_scale=2.0)
    before = sampling.run._cache_size()
    codes(params, cfg_scale=(1.5, 4.0), cfg_schedule="linear", temperature=0.5, seed=3)
    assert sampling.run._cache_size() == before


# The KV cache's memory.

BATCH = 64
WIDE = GeneratorConfig(
    num_layers=1,
    dim=256,
    num_heads=4,
    ffn_dim=8,
    head_layers=1,
    vocab_sizes=(2, 2),
    num_classes=2,
    merge_instruction=False,
)


@functools.cache
def compiled(side, window, capacity, batch=BATCH):
    """A sampler whose memory is nearly all KV cache, and the shape of one layer's keys."""
    config = dataclasses.replace(WIDE, grid=(side, side))
    settings = SamplingConfig(window=window, capacity=capacity)
    plan, knobs = make_plan(config, settings, None, Compute())
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    arguments = param_shapes(config), numbers, None, stream_key(0, Stream.SAMPLE), numbers, knobs
    program = sampling.run.lower(*arguments, plan=plan).compile()
    rows = () if batch == 1 else (batch,)
    return program, (*rows, config.num_heads, plan.slots, config.head_dim)


@pytest.mark.parametrize(("side", "kept", "limit"), [(16, 144, 0.60), (32, 256, 0.28)])
def test_memory_shrinks_with_the_kept_tokens(side, kept, limit):
    small, large = (compiled(side, *kv_cache)[0] for kv_cache in ((2, kept), (side**2, side**2)))
    assert small.memory_analysis().temp_size_in_bytes <= limit * large.memory_analysis().temp_size_in_bytes


def test_no_memory_but_the_store():
    program, shape = compiled(16, 2, 144)
    kv_cache = 2 * 4 * np.prod(shape)
    assert kv_cache < program.memory_analysis().temp_size_in_bytes < 1.25 * kv_cache


def test_unguided_sampling_has_one_row_an_image():
    assert f"f32[{2 * BATCH}," not in compiled(16, 2, 144)[0].as_text()


@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_store_is_updated_in_place(batch):
    program, shape = compiled(16, 2, 144, batch)
    text, array = program.as_text(), f"f32[{','.join(map(str, shape))}]"
    bodies = [re.escape(name) for name in re.findall(r" while\(.*body=%?([\w.-]+)", text)]
    texts = [re.search(rf"^%?{name} .*?^}}", text, re.MULTILINE | re.DOTALL)[0] for name in bodies]
    (loop,) = (body for body in texts if array in body)
    assert not re.search(rf"= {re.escape(array)}\S* (copy|transpose)\(", loop)


# Guidance, and the draw.


def test_guidance_schedules():
    np.testing.assert_array_equal(guidance_scales((2.0, 1.0), 3, "constant"), [[2, 1]] * 3)
    np.testing.assert_array_equal(guidance_scales((2.0, 5.0), 3, "linear"), [[1, 1], [1.5, 3], [2, 5]])
    np.testing.assert_array_equal(guidance_scales((3.0,), 4, "interval", (0.25, 0.75)), [[1], [3], [3], [1]])
    np.testing.assert_allclose(guidance_scales((3.0, 1.0), 3, "power-cosine"), [[1, 1], [2, 1], [3, 1]], rtol=1e-6)
    late = guidance_scales((3.0,), 5, "power-cosine", power=3.0)[:, 0]
    assert late[0] == 1 and late[-1] == 3 and np.all(np.diff(late) > 0) and late[2] < 1.1


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, None, 5), (5, None, 5), (2, None, 2), (0, 0.5, 1), (0, 0.51, 2), (0, 0.99, 5), (2, 0.7, 2), (3, 0.5, 1)],
)
def test_the_likeliest_values_are_kept(top_k, top_p, kept):
    probabilities = np.asarray([[0.15, 0.5, 0.03, 0.02, 0.3], [0.5, 0.02, 0.15, 0.3, 0.03]])
    top_p = None if top_p is None else jnp.asarray(top_p)
    got = np.asarray(jit(keep_likely, static_argnums=1)(jnp.log(probabilities), top_k, top_p))
    expected = np.where(np.argsort(np.argsort(-probabilities)) < kept, np.log(probabilities), -np.inf)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_draws_follow_the_probabilities():
    probabilities, count = np.asarray([0.5, 0.25, 0.25, 0.0]), 4096
    keys = example_keys(stream_key(0, Stream.SAMPLE), np.arange(count))
    logits = jnp.broadcast_to(jnp.log(probabilities), (count, 4))
    shares = np.bincount(jit(draw)(logits, keys), minlength=4) / count
    assert shares[3] == 0 and np.abs(shares - probabilities).max() < 4 * (0.25 / count) ** 0.5


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, r"top_k=5: 0 \(off\) to the sub-tokens' vocabularies \(4, 8\)"),
        ({"top_k": (0, -1)}, r"top_k=\(0, -1\): 0"),
        ({"top_p": 0.0}, "top_p=0.0: above 0, up to 1"),
        ({"temperature": 0.0}, "temperature=0.0: positive"),
        ({"temperature": (1.0, 1.0, 1.0)}, "one value, or one for each of 2 sub-tokens"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0: finite numbers from 0"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule='cosine': allowed are constant, linear, interval, power-cosine"),
        ({"cfg_power": 2.0}, "only with cfg_schedule='power-cosine'"),
        ({"cfg_power": 0.0, "cfg_schedule": "power-cosine"}, "a positive number"),
        ({"cfg_interval": (0.5, 0.5), "cfg_schedule": "interval"}, "the start before the end"),
        ({"cfg_interval": (0.2, 0.8)}, "only with cfg_schedule='interval'"),
        ({"policy": "lru"}, "policy='lru': allowed are evict-oldest, full"),
        ({"window": 0}, "window=0, capacity=9: needed is 1 <= window <= capacity <= 12"),
        ({"capacity": 0}, "window=2, capacity=0: needed is 1 <= window <= capacity <= 12"),
        ({"capacity": 1}, "window=2, capacity=1: needed is"),
        ({"capacity": 13}, "window=2, capacity=13: needed is"),
        ({"policy": "lru", "top_p": 2.0}, "top_p=2.0.*; policy='lru'"),
    ],
    ids=str,
)
def test_settings_that_are_not_possible(settings, message):
    unchecked = object.__new__(SamplingConfig)  # without the type check that only tests have
    unchecked.__dict__.update(vars(SamplingConfig()) | settings)
    with pytest.raises(ValueError, match=f"sampling: .*{message}"):
        make_plan(CONFIG, unchecked, NUMBER, Compute())


def test_guidance_needs_a_null_class():
    config = dataclasses.replace(CONFIG, class_dropout=0.0)
    with pytest.raises(ValueError, match=r"cfg_scale=1.5: this generator has no null class \(class_dropout is 0\)"):
        make_plan(config, SamplingConfig(cfg_scale=1.5), NUMBER, Compute())
    plan, _ = make_plan(config, SamplingConfig(), NUMBER, Compute())
    assert plan.rows == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": np.asarray([0, 6])}, r"labels \[0, 6\]: classes are 0 to 4, or the null class 5"),
        ({"labels": np.asarray([-1])}, "classes are 0 to 4"),
        ({"labels": np.zeros(0, np.int32)}, "at least one"),
        ({"keep": 10}, "K = 10: this generator knows 4, 9, 12"),
        ({"keep": None}, "K = None: this generator knows 4, 9, 12"),
        ({"examples": np.arange(3)}, "3 example numbers for 4 labels"),
        ({"seed": -1}, "seed: got -1"),
    ],
    ids=str,
)
def test_requests_that_are_not_possible(arguments, message):
    given = {"labels": LABELS, "keep": NUMBER, "seed": 0} | arguments
    labels, number = given.pop("labels"), given.pop("keep")
    unchecked = getattr(sample, "__wrapped__", sample)
    with pytest.raises(ValueError, match=message):
        unchecked({}, labels, number, config=CONFIG, sampling=SamplingConfig(), **given)


def test_defaults_of_the_store():
    """A MergeAR generator keeps as many tokens as it is asked for; one without the instruction keeps all."""
    plan, _ = make_plan(CONFIG, SamplingConfig(), NUMBER, Compute())
    assert (plan.window, plan.capacity, plan.slots) == (2, 9, 2 + 3 + 9)
    plain = dataclasses.replace(CONFIG, merge_instruction=False)
    plan, _ = make_plan(plain, SamplingConfig(), None, Compute())
    assert (plan.window, plan.capacity, plan.slots) == (L, L, 1 + L)
