"""The stage-1 train step: its value on every mesh, its two gradients, accumulation, and what it does with NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mergevq_jax.tokenizer import model, train
from mergevq_jax.tokenizer.config import PRESETS, RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.dinov2 import DINOv2, DINOv2Config
from mergevq_jax.tokenizer.run import Program
from runtime_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from runtime_jax.sharding import MeshConfig, make_mesh, shard_batch

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
    recovery=RecoveryConfig(rec_embed_dim=32, num_layers=1, num_heads=8),
)
LOSSES = train.LossConfig(perceptual_weight=0.0, entropy_temperature=0.5)
CONFIG = train.StepConfig(model=MODEL, losses=LOSSES, discriminator=train.DiscriminatorConfig(ndf=8, num_layers=2))
# With this one the change of a parameter is its gradient.
PLAIN = train.Optimizers(optax.sgd(1.0), optax.sgd(1.0), lambda step: jnp.ones(()))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 255, (8, 8, 8, 3)), np.ones((1, 2, 2, 1))).astype(np.uint8)
    return {"image": images, "label": np.zeros(8, np.int32), "index": np.arange(8)}


@pytest.fixture(scope="module")
def state():
    """Initialised, with norms, biases and running statistics away from their neutral values."""
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


def assert_close(got, expected, tolerance):
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = functools.reduce(
            lambda tree, key: tree[key.key] if hasattr(key, "key") else getattr(tree, key.name), path, got
        )
        scale = np.abs(leaf).max() + 1e-3
        assert np.abs(np.asarray(other) - leaf).max() / scale < tolerance, jax.tree_util.keystr(path)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_a_step_on_any_mesh_is_the_step_of_one_device(shape, state, batch, reference):
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    with jax.set_mesh(mesh):
        program = Program(CONFIG, PLAIN, mesh, train.Frozen())
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
        np.testing.assert_allclose(
            metrics[name][0] / metrics[name][1], total / count, rtol=2e-4, atol=1e-5, err_msg=name
        )


def test_parameters_are_really_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        specs = Program(CONFIG, PLAIN, mesh, train.Frozen()).abstract_state.params
    qkv = specs["encoder"]["attn"]["blocks_0"]["attn"]["qkv"]["kernel"].sharding.spec
    assert tuple(qkv) == ("fsdp", "tensor")


def test_each_side_takes_only_its_own_gradient(state, batch):
    """The discriminator's loss does not move the generator, nor the generator's the discriminator.

    Gradients are differences of parameters here, so they carry the rounding of parameters of order 1.
    """

    def gradient(losses):
        config = dataclasses.replace(CONFIG, losses=losses)
        new, _ = one_device_step(config)(state, train.Frozen(), batch)
        change = lambda name: jax.tree.map(lambda a, b: a - b, getattr(state, name), getattr(new, name))  # noqa: E731
        return change("params"), change("disc_params")

    base = dataclasses.replace(LOSSES, lecam_weight=0.0, source_weight=0.0)
    hinge = gradient(dataclasses.replace(base, discriminator="hinge"))
    vanilla = gradient(dataclasses.replace(base, discriminator="vanilla"))
    assert_close(vanilla[0], jax.device_get(hinge[0]), 2e-4)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, hinge[1], vanilla[1])) > 1e-3
    louder = gradient(dataclasses.replace(base, discriminator="vanilla", adversarial_weight=10.0))
    assert_close(louder[1], jax.device_get(vanilla[1]), 2e-4)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, vanilla[0], louder[0])) > 1e-3


def test_accumulated_gradient_is_the_mean_over_micro_batches(state, batch):
    # What is not a mean over images (entropy, batch statistics) is left out.
    losses = dataclasses.replace(LOSSES, adversarial_weight=0.0, entropy_weight=0.0, source_weight=0.0)
    whole = dataclasses.replace(CONFIG, losses=losses)
    split = dataclasses.replace(whole, accumulate=2)
    expected, _ = one_device_step(whole)(state, train.Frozen(), batch)
    got, _ = one_device_step(split)(state, train.Frozen(), batch)
    assert_close(got.params, jax.device_get(expected.params), 1e-5)
    assert int(got.step) == 1


def test_discriminator_start_holds_both_adversarial_terms_back(state, batch):
    config = dataclasses.replace(CONFIG, losses=dataclasses.replace(LOSSES, discriminator_start=5))
    waiting, metrics = one_device_step(config)(state, train.Frozen(), batch)
    assert_close(waiting.disc_params, state.disc_params, 1e-9)
    assert metrics["disc/loss"][0] == 0
    started, _ = one_device_step(config)(state.replace(step=np.asarray(5, np.int32)), train.Frozen(), batch)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, started.disc_params, state.disc_params)) > 0


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(state, batch):
    broken = state.replace(params=jax.tree.map(lambda x: x, state.params))
    broken.params["decoder"]["conv_out"]["bias"] = np.full(3, np.nan, np.float32)
    new, metrics = one_device_step()(broken, train.Frozen(), batch)
    assert metrics["nonfinite"] == (1.0, 1.0) and int(new.step) == int(state.step) + 1
    assert metrics["loss"] == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, new.replace(step=broken.step), broken)


def test_adam_step_lowers_the_loss(state, batch):
    config = OptimizerConfig(learning_rate=3e-3)
    schedule = make_schedule(config, total_steps=100, batch_size=8, num_examples=None)
    optimizers = train.Optimizers(make_optimizer(config, schedule), make_optimizer(config, schedule), schedule)
    state = state.replace(
        opt_state=optimizers.generator.init(state.params),
        disc_opt_state=optimizers.discriminator.init(state.disc_params),
    )
    step, losses = one_device_step(optimizers=optimizers), []
    for _ in range(12):
        state, metrics = step(state, train.Frozen(), batch)
        losses.append(float(metrics["pixel"][0]))
    assert losses[-1] < 0.8 * losses[0]


def test_alignment_loss_moves_the_head_and_reads_the_teacher(batch):
    teacher = DINOv2Config(width=24, num_layers=1, num_heads=2, image_size=28)
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, dist_head="layer3", num_classes=24),
        losses=dataclasses.replace(LOSSES, adversarial_weight=0.0, alignment_weight=1.0, alignment_size=28),
        teacher=teacher,
    )
    state = jax.jit(functools.partial(train.init_state, config, PLAIN))()
    params = DINOv2(teacher).init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    new, metrics = one_device_step(config)(state, train.Frozen(teacher=params), batch)
    assert np.isfinite(metrics["alignment"][0]) and metrics["alignment"][0] > 0
    head = lambda state: state.params["encoder"]["head"]["out"]["kernel"]  # noqa: E731
    assert np.abs(head(new) - head(state)).max() > 0


def test_config_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="dist_head is None"):
        dataclasses.replace(CONFIG, losses=dataclasses.replace(LOSSES, alignment_weight=1.0))
    with pytest.raises(ValueError, match=r"model\.recovery is None"):
        dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, recovery=None))
    with pytest.raises(ValueError, match="needs a teacher"):
        train.StepConfig(model=PRESETS["gr-d64"], losses=train.LossConfig(alignment_weight=1.0))
    assert model.param_shapes(MODEL)["encoder"]["conv_out"]["kernel"].shape == (64, 8)
