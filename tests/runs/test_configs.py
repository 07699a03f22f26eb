"""Every config file builds; the full-size ones carry the published figures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergevq_jax.generator.run import TrainConfig as GeneratorConfig
from mergevq_jax.tokenizer import inspect, train
from mergevq_jax.tokenizer.config import PRESETS
from mergevq_jax.tokenizer.convert import tokenizer_table
from mergevq_jax.tokenizer.losses.perceptual import lpips_shapes
from mergevq_jax.tokenizer.model import param_shapes, read_tokenizer_config
from mergevq_jax.tokenizer.run import TrainConfig, load_frozen
from runtime_jax.config import build, load, to_dict
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config
from runtime_jax.sharding import LARGE, param_shardings
from runtime_jax.training.update import Optimizer
from runtime_jax.weights import export_weights
from tokenverse_jax.flux import model as flux

LPIPS = "lpips=('vgg16.safetensors',)"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_imagenet_configs_build(preset):
    config = build(TrainConfig, load(f"configs/mergevq_imagenet.py:{preset}", [LPIPS]))
    assert config.model == PRESETS[preset]
    assert config.merge_ratio.keeps[0 if preset.startswith("r") else 1] == config.model.keep
    assert config.optimizer.clip_norm == (5.0 if preset in ("r-d64", "gr-d96") else None)
    assert build(TrainConfig, to_dict(config)) == config


ABLATIONS = ["g", "gr", "r", "gr-unaligned", "gr-unmerged", "gr-fixed", "gr-unplaced"]


@pytest.mark.parametrize(
    "spec", ["recovery:tiny", "recovery:gr-d64", "recovery:r-d64", *(f"ablation:{name}" for name in ABLATIONS)]
)
def test_other_tokenizers_build_and_can_be_saved(spec):
    config = build(TrainConfig, load(f"mergevq_{spec}", ["teacher=x", "init_from=x"], new_keys=True)).model
    assert config.recovers_from_starts == (spec != "ablation:gr-unplaced")
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), param_shapes(config))
    assert len(export_weights(tokenizer_table(config), zeros)) > 50


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mergevq_tiny.py:dmeo", "no variant 'dmeo'; there are full, demo"),
        ("mergevq_imagenet.py:gr-d65", "no preset 'gr-d65'"),
        ("mergevq_imagenet.py:tiny", "'tiny' has no published schedule"),
    ],
)
def test_variants_that_do_not_exist(spec, message):
    with pytest.raises(ValueError, match=message):
        load(f"configs/{spec}")


@pytest.fixture(scope="module")
def fsdp():
    return make_mesh(MeshConfig(data=1, fsdp=8))


@pytest.mark.parametrize("preset", ["g-d32", "gr-d64", "r-d64"])
def test_fsdp_splits_all_that_is_large_in_a_tokenizer(preset, fsdp):
    config = build(TrainConfig, load(f"configs/mergevq_imagenet.py:{preset}"))
    assert whole(inspect.abstract_step(config, fsdp)[0].abstract_state) == []


def test_fsdp_splits_all_that_is_large_in_flux(fsdp):
    shapes = flux.param_shapes(flux.PRESETS["dev"])
    shardings = param_shardings(shapes, flux.SHARDING_RULES, fsdp)
    assert (
        whole(jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, shardings))
        == []
    )


def whole(tree):
    """Paths of large leaves that each device has a copy of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    large = [(jax.tree_util.keystr(path), leaf.sharding) for path, leaf in leaves if leaf.size > LARGE]
    assert len(large) > 20
    return [path for path, sharding in large if sharding.is_fully_replicated]


def test_a_published_step_traces():
    """The published objective whole, by shapes alone: LPIPS, discriminator, source and alignment loss with DINOv2.

    Of G+R, which has all parts: the other sizes' steps differ in widths, or leave parts out.
    """
    config = build(TrainConfig, load("configs/mergevq_imagenet.py:gr-d64", [LPIPS]))
    step_config = train.StepConfig(
        model=config.model,
        compute=config.compute,
        losses=config.losses,
        discriminator=config.discriminator,
        teacher=DINOv2Config(),
        accumulate=2,
    )
    optimizer = Optimizer.make(config.optimizer, total_steps=10**6, batch_size=4, num_examples=10**6)
    optimizers = train.Optimizers(optimizer, optimizer)
    state = jax.eval_shape(functools.partial(train.init_state, step_config, optimizers))
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    teacher = jax.eval_shape(DINOv2(step_config.teacher).init, jax.random.key(0), pixels)["params"]
    batch = {"image": jax.ShapeDtypeStruct((4, 256, 256, 3), jnp.uint8)}
    batch |= {view.name: jax.ShapeDtypeStruct((4, *view.shape), jnp.uint8) for view in config.needed_data().views}
    assert batch.keys() == {"image", "student", "teacher"}
    step = functools.partial(train.train_step, config=step_config, optimizers=optimizers, keep=config.model.keep)
    new, metrics = jax.eval_shape(step, state, train.Frozen(lpips=lpips_shapes(), teacher=teacher), batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "perceptual", "entropy", "source", "alignment", "disc/loss"} <= set(metrics)


@pytest.mark.parametrize(
    ("overrides", "views"),
    [([], 2), (["losses.alignment_weight=0.0"], 0), (["losses.alignment=label"], 1)],
)
def test_only_views_that_a_loss_reads_are_made(overrides, views):
    config = build(TrainConfig, load("configs/mergevq_imagenet.py", overrides, new_keys=True))
    assert len(config.needed_data().views) == views


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["losses.alignment_size=192"], "'teacher' of 224 pixels; the alignment loss reads 'student' and 'teacher' of"),
        (["data.views=({'name': 'other', 'image_size': 224},)"], "'other' of 224 pixels; the alignment loss reads"),
        (["evaluation.data.views=({'name': 'student', 'image_size': 224},)"], "an evaluation reads only images"),
    ],
)
def test_views_that_nothing_reads(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(TrainConfig, load("configs/mergevq_imagenet.py", overrides, new_keys=True))


def test_a_generator_reads_no_further_views():
    views = "data.views=({'name': 'student', 'image_size': 224},)"
    with pytest.raises(ValueError, match=r"data.views is set, but a generator reads only images"):
        build(GeneratorConfig, load("configs/mergear_imagenet.py", [views], new_keys=True))


@pytest.mark.parametrize("arg", ["full", "demo"])
def test_tiny_configs_build(arg):
    config = build(TrainConfig, load(f"configs/mergevq_tiny.py:{arg}"))
    assert config.model == PRESETS["tiny"]
    assert config.losses.discriminator_start < config.loop.duration.steps


def test_full_size_needs_weights_for_its_perceptual_loss():
    config = build(TrainConfig, load("configs/mergevq_imagenet.py:gr-d64", ["losses.alignment_weight=0.0"]))
    with pytest.raises(ValueError, match="lpips names no weights"):
        load_frozen(config)


def test_the_shipped_tokenizer_is_the_preset():
    assert read_tokenizer_config("tiny") == PRESETS["tiny"]
