"""Training generators: the losses, class dropout, the step on a mesh, and runs that go on bit-equal."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generator_run_tools import (
    MODEL,
    RECOVERING,
    TOKENIZER,
    images_of,
    random_generator,
    random_tokenizer,
    run_config,
    write_pictures,
)
from generator_tools import random_codes, random_params, relative_error
from golden_tools import jit
from safetensors.numpy import load_file

from mergevq_jax.generator import train
from mergevq_jax.generator.config import preset
from mergevq_jax.generator.data import TokensConfig
from mergevq_jax.generator.losses import conditions
from mergevq_jax.generator.mask import first_of_group, merge_mask
from mergevq_jax.generator.model import GeneratorModel
from mergevq_jax.generator.run import EvaluationConfig, TrainConfig
from mergevq_jax.generator.run import train as run_training
from mergevq_jax.generator.sub_tokens import split_indices
from mergevq_jax.generator.transformer import SHARDING_RULES, Generator
from mergevq_jax.tokenizer.config import PRESETS
from mergevq_jax.tokenizer.model import param_shapes as tokenizer_shapes
from runtime_jax.config import build, load, to_dict
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.sharding import param_shardings, place, shard_batch
from runtime_jax.training.optimizer import make_optimizer, make_schedule
from runtime_jax.training.program import Program

CONFIG = train.StepConfig(model=MODEL, tokenizer=TOKENIZER)
SGD = train.Optimizer(optax.sgd(1.0), lambda step: jnp.ones(()))  # the change of a parameter is its gradient
BATCH = 8


@pytest.fixture(scope="module")
def codes():
    """Codes and groups that differ from each other."""
    rng = np.random.default_rng(0)
    arrays = {
        "indices": random_codes(BATCH, MODEL, values=6),
        "source_map": rng.integers(0, 10, (BATCH, MODEL.length)).astype(np.int32),
        "label": np.arange(BATCH, dtype=np.int32) % 2,
        "example": np.arange(BATCH, dtype=np.int32),
    }
    return jax.tree.map(jnp.asarray, arrays)


@pytest.fixture(scope="module")
def state():
    """A state with random parameters."""
    state = jax.eval_shape(functools.partial(train.init_state, CONFIG, SGD))
    params = random_params(MODEL)
    return state.replace(step=np.int32(5), params=params, ema=params)


@functools.cache
def step_of(config, keep=10):
    return jit(functools.partial(train.train_step, config=config, optimizer=SGD, keep=keep))


@functools.cache
def loss_of(config, keep=10):
    return jit(functools.partial(train.evaluate, config=config, keep=keep))


def expected_loss(params, codes, mask):
    """Cross-entropies from the logits of teacher forcing, by NumPy."""
    merge = jnp.zeros(BATCH, jnp.int32)
    logits = Generator(MODEL).apply({"params": params}, codes["indices"], codes["label"], merge, mask)
    parts = zip(logits, split_indices(codes["indices"], MODEL.vocab_sizes), strict=True)
    return sum(
        -np.take_along_axis(np.asarray(jax.nn.log_softmax(scores)), values[..., None], axis=-1).mean()
        for scores, values in parts
    )


@pytest.mark.parametrize("groups", ["source_map", "indices", None])
def test_the_loss_is_that_of_the_masked_logits(state, codes, groups):
    mask = None
    config = dataclasses.replace(CONFIG, kind="plain")
    if groups is not None:
        mask = merge_mask(first_of_group(codes[groups]), window=2, prefix=MODEL.prefix)
        config = dataclasses.replace(CONFIG, groups="codes" if groups == "indices" else groups)
    means = loss_of(config)(state.params, None, codes)
    np.testing.assert_allclose(means["loss"], expected_loss(state.params, codes, mask), rtol=1e-5)
    np.testing.assert_allclose(means["loss"], means["loss/0"] + means["loss/1"], rtol=1e-6)


def test_a_new_generator_is_uniform_and_all_of_it_learns(codes):
    state = jit(functools.partial(train.init_state, CONFIG, SGD))()
    new, metrics = step_of(CONFIG)(state, None, codes)
    np.testing.assert_allclose(metrics["loss"][0], np.log(MODEL.vocab_size), rtol=1e-6)
    newer, _ = step_of(CONFIG)(new, None, codes)  # the heads start at zero and hide the rest from the first gradient
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, newer.params)
    assert all(jax.tree.leaves(changed)) and newer.step == 2


def test_a_step_counts_where_groups_start(codes):
    """Whatever the mesh and the number of micro-batches; not where the loss is not finite."""
    rng = np.random.default_rng(0)
    groups = np.stack([rng.permutation(np.r_[:10, rng.integers(0, 10, MODEL.length - 10)]) for _ in range(BATCH)])
    batch = codes | {"source_map": jnp.asarray(groups, jnp.int32)}
    config = dataclasses.replace(CONFIG, kind="random", model=dataclasses.replace(MODEL, position_instruction=True))
    state = jit(functools.partial(train.init_state, config, SGD))()
    assert set(vars(state)) - {"group_starts"} == set(vars(jax.eval_shape(lambda: train.init_state(CONFIG, SGD))))
    once, _ = step_of(config)(state, None, batch)
    assert once.group_starts.shape == (2, 2, MODEL.length)
    np.testing.assert_array_equal(once.group_starts.sum(axis=-1), [[40, 40], [0, 0]])
    twice, _ = step_of(dataclasses.replace(config, accumulate=2))(once, None, batch)
    np.testing.assert_array_equal(twice.group_starts, 2 * once.group_starts)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = place(state, param_shardings(state, SHARDING_RULES, mesh))
        sharded, _ = step_of(config)(placed, None, shard_batch(jax.device_get(batch), mesh))
    np.testing.assert_array_equal(sharded.group_starts, once.group_starts)
    broken = state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
    skipped, _ = step_of(config)(broken, None, batch)
    assert not skipped.group_starts.any()


def test_classes_are_dropped_by_the_example():
    labels, examples = jnp.zeros(2000, jnp.int32), jnp.arange(2000)

    def drop(labels, examples, config=MODEL):
        batch = {"label": labels, "example": examples}
        return np.asarray(conditions(batch, jax.random.key(0), config, 10)[0])

    dropped = drop(labels, examples)
    assert set(dropped) == {0, MODEL.null_class} and abs((dropped > 0).mean() - MODEL.class_dropout) < 0.05
    order = np.random.default_rng(0).permutation(2000)
    np.testing.assert_array_equal(drop(labels, examples[order]), dropped[order])
    never = dataclasses.replace(MODEL, class_dropout=0.0)
    assert not drop(labels, examples, never).any()


def test_images_are_tokenized_as_by_the_tokenizer():
    tokenizer = random_tokenizer()
    images = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), np.uint8)
    tokens = tokenizer.encode(images, keep=10)
    batch = train.tokenize(tokenizer.params, {"image": jnp.asarray(images)}, config=CONFIG, keep=10)
    np.testing.assert_array_equal(batch["source_map"], tokens.source_map)
    np.testing.assert_array_equal(batch["indices"], np.take_along_axis(tokens.indices, tokens.source_map, axis=1))


@pytest.mark.parametrize("kind", ["merge", "plain", "random"])
def test_a_step_in_parts_is_the_step_in_one(codes, kind):
    """Parameters and all metrics in float32; sums of other parts round otherwise."""
    config = dataclasses.replace(
        CONFIG, kind=kind, model=dataclasses.replace(MODEL, position_instruction=kind == "random")
    )
    state = jit(functools.partial(train.init_state, config, SGD))()
    state, _ = step_of(config)(state, None, codes)  # the heads start at zero and hide the rest
    whole, metrics = step_of(config)(state, None, codes)
    parts, others = step_of(dataclasses.replace(config, accumulate=4))(state, None, codes)
    changes = [jax.tree.map(np.subtract, new.params, state.params) for new in (parts, whole)]
    assert relative_error(*changes) < 1e-5
    assert metrics.keys() == others.keys()
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, err_msg=name)


def test_a_step_on_a_mesh_is_the_step_of_one_device(state, codes):
    expected, metrics = jax.device_get(step_of(CONFIG)(state, None, codes))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        program = Program(
            functools.partial(train.init_state, CONFIG, SGD),
            lambda state, frozen, batch, keep: train.train_step(
                state, frozen, batch, config=CONFIG, optimizer=SGD, keep=keep
            ),
            SHARDING_RULES,
            mesh,
        )
        assert tuple(program.shardings.params["head_1"]["kernel"].spec) == ("fsdp", "tensor")
        new, on_mesh = jax.device_get(
            program.step(place(state, program.shardings), shard_batch(jax.device_get(codes), mesh), 10)
        )
    assert relative_error(new.params, expected.params) < 1e-4
    assert relative_error(new.ema, expected.ema) < 1e-4
    for name, (total, _) in metrics.items():
        np.testing.assert_allclose(on_mesh[name][0], total, rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_update_that_is_not_finite_is_skipped(state, codes):
    params = jax.tree.map(np.asarray, state.params)
    params["norm"]["scale"] = np.full_like(params["norm"]["scale"], np.nan)
    new, metrics = step_of(CONFIG)(state.replace(params=params), None, codes)
    assert new.step == state.step + 1 and metrics["nonfinite"][0] == 1 and metrics["loss"] == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, new.ema, state.ema)
    jax.tree.map(np.testing.assert_array_equal, new.params, params)


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_imagenet_configs_build(size):
    config = build(TrainConfig, load(f"configs/mergear_imagenet.py:{size}"))
    assert config.model == preset(size, keeps=(144, 169, 196, 225, 256))
    assert build(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("size", "kind", "count"), [("L", "merge", 344e6), ("XL", "merge", 784e6), ("L", "random", 344e6)]
)
def test_a_published_step_traces(size, kind, count):
    """Whole, from images through the tokenizer, by shapes alone."""
    changes = [f"kind={kind}", f"model.position_instruction={kind == 'random'}"]
    config = build(TrainConfig, load(f"configs/mergear_imagenet.py:{size}", changes))
    tokenizer = PRESETS["gr-d64"]
    step_config = dataclasses.replace(config.step_config(None), tokenizer=tokenizer, accumulate=2)
    state = jax.eval_shape(functools.partial(train.init_state, step_config, SGD))
    batch = {
        "image": jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
        "example": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    step = functools.partial(train.train_step, config=step_config, optimizer=SGD, keep=144)
    new, metrics = jax.eval_shape(step, state, tokenizer_shapes(tokenizer), batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "loss/0", "accuracy/1", "grad_norm", "lr", "nonfinite"} <= set(metrics)
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(state.params)) / count - 1) < 0.01


def trained_run(root, tokenizer=TOKENIZER, **changes):
    """A run of four steps from images, looked at only at the end: its config and its workdir."""
    random_tokenizer(config=tokenizer).save_pretrained(root / "tokenizer")
    config = run_config(root / "tokenizer", images_of(write_pictures(root / "pictures"), flip=True), **changes)
    looking = dataclasses.replace(config.loop, eval_every=4, preview_every=4)
    run_training(dataclasses.replace(config, loop=looking), root / "run")
    return config, root / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("generator"))


@pytest.mark.parametrize("kind", ["merge", "random"])
def test_a_run_goes_on_bit_equal(kind, request, tmp_path):
    if kind == "merge":
        config, workdir = request.getfixturevalue("trained")
    else:
        model = to_dict(dataclasses.replace(MODEL, position_instruction=True))
        config, workdir = trained_run(tmp_path, RECOVERING, kind=kind, model=model)
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    done = run_training(config, tmp_path / "again")
    assert (done.step, done.stopped_by) == (4, None)
    whole, again = (load_file(path / "generator" / "model.safetensors") for path in (workdir, tmp_path / "again"))
    assert whole.keys() == again.keys() and ("group_starts" in whole) == (kind == "random")
    if kind == "random":  # the first cell starts a group in every image
        assert whole["group_starts"][..., 0].sum() == 4 * config.data.batch_size
        fine = dataclasses.replace(config, init_from=str(workdir / "generator"))
        run_training(fine, tmp_path / "fine")
        after = load_file(tmp_path / "fine" / "generator" / "model.safetensors")["group_starts"]
        assert after[..., 0].sum() == 2 * 4 * config.data.batch_size and (after >= whole["group_starts"]).all()
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name], err_msg=name)


def with_old_names(path, *keys):
    """Writes a JSON file as an older version did, which had other names in the architecture under `keys`."""
    fields = json.loads(path.read_text())
    architecture = functools.reduce(dict.get, keys, fields)
    assert (architecture.pop("vocab_sizes"), architecture.pop("keeps")) == ([2, 8], [10, 16])
    architecture |= {"code_bits": [1, 3], "merge_numbers": [10, 16]}
    path.write_text(json.dumps(fields))


def test_checkpoints_and_generators_of_an_older_version(trained, tmp_path):
    config, workdir = trained
    shutil.copytree(workdir, tmp_path / "old")
    with_old_names(tmp_path / "old" / "generator" / "config.json", "architecture")
    assert GeneratorModel.from_pretrained(tmp_path / "old" / "generator").config == MODEL
    with_old_names(tmp_path / "old" / "checkpoints" / "4" / "config" / "metadata", "model")
    assert run_training(config, tmp_path / "old").step == 4
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, vocab_sizes=(4, 4)))
    with pytest.raises(ValueError, match=r"model.vocab_sizes: \[2, 8\] -> \[4, 4\]"):
        run_training(other, tmp_path / "old")


def test_a_run_leaves_a_generator_pictures_and_held_out_losses(trained):
    _, workdir = trained
    model = GeneratorModel.from_pretrained(workdir / "generator")
    assert model.config == MODEL and model.info.classes == ("even", "odd")
    assert model.load_tokenizer().config == TOKENIZER
    lines = (workdir / "metrics.jsonl").read_text()
    assert all(f'"eval/loss/K{keep}"' in lines for keep in (10, 16))
    assert list((workdir / "images").glob("samples_*.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "plain"}, "kind: 'merge' -> 'plain'"),
        ({"window": 3}, "window: 2 -> 3"),
        ({"init_from": "/no/generator"}, "/no/generator"),
        ({"tokenizer": "/no/tokenizer"}, "/no/tokenizer"),
        ({"model": dataclasses.replace(MODEL, vocab_sizes=(4, 8))}, "the tokenizer has 16 codes"),
        ({"model": dataclasses.replace(MODEL, num_classes=3)}, "has 2 classes, the generator model.num_classes=3"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(trained, changes, message):
    config, workdir = trained
    with pytest.raises(ValueError, match=message):
        run_training(dataclasses.replace(config, **changes), workdir)


def test_it_does_not_start_from_a_generator_of_other_codes(trained, tmp_path):
    config, _ = trained
    random_generator(random_tokenizer(1), "elsewhere").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="its codes are not those of the tokenizer"):
        run_training(dataclasses.replace(config, init_from=str(tmp_path / "other")), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_ratio": {"keeps": [12], "weights": [1.0]}}, r"K = \[12\] in merge_ratio or evaluation.keeps"),
        ({"window": 0}, "window=0: 1 to 16"),
        ({"accumulate": 3}, "must be a multiple of accumulate=3"),
        ({"kind": "mergear"}, "kind: got 'mergear'"),
        ({"kind": "random"}, "kind='random' with model.position_instruction=False"),
    ],
)
def test_configs_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, images_of(tmp_path), **changes)


@pytest.mark.parametrize("name", ["batches", "preview_classes", "preview_images"])
def test_evaluations_of_nothing(name):
    data = TokensConfig(folders=("codes",), batch_size=1)
    with pytest.raises(ValueError, match=f"evaluation: {name}=0: at least 1"):
        EvaluationConfig(data=data, **{name: 0})
    with pytest.raises(ValueError, match="batch_size=0"):
        dataclasses.replace(data, batch_size=0)


def test_randar_without_instruction_draws_all_codes(tmp_path):
    model = dataclasses.replace(MODEL, merge_instruction=False, position_instruction=True)
    with pytest.raises(ValueError, match=r"K = .*: without model.merge_instruction RandAR draws 16 codes"):
        run_config(tmp_path, images_of(tmp_path), kind="random", model=model)


@pytest.mark.parametrize("arg", ["merge", "plain", "random"])
def test_tiny_configs_build(arg):
    config = build(TrainConfig, load(f"configs/mergear_tiny.py:{arg}"))
    assert config.model.merge_instruction == (config.kind != "plain")
    assert config.model.position_instruction == (config.kind == "random")
    assert build(TrainConfig, to_dict(config)) == config


def test_every_part_of_the_tiny_config_s_state_has_a_sharding():
    """Muon's too."""
    config = build(TrainConfig, load("configs/mergear_tiny.py:random"))
    schedule = make_schedule(config.optimizer, total_steps=1000, batch_size=16, num_examples=None)
    optimizer = train.Optimizer(make_optimizer(config.optimizer, schedule), schedule)
    state = jax.eval_shape(functools.partial(train.init_state, config.step_config(None), optimizer))
    shardings = param_shardings(state, SHARDING_RULES, make_mesh(MeshConfig()))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
