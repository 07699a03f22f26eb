"""The stage-1 train step: equal on every mesh, its two gradients, accumulation, and NaN."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from run_tools import assert_close

from mergevq_jax.tokenizer import model, train
from mergevq_jax.tokenizer.config import PRESETS, RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.run import make_program
from runtime_jax import sharding
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config
from runtime_jax.sharding import shard_batch
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.update import Optimizer

MODEL = TokenizerConfig(
    resolution=16,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=(0, 1),
    num_att_blocks=1,
    num_heads=8,
    z_channels=8,
    keep=36,
    layer_scale=0.5,
    dist_head=None,
    recovery=RecoveryConfig(rec_embed_dim=32, num_layers=1, num_heads=8, positions="starts", num_res_blocks=1),
)
LOSSES = train.LossConfig(perceptual_weight=0.0, entropy_temperature=0.5)
CONFIG = train.StepConfig(model=MODEL, losses=LOSSES, discriminator=train.DiscriminatorConfig(ndf=8, num_layers=2))
# With this optimizer, a parameter changes by its gradient.
SGD = Optimizer(optax.sgd(1.0), optax.constant_schedule(1.0))
PLAIN = train.Optimizers(SGD, SGD)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 255, (8, 8, 8, 3)), np.ones((1, 2, 2, 1))).astype(np.uint8)
    return {"image": images, "label": np.zeros(8, np.int32), "example": np.arange(8)}


@pytest.fixture(scope="module")
def state():
    """Initialised, but with norms and biases away from their neutral values."""
    state = jax.jit(functools.partial(train.init_state, CONFIG, PLAIN))()
    rng = np.random.default_rng(1)
    state = jax.device_get(state)
    params = jax.tree.map(lambda x: x + np.float32(0.05) * rng.standard_normal(x.shape, np.float32), state.params)
    return state.replace(params=params, ema=params)


@functools.cache
def one_device_step(config=CONFIG, optimizers=PLAIN, keep=36):
    return jax.jit(functools.partial(train.train_step, config=config, optimizers=optimizers, keep=keep))


@pytest.fixture(scope="module")
def reference(state, batch):
    return jax.device_get(one_device_step()(state, train.Frozen(), batch))


def test_recovery_alone_is_trained(state, batch):
    """On frozen codes, without decoding: only recovery changes."""
    losses = train.LossConfig(
        pixel_weight=0.0, perceptual_weight=0.0, adversarial_weight=0.0, entropy_weight=0.0, commitment_weight=0.0
    )
    config = dataclasses.replace(CONFIG, losses=losses, only=("^recovery/",))
    adam = Optimizer.make(OptimizerConfig(only=config.only), total_steps=10, batch_size=8)
    optimizers = train.Optimizers(adam, SGD)
    start = state.replace(opt_state=adam.transformation.init(state.params))
    new, metrics = jax.device_get(one_device_step(config, optimizers)(start, train.Frozen(), batch))
    assert metrics.keys() >= {"source", "source/accuracy"} and not metrics.keys() & {"pixel", "mse", "adversarial"}
    for part in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, new.params[part], start.params[part])
        jax.tree.map(np.testing.assert_array_equal, new.ema[part], start.ema[part])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), new.params["recovery"], start.params["recovery"])
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_a_step_on_any_mesh_is_the_step_of_one_device(shape, state, batch, reference, monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", 1000)  # convolutions of this size are split too
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    with jax.set_mesh(mesh):
        program = make_program(CONFIG, PLAIN, mesh, train.Frozen())
        convolution = program.shardings.params["decoder"]["up_1_upsample"]["kernel"]
        assert convolution.shard_shape((3, 3, 64, 256)) == (3, 3, 64, 256 // shape[1])
        placed = jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), state, program.abstract_state)
        new, metrics = jax.device_get(program.step(placed, shard_batch(batch, mesh), 36))
    assert program.flops(36) > 1e8 and program.flops(40) == 0
    expected_state, expected_metrics = reference
    gradients = jax.tree.map(lambda old, new: old - new, state.params, new.params)
    expected = jax.tree.map(lambda old, new: old - new, state.params, expected_state.params)
    assert_close(gradients, expected, 2e-4)
    assert_close(new.disc_params, expected_state.disc_params, 1e-4)
    assert_close(new.disc_stats, expected_state.disc_stats, 1e-4)
    assert_close(new.ema, expected_state.ema, 1e-4)
    for name, (total, count) in expected_metrics.items():
        mean = metrics[name][0] / metrics[name][1]
        np.testing.assert_allclose(mean, total / count, rtol=2e-4, atol=1e-5, err_msg=name)


def test_parameters_are_really_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        specs = make_program(CONFIG, PLAIN, mesh, train.Frozen()).abstract_state.params
    qkv = specs["encoder"]["attn"]["blocks_0"]["attn"]["qkv"]["kernel"].sharding.spec
    assert tuple(qkv) == ("fsdp", "tensor")


def change(state, new, name):
    return jax.tree.map(lambda old, new: old - np.asarray(new), getattr(state, name), getattr(new, name))


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def test_the_discriminators_loss_does_not_move_the_generator(state, batch, reference):
    # LeCam's averages are only in the discriminator's loss.
    lecam = jax.tree.map(lambda x: np.full_like(x, 40.0), state.lecam)
    other = jax.device_get(one_device_step()(state.replace(lecam=lecam), train.Frozen(), batch))[0]
    first = reference[0]
    assert largest(jax.tree.map(np.subtract, other.disc_params, first.disc_params)) > 1e-3
    assert_close(change(state, other, "params"), change(state, first, "params"), 2e-4)


def test_the_generators_losses_do_not_move_the_discriminator(late, batch, reference):
    """With a hundred times the adversarial weight, and other losses besides."""
    before, (new, metrics) = late.state(STARTS), late.step(late.state(STARTS), batch)
    assert_close(change(before, new, "disc_params"), change(before, reference[0], "disc_params"), 2e-4)
    assert metrics["grad_norm"][0] > 1.5 * late.step(late.state(STARTS - 1), batch)[1]["grad_norm"][0]


def test_accumulated_gradient_is_the_mean_over_micro_batches(state, batch):
    """First with two equal micro-batches, then with different ones."""
    split = one_device_step(dataclasses.replace(CONFIG, accumulate=2))

    def gradient(step, first, second):
        # Neighbours go to different micro-batches.
        pairs = {key: np.stack([value[first], value[second]], 1) for key, value in batch.items()}
        both = {key: value.reshape(-1, *value.shape[2:]) for key, value in pairs.items()}
        new = jax.device_get(step(state, train.Frozen(), both))[0]
        assert new.step == 1
        return change(state, new, "params")

    left, right = slice(0, 4), slice(4, 8)
    same = gradient(split, left, left)
    assert_close(same, gradient(one_device_step(), left, left), 2e-4)
    other = gradient(split, right, right)
    assert largest(jax.tree.map(np.subtract, same, other)) > 1e-2
    mean = jax.tree.map(lambda a, b: (a + b) / 2, same, other)
    assert_close(gradient(split, left, right), mean, 2e-4)


def test_terms_that_are_means_over_images_do_not_see_the_parts(state, batch):
    """Gradients and metrics in float32; only rounding differs."""
    linear = dataclasses.replace(LOSSES, entropy_weight=0.0, adversarial_weight=0.0)
    whole_config = dataclasses.replace(CONFIG, losses=linear)
    assert whole_config.taken_by_part() == ()
    whole, metrics = jax.device_get(one_device_step(whole_config)(state, train.Frozen(), batch))
    for parts in (2, 4):
        config = dataclasses.replace(whole_config, accumulate=parts)
        new, others = jax.device_get(one_device_step(config)(state, train.Frozen(), batch))
        assert_close(change(state, new, "params"), change(state, whole, "params"), 2e-5)
        assert metrics.keys() == others.keys()
        for name, (total, count) in metrics.items():
            np.testing.assert_allclose(others[name], (total, count), rtol=2e-5, atol=1e-7, err_msg=name)


ENTROPY, STATISTICS = "entropy of the mean code", "batch statistics of the discriminator"
AVERAGES = "update of LeCam's running averages"


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({}, [ENTROPY, STATISTICS, AVERAGES]),
        ({"lecam_weight": 0.0}, [ENTROPY, STATISTICS]),
        ({"adversarial_weight": 0.0}, [ENTROPY]),
        ({"adversarial_weight": 0.0, "entropy_weight": 0.0}, []),
    ],
)
def test_terms_that_see_the_parts_are_named(changes, terms):
    losses = dataclasses.replace(LOSSES, **changes)
    config = dataclasses.replace(CONFIG, losses=losses, accumulate=2)
    assert list(config.taken_by_part()) == terms


STARTS = 12


class Late:
    """Adam, an alignment loss, and a discriminator of large weight that starts late: one program for several tests."""

    def __init__(self, state):
        teacher = DINOv2Config(width=24, num_layers=1, num_heads=2, image_size=28)
        config = dataclasses.replace(
            CONFIG,
            model=dataclasses.replace(MODEL, dist_head="layer3", num_classes=24),
            losses=dataclasses.replace(
                LOSSES,
                adversarial_weight=100 * LOSSES.adversarial_weight,
                discriminator_start=STARTS,
                alignment_weight=1.0,
                alignment_size=28,
            ),
            teacher=teacher,
        )
        adam = OptimizerConfig(learning_rate=3e-3)
        optimizers = train.Optimizers(Optimizer.make(adam, total_steps=100, batch_size=8), SGD)
        shapes = model.param_shapes(config.model)["encoder"]["head"]
        params = {**state.params, "encoder": {**state.params["encoder"], "head": drawn(shapes)}}
        self._state = state.replace(
            params=params, ema=params, opt_state=jax.jit(optimizers.generator.transformation.init)(params)
        )
        pixels = np.zeros((1, 28, 28, 3), np.float32)
        self._teacher = jax.eval_shape(DINOv2(teacher).init, jax.random.key(0), pixels)["params"]
        self._step = one_device_step(config, optimizers)

    def state(self, step):
        return self._state.replace(step=np.asarray(step, np.int32))

    def step(self, state, batch, seed=0):
        return jax.device_get(self._step(state, train.Frozen(teacher=drawn(self._teacher, seed)), batch))


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(0.2) * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def late(state):
    return Late(state)


@pytest.fixture(scope="module")
def trajectory(late, batch):
    """State and metrics of every step until the discriminator starts."""
    points = [(late.state(0), None)]
    for _ in range(STARTS):
        points.append(late.step(points[-1][0], batch))
    return points


def test_discriminator_start_holds_both_adversarial_terms_back(late, batch, trajectory):
    waiting, metrics = trajectory[-1]
    assert_close(waiting.disc_params, late.state(0).disc_params, 1e-9)
    assert metrics["disc/loss"][0] == 0
    started, metrics = late.step(waiting, batch)
    assert largest(change(waiting, started, "disc_params")) > 0 and metrics["disc/loss"][0] != 0


def test_adam_steps_lower_the_loss(trajectory):
    pixel = [metrics["pixel"][0] for _, metrics in trajectory[1:]]
    assert pixel[-1] < 0.8 * pixel[0]


def test_alignment_loss_reads_the_views_of_the_batch(late, batch):
    rng = np.random.default_rng(5)
    views = {name: rng.integers(0, 256, (len(batch["image"]), 28, 28, 3), np.uint8) for name in train.VIEWS}
    alignment = [late.step(late.state(0), batch | views)[1]["alignment"][0]]
    for name in train.VIEWS:
        _, metrics = late.step(late.state(0), batch | views | {name: views[name][:, ::-1]})
        alignment.append(metrics["alignment"][0])
    assert len({round(float(value), 6) for value in alignment}) == 3


def test_alignment_loss_moves_the_head_and_reads_the_teacher(late, batch, trajectory):
    state, metrics = trajectory[1]
    assert np.isfinite(metrics["alignment"][0]) and metrics["alignment"][0] > 0
    head = lambda state: state.params["encoder"]["head"]["out"]["kernel"]  # noqa: E731
    assert np.abs(head(state) - head(late.state(0))).max() > 0
    _, other = late.step(late.state(0), batch, seed=1)
    assert abs(other["alignment"][0] / metrics["alignment"][0] - 1) > 1e-3


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(state, batch):
    broken = state.replace(params=jax.tree.map(lambda x: x, state.params))
    broken.params["decoder"]["conv_out"]["bias"] = np.full(3, np.nan, np.float32)
    new, metrics = one_device_step()(broken, train.Frozen(), batch)
    assert metrics["nonfinite"] == (1.0, 1.0) and int(new.step) == int(state.step) + 1
    assert metrics["loss"] == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, new.replace(step=broken.step), broken)


def test_config_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="dist_head is None"):
        dataclasses.replace(CONFIG, losses=dataclasses.replace(LOSSES, alignment_weight=1.0))
    with pytest.raises(ValueError, match=r"model\.recovery is None"):
        dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, recovery=None))
    with pytest.raises(ValueError, match="needs a teacher"):
        train.StepConfig(model=PRESETS["gr-d64"], losses=train.LossConfig(alignment_weight=1.0))
