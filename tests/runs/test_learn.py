"""The step that learns a concept: its stages, its losses, what it leaves alone, and its full size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import FLUX, SIDE, tiny_pipeline

from runtime_jax import sharding
from runtime_jax.config import Duration
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import param_shardings, place, shard_batch
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.program import Program
from tokenverse_jax.concepts.captions import bind_captions
from tokenverse_jax.concepts.concept_data import draw, encode_concept, encode_images, make_concepts
from tokenverse_jax.concepts.concept_mod import ConceptModConfig
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.concepts.learn import LearnConfig, StageConfig, init_state, learn_step, make_optimizers, steer
from tokenverse_jax.concepts.learner import Learner
from tokenverse_jax.flux import model
from tokenverse_jax.flux.autoencoder import image_ids
from tokenverse_jax.flux.model import Flux
from tokenverse_jax.flux.offsets import Offsets

CAPTIONS = [["a red ball on the beach", "the beach and a ball"], ["a blue ball"]]
ISOLATION = IsolationConfig(captions=("a dog", "a cat and a dog"), template="two {left} beside {right}")
CONFIG = LearnConfig(
    concept_mod=ConceptModConfig(hidden=8, block_hidden=6),
    stage_1=StageConfig(steps=4, high_share=0.9),
    stage_2=StageConfig(steps=3, high_share=0.1),
    batch_size=2,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=Duration(steps=2)),
    isolation=dataclasses.replace(ISOLATION, probability=1.0),
)
SEED = 5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    flux = dataclasses.replace(FLUX, num_single_layers=1)
    return dataclasses.replace(tiny_pipeline(tmp_path_factory.mktemp("tokenizers"), flux=flux), text_length=64)


def encoded(pipeline, config):
    rng = np.random.default_rng(0)
    images, pool = (rng.integers(0, 256, (2, 2 * SIDE, 2 * SIDE, 3), np.uint8) for _ in range(2))
    captions = bind_captions(pipeline.tokenizer_2, pipeline.text_length, CAPTIONS, ["ball"], config.isolation)
    data = encode_concept(pipeline, config, images, captions)
    return dataclasses.replace(data, pool_latents=encode_images(pipeline, pool))


@pytest.fixture(scope="module")
def data(pipeline):
    return encoded(pipeline, CONFIG)


@pytest.fixture(scope="module")
def learner(pipeline):
    return Learner(pipeline, CONFIG)


@pytest.fixture(scope="module")
def one_step(learner, data):
    """(state, batch, stage) -> (state, metrics), nothing donated."""

    def step(state, batch, stage):
        first = 0 if stage == 1 else CONFIG.stage_1.steps
        return learner.step(jax.tree.map(jnp.copy, state), batch, first, data)

    return step


@pytest.fixture(scope="module")
def at_stage_2(learner, data):
    """The state after all steps of the first stage."""
    state = learner.init(SEED)
    for step in range(CONFIG.stage_1.steps):
        state, _ = learner.step(state, draw(data, CONFIG, SEED, step), step, data)
    return state


def value(metrics, name):
    return float(metrics[name][0])


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Stages and losses.


@pytest.mark.parametrize("stage", [1, 2])
def test_the_isolation_loss_is_zero_at_the_start(learner, data, one_step, stage):
    _, metrics = one_step(learner.init(SEED), draw(data, CONFIG, SEED, 0), stage)
    # Programs that fuse differently round differently: squares of 1e-7 are not always 0.
    assert value(metrics, "isolation") < 1e-12 and value(metrics, "loss") > 0 and value(metrics, "nonfinite") == 0


def test_the_second_stage_starts_from_the_first_ones_function(data, at_stage_2, one_step):
    batch = draw(data, CONFIG, SEED, CONFIG.stage_1.steps)
    (_, first), (_, second) = (one_step(at_stage_2, batch, stage) for stage in (1, 2))
    assert value(first, "isolation") > 1e-6
    assert value(first, "loss") == pytest.approx(value(second, "loss"), rel=1e-6)
    assert value(first, "isolation") == pytest.approx(value(second, "isolation"), rel=1e-5)
    assert value(second, "grad_norm") > value(first, "grad_norm")  # the head's comes on top


def test_only_the_second_stage_changes_the_head(learner, data, at_stage_2, one_step):
    assert_equal(at_stage_2.params["block_head"], learner.init(SEED).params["block_head"])
    after, _ = one_step(at_stage_2, draw(data, CONFIG, SEED, 4), 2)
    changed = jax.tree.map(lambda one, other: bool((one != other).any()), after.params, at_stage_2.params)
    assert changed["block_head"]["mlp"]["out_layer"]["kernel"] and changed["concept_mod"]["in_layer"]["kernel"]


def test_every_stage_has_an_optimizer_of_its_own(data, at_stage_2, one_step):
    after, metrics = one_step(at_stage_2, draw(data, CONFIG, SEED, 4), 2)
    counts = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim == 0]
    assert counts and all(count == 1 for count in counts)
    assert value(metrics, "lr") == pytest.approx(1e-2 / 2)  # the first step of the warm-up again
    again, _ = one_step(after, draw(data, CONFIG, SEED, 5), 2)
    assert all(leaf == 2 for leaf in jax.tree.leaves(again.opt_state) if leaf.ndim == 0)


def test_tokens_without_a_direction_have_none(learner, data, one_step):
    batch = draw(data, CONFIG, SEED, 0)
    _, metrics = one_step(learner.init(SEED), batch | {"mask": np.zeros_like(batch["mask"])}, 1)
    assert value(metrics, "grad_norm") == 0


def test_a_concept_on_either_side_learns_its_own_half_too(pipeline):
    isolation = dataclasses.replace(CONFIG.isolation, sides=("left", "right"), own_weight=10.0)
    config = dataclasses.replace(CONFIG, isolation=isolation)
    data, learner = encoded(pipeline, config), Learner(pipeline, config)
    batch = next(
        b for b in (draw(data, config, SEED, step) for step in range(99)) if set(b["on_right"]) == {False, True}
    )
    state, metrics = learner.step(learner.init(SEED), batch, 0, data)
    part, grid = pipeline.transformer, data.grid
    squares = []
    for row, on_right in enumerate(batch["on_right"]):
        both = [batch[name][row].reshape(*grid, -1) for name in ("latents", "pool_latents")]
        clean = np.concatenate(both[::-1] if on_right else both, axis=1).reshape(1, 2 * len(data.latents[0, 0]), -1)
        noise, time = batch["pair_noise"][row : row + 1], batch["times"][row : row + 1]
        txt, vec = batch["pair_txt"][row : row + 1], batch["pair_vec"][row : row + 1]
        ids = image_ids((grid[0], 2 * grid[1])), jnp.zeros((txt.shape[1], 3))
        x = (1 - time) * clean + time * noise
        guidance = jnp.ones(1) if part.config.guidance_embeds else None
        inputs = map(jnp.asarray, (x, ids[0], txt, ids[1], time, vec))
        velocity = Flux(part.config).apply({"params": part.params}, *inputs, guidance)
        off = np.asarray(velocity - (noise - clean)).reshape(grid[0], 2, grid[1], -1)
        squares.append(np.mean(np.square(off[:, int(on_right)])))
    assert value(metrics, "own_half") == pytest.approx(np.mean(squares), rel=1e-4)
    assert value(metrics, "isolation") < 1e-12
    without = dataclasses.replace(config, isolation=dataclasses.replace(isolation, own_weight=0.0))
    other = Learner(pipeline, without)
    _, alone = other.step(other.init(SEED), batch, 0, data)
    assert "own_half" not in alone and value(alone, "loss") == pytest.approx(value(metrics, "loss"), rel=1e-6)
    assert value(alone, "grad_norm") != pytest.approx(value(metrics, "grad_norm"), rel=0.01)  # the own half's is in it
    _, metrics = learner.step(state, draw(data, config, SEED, 1), 1, data)
    assert value(metrics, "isolation") > 0


def test_an_update_that_is_not_finite_is_skipped(learner, data, one_step):
    state, batch = learner.init(SEED), draw(data, CONFIG, SEED, 0)
    after, metrics = one_step(state, batch | {"noise": np.full_like(batch["noise"], np.nan)}, 1)
    assert value(metrics, "nonfinite") == 1 and metrics["loss"] == (0, 0) and after.step == 1
    assert_equal(after.replace(step=state.step), state)


def test_the_loss_goes_down(pipeline):
    config = dataclasses.replace(CONFIG, isolation=None, stage_1=StageConfig(steps=60, high_share=0.9))
    data, learner = encoded(pipeline, config), Learner(pipeline, config)
    state, batch, losses = learner.init(SEED), draw(data, config, SEED, 0), []
    for step in range(60):
        state, metrics = learner.step(state, batch, step, data)
        losses.append(value(metrics, "loss"))
    assert "isolation" not in metrics and losses[-1] < 0.9 * losses[0]


# The learner.


def test_a_learner_learns_one_concept_after_the_other_with_the_same_programs(
    pipeline, learner, data, at_stage_2, monkeypatch
):
    params = learner.learn(data, SEED)
    monkeypatch.setattr(Program, "trace", lambda *_: pytest.fail("another program was compiled"))
    assert_equal(learner.learn(data, SEED), params)
    other = dataclasses.replace(data, latents=data.latents[::-1].copy(), txt=data.txt[::-1].copy())
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), learner.learn(other, SEED + 1), params)
    assert all(jax.tree.leaves(changed))
    (concept,) = make_concepts(params, data, CONFIG)
    width, blocks = pipeline.transformer.config.width, pipeline.transformer.config.num_blocks
    count = len(data.captions.words["ball"][0])
    assert concept.word == "ball" and len(concept.token_ids) == count
    assert concept.offset.shape == (count, width) and concept.block_offset.shape == (blocks, count, width)
    assert np.abs(concept.offset).max() > 0 and np.abs(concept.block_offset).max() > 0


def test_a_mesh_changes_no_value(pipeline, data, at_stage_2, one_step, monkeypatch):
    """In the second stage, which has all parameters."""
    monkeypatch.setattr(sharding, "LARGE", 16)  # biases are split, as FLUX.1's largest are
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    batch = draw(data, CONFIG, SEED, CONFIG.stage_1.steps)
    _, expected = one_step(at_stage_2, batch, 2)
    part = pipeline.transformer
    part = dataclasses.replace(
        part, params=place(part.params, param_shardings(part.params, model.SHARDING_RULES, mesh))
    )
    with jax.set_mesh(mesh):
        spread = Learner(dataclasses.replace(pipeline, transformer=part), CONFIG, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, spread.program.abstract_state)
        state = place(jax.device_get(at_stage_2), shardings)
        assert len(state.params["concept_mod"]["in_layer"]["kernel"].sharding.device_set) == 4
        state, got = spread.step(state, shard_batch(batch, mesh), CONFIG.stage_1.steps, data)
    for name, tolerance in (("loss", 1e-5), ("isolation", 1e-3), ("grad_norm", 1e-3)):
        assert value(got, name) == pytest.approx(value(expected, name), rel=tolerance)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings


# Spaces.


def test_where_directions_go():
    rng = np.random.default_rng(0)
    txt, offsets = (jnp.asarray(rng.normal(size=(2, tokens, 4)), jnp.float32) for tokens in (5, 3))
    given = Offsets(offsets)
    same, added = steer("modulation", txt, given)
    assert same is txt and added is given
    same, added = steer("modulation_all", txt, given)
    assert same is txt and added.shared is None
    np.testing.assert_allclose(added.everywhere, np.sum(offsets, axis=1), rtol=1e-6)
    moved, added = steer("text", txt, given)
    assert added == Offsets()
    np.testing.assert_array_equal(moved, np.asarray(txt) + np.pad(offsets, ((0, 0), (0, 2), (0, 0))))


@pytest.mark.parametrize("space", ["modulation_all", "text"])
def test_the_other_spaces_learn_too(pipeline, space):
    config = dataclasses.replace(CONFIG, space=space, per_block=False, stage_2=StageConfig(steps=0, high_share=0.0))
    data, learner = encoded(pipeline, config), Learner(pipeline, config)
    only_words = data.mask.sum() == sum(map(len, data.captions.words["ball"]))
    assert only_words == (space == "modulation_all")
    _, metrics = learner.step(learner.init(SEED), draw(data, config, SEED, 0), 0, data)
    assert value(metrics, "isolation") < 1e-12 and value(metrics, "grad_norm") > 0
    (concept,) = make_concepts(learner.learn(data, SEED), data, config)
    width = data.txt.shape[-1] if space == "text" else pipeline.transformer.config.width
    assert concept.offset.shape[1] == width and concept.block_offset is None and np.abs(concept.offset).max() > 0


def test_configs_that_are_not_possible():
    for changes, message in (
        ({"space": "text"}, "per_block with space='text': only modulations differ"),
        ({"batch_size": 0}, "batch_size=0 and"),
        ({"stage_1": StageConfig(steps=0, high_share=0.5)}, r"stage_1\.steps=0 must be at least 1"),
        ({"stage_2": StageConfig(steps=2, high_share=0.5)}, r"warmup of 2 steps must be shorter than stage_2\.steps=2"),
        ({"boundary": 1.0}, r"boundary=1\.0 must be in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=r"high_share=1\.5 must be in"):
        StageConfig(steps=1, high_share=1.5)


# Full size.


def test_the_step_of_flux_dev_traces():
    """The second stage at 512 px with the isolation loss, in bfloat16 with remat, by shapes alone."""
    config, flux = dataclasses.replace(LearnConfig(), isolation=ISOLATION), model.PRESETS["dev"]
    state = jax.eval_shape(functools.partial(init_state, config, flux), jax.random.key(0))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.param_shapes(flux))
    shapes = {
        "latents": (1, 1024, 64),
        "noise": (1, 1024, 64),
        "times": (1,),
        "txt": (1, 512, 4096),
        "vec": (1, 768),
        "pool_latents": (1, 1024, 64),
        "pair_noise": (1, 2048, 64),
        "pair_txt": (1, 512, 4096),
        "pair_vec": (1, 768),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    batch["mask"] = jax.ShapeDtypeStruct((1, 32), jnp.bool_)
    batch["on_right"] = jax.ShapeDtypeStruct((1,), jnp.bool_)
    batch["pair_rows"] = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    step = functools.partial(
        learn_step,
        config=config,
        flux=Flux(flux, Compute(dtype="bfloat16", remat=True)),
        optimizer=make_optimizers(config)[1],
        stage=2,
        grid=(32, 32),
    )
    after, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "isolation", "grad_norm", "lr", "nonfinite"} == set(metrics)
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in state.params.items()}
    assert sizes == {
        "concept_mod": 4097 * 3072 + 3073 * 3072,
        "block_head": 4097 * 512 + 513 * 57 * 3072,
    }
