"""The generator's transformer: masks, sizes, what may depend on what, and what must not change its values."""

import dataclasses
import functools
import json

import golden_mergevq
import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generator_tools import (
    CODES_OF_NINE,
    CONFIG,
    FIRST_OF_NINE,
    NINE,
    random_codes,
    random_params,
    relative_error,
    teacher_forced,
)
from golden_tools import jit

from mergevq_jax.generator import convert
from mergevq_jax.generator.config import PRESETS, GeneratorConfig, preset
from mergevq_jax.generator.mask import first_of_group, merge_mask
from mergevq_jax.generator.transformer import (
    SHARDING_RULES,
    Generator,
    head_rope_table,
    init_params,
    param_shapes,
    rope_table,
)
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import param_shardings, shard_batch
from runtime_jax.weights import WeightError, export_weights, import_weights, read_safetensors

L = CONFIG.length
LABELS, MERGE = np.asarray([0, 5, 3], np.int32), np.asarray([0, 2, 1], np.int32)


@pytest.fixture(scope="module")
def params():
    return random_params()


# Masks.


def test_the_nine_token_example_row_by_row():
    mask = np.asarray(merge_mask(jnp.asarray(FIRST_OF_NINE, jnp.int32), window=2, prefix=2))[0]
    for row, columns in NINE.items():
        assert set((np.flatnonzero(mask[row + 1, 2:]) + 1).tolist()) == columns
    assert mask[2:, :2].all()  # the prefix
    np.testing.assert_array_equal(mask[:2], np.eye(2, 11, dtype=bool) | np.eye(2, 11, -1, dtype=bool))


def test_first_of_group_of_groups_and_of_equal_codes():
    groups = random_codes(4, values=5)
    expected = [[row.index(value) for value in row] for row in groups.tolist()]
    np.testing.assert_array_equal(first_of_group(jnp.asarray(groups)), expected)
    np.testing.assert_array_equal(first_of_group(jnp.asarray(CODES_OF_NINE)), FIRST_OF_NINE)


# The transformer.


def test_logits_depend_on_what_comes_before_and_on_nothing_else(params):
    """Another code at one position: its later sub-tokens' logits change, and all later codes'; with nothing else."""
    indices, place = random_codes(3), 5
    expected = teacher_forced(params, indices, LABELS, MERGE)
    assert [part.shape for part in expected] == [(3, L, 4), (3, L, 8)]
    assert all(part.dtype == jnp.float32 for part in expected)
    changed = indices.copy()
    changed[:, place] ^= 1  # a bit of the first sub-token
    got = teacher_forced(params, changed, LABELS, MERGE)
    for part, (a, b) in enumerate(zip(got, expected, strict=True)):
        moved = (np.abs(np.asarray(a) - np.asarray(b)) > 1e-4).any(axis=(0, 2))
        assert np.flatnonzero(moved).tolist() == list(range(place + 1 - part, L))


@pytest.mark.parametrize("name", ["labels", "merge"])
def test_the_prefix_matters(params, name):
    prefix = {"labels": LABELS, "merge": MERGE}
    expected = teacher_forced(params, random_codes(3), **prefix)
    other = prefix | {name: (prefix[name] + 1) % 3}
    for a, b in zip(teacher_forced(params, random_codes(3), **other), expected, strict=True):
        assert (np.abs(np.asarray(a) - np.asarray(b)).max(axis=(1, 2)) > 1e-2).all()


def test_a_new_model_predicts_a_uniform_distribution():
    new = jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    logits = teacher_forced(new, random_codes(3), LABELS, MERGE)
    assert not any(np.asarray(part).any() for part in logits)


def test_remat_and_bfloat16(params):
    inputs = random_codes(3), LABELS, MERGE
    expected = teacher_forced(params, *inputs)
    half = Generator(CONFIG, Compute(dtype="bfloat16", remat=True))
    got = teacher_forced(params, *inputs, module=half)
    assert all(part.dtype == jnp.float32 for part in got)
    assert relative_error(got, expected) < 0.1


def test_rotary_rows():
    """The prefix is not turned; rows turn the first half of the pairs, columns the second, both from 0."""
    table = rope_table(CONFIG)
    assert table.shape == (2, 2 + L, 4) and table.dtype == np.float32
    np.testing.assert_array_equal(table[:, :2], [np.ones((2, 4)), np.zeros((2, 4))])
    row, column = 2, 3
    turn = np.asarray([row, row * 0.01, column, column * 0.01])
    np.testing.assert_allclose(table[:, 2 + 4 * row + column], [np.cos(turn), np.sin(turn)], rtol=1e-6)
    released = dataclasses.replace(CONFIG, zero_class_rope=True)
    assert not rope_table(released)[:, 0].any()
    np.testing.assert_array_equal(head_rope_table(released), table[:, [0, 2]] * np.reshape([0, 1], (1, 2, 1)))


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_values_equal_one_device(shape, params):
    batch = {"indices": random_codes(8), "labels": np.arange(8, dtype=np.int32) % 6}
    batch |= {"merge": np.arange(8, dtype=np.int32) % 3}
    expected = teacher_forced(params, **batch)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, SHARDING_RULES, mesh))
        got = teacher_forced(placed, **shard_batch(batch, mesh))
    assert relative_error(got, expected) < 1e-5


# Sizes.


@pytest.mark.parametrize(("name", "millions"), [("B", 106.3), ("L", 343.6), ("XL", 784.0), ("tiny", 1.1)])
def test_parameters_of_the_presets(name, millions):
    shapes = param_shapes(preset(name, merge_instruction=False))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.1)


def test_parameters_are_split():
    mesh, shapes = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), param_shapes(PRESETS["L"])
    shards = param_shardings(shapes, SHARDING_RULES, mesh)
    leaves = list(zip(*map(jax.tree.leaves, (shapes, shards)), strict=True))
    each = sum(np.prod(shard.shard_shape(leaf.shape)) for leaf, shard in leaves)
    assert each < 1.02 * sum(np.prod(leaf.shape) for leaf, _ in leaves) / 8


# The released layout.


@pytest.mark.parametrize("change", [{"zero_class_rope": False}, {"rope_base": 100.0}, {"norm_eps": 1e-3}], ids=str)
def test_another_constant_does_not_give_the_golden_logits(change, goldens, monkeypatch):
    tensors, metadata = read_safetensors(goldens / "gpt.safetensors")
    original = golden_mergevq.generator_config
    monkeypatch.setattr(golden_mergevq, "generator_config", lambda *a: dataclasses.replace(original(*a), **change))
    params, inputs, expected = (golden_tools.parts(tensors, kind) for kind in ("param", "in", "out"))
    got = golden_mergevq.run_gpt(json.loads(metadata["config"]), params, inputs)
    assert relative_error([got[name] for name in expected], list(expected.values())) > 1e-4


@pytest.mark.parametrize("vocab_sizes", [(4, 8), (2, 4, 4), (32,), (5, 3)], ids=str)
def test_weights_there_and_back(vocab_sizes):
    config = dataclasses.replace(CONFIG, vocab_sizes=vocab_sizes)
    params, table = random_params(config), convert.generator_table(config)
    tensors = export_weights(table, params)
    assert {"class_emb.embedding_table.weight", "spatial_blocks.1.attention.wqkv.weight", "head.0.weight"} <= set(
        tensors
    )
    assert ("pre_emb.weight" in tensors) == (len(vocab_sizes) == 2)
    again = import_weights(table, tensors, param_shapes(config))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_released_checkpoint():
    own = {"norm.weight": np.ones(3, np.float32)}
    checkpoint = {f"transformer.{name}": array for name, array in own.items()} | {"first_stage_model.x": np.zeros(1)}
    assert convert.generator_from_released(checkpoint) == own
    with pytest.raises(WeightError, match=r"no transformer\.\* among the 1 tensors: not a stage-2 checkpoint"):
        convert.generator_from_released(own)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0, "ffn_dim": -1}, "dim=0, ffn_dim=-1: positive numbers"),
        ({"num_heads": 3}, "dim=16 over num_heads=3: heads must have a multiple of 4 channels"),
        ({"num_heads": 8}, "dim=16 over num_heads=8: heads must have a multiple of 4 channels"),
        ({"vocab_sizes": ()}, r"vocab_sizes=\(\): at least 2 values each, at most 2\^30 codes together"),
        ({"vocab_sizes": (65536, 65536)}, r"at most 2\^30 codes together"),
        ({"vocab_sizes": (2, 2, 2), "grid": (1, 1), "keeps": (1,)}, "more sub-tokens than a grid"),
        ({"grid": (0, 4)}, r"grid=\(0, 4\): positive"),
        ({"class_dropout": 1.0}, "class_dropout=1.0: a probability below 1"),
        ({"keeps": (4, 13)}, r"keeps=\(4, 13\): rising numbers of kept tokens, 1 to 12"),
        ({"keeps": ()}, r"keeps=\(\): rising numbers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=f"generator config: .*{message}"):
        dataclasses.replace(CONFIG, **changes)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="no generator preset 'M'; there are B, L, XL, tiny"):
        preset("M")


def test_numbers_of_kept_tokens_that_the_model_does_not_know():
    assert [CONFIG.merge_index(number) for number in (4, 9, 12)] == [0, 1, 2]
    for number in (5, None):
        with pytest.raises(ValueError, match=f"K = {number}: this generator knows 4, 9, 12"):
            CONFIG.merge_index(number)
    plain = GeneratorConfig(merge_instruction=False)
    assert plain.merge_index(None) is None
    with pytest.raises(ValueError, match="K = 144: this generator has no merge instruction, give None"):
        plain.merge_index(144)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": np.zeros((3, L - 1), np.int32)}, r"11 codes per image: this generator's grid \(3, 4\) has 12"),
        ({"merge": None}, "this generator needs a merge instruction"),
    ],
    ids=["length", "merge"],
)
def test_inputs_that_do_not_fit(params, arguments, message):
    given = {"indices": random_codes(3), "labels": LABELS, "merge": MERGE} | arguments
    with pytest.raises(ValueError, match=message):
        teacher_forced(params, **given)
