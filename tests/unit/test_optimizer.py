"""Schedules, weight decay, clipping and the moving average, against numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runtime_jax.config import Duration, build, to_dict
from runtime_jax.training.optimizer import OptimizerConfig, constant_unless, ema_update, make_optimizer, make_schedule

RUN = {"total_steps": 100, "batch_size": 10, "num_examples": 50}  # 5 steps an epoch


def rates(config, **run):
    schedule = make_schedule(config, **(RUN | run))
    return np.array([float(schedule(step)) for step in range((RUN | run)["total_steps"])])


def test_constant():
    np.testing.assert_allclose(rates(OptimizerConfig(learning_rate=3e-4)), 3e-4)


@pytest.mark.parametrize("warmup", [Duration(steps=4), Duration(examples=40), Duration(epochs=0.8)])
def test_warmup_is_linear_and_not_0_at_the_first_update(warmup):
    found = rates(OptimizerConfig(learning_rate=1.0, warmup=warmup))
    np.testing.assert_allclose(found[:6], [0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine_goes_from_the_end_of_the_warmup_to_the_end_of_the_run():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup=Duration(steps=20), final_fraction=0.1)
    found = rates(config)
    after = np.arange(80) / 80
    np.testing.assert_allclose(found[20:], 2 * (0.1 + 0.9 * (1 + np.cos(np.pi * after)) / 2), rtol=1e-5)
    np.testing.assert_allclose(found[:20], 2 * np.arange(1, 21) / 20, rtol=1e-6)
    assert float(make_schedule(config, **RUN)(100)) == pytest.approx(0.2)
    assert (np.diff(found[20:]) < 0).all()


@pytest.mark.parametrize("warmup", [0, 5])
def test_drops_are_counted_from_the_start_of_the_run(warmup):
    config = OptimizerConfig(
        learning_rate=1.0,
        schedule="steps",
        warmup=Duration(steps=warmup),
        drops=(Duration(epochs=4.0), Duration(epochs=12.5)),
    )
    found = rates(config)
    np.testing.assert_allclose(found[warmup:20], 1.0)  # 4 epochs are 20 updates: numbers 0 to 19
    np.testing.assert_allclose(found[20:63], 0.1, rtol=1e-6)
    np.testing.assert_allclose(found[63:], 0.01, rtol=1e-6)


def test_the_papers_drops():
    """G+R: 200 epochs of ImageNet in batches of 256, drops of x0.1 at 170 and 190."""
    config = OptimizerConfig(schedule="steps", drops=(Duration(epochs=170.0), Duration(epochs=190.0)))
    schedule = make_schedule(config, total_steps=200 * 5005, batch_size=256, num_examples=1_281_167)
    per_epoch = 1_281_167 / 256
    for epoch, rate in ((0, 1e-4), (169.99, 1e-4), (170.01, 1e-5), (189.99, 1e-5), (190.01, 1e-6), (199, 1e-6)):
        assert float(schedule(int(epoch * per_epoch))) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": Duration(steps=100)}, "optimizer.warmup: 100 steps, but the run has 100"),
        (
            {"schedule": "steps", "drops": (Duration(steps=5),), "warmup": Duration(steps=5)},
            "optimizer.drops: a drop lies before the end of the warm-up",
        ),
        (
            {"schedule": "steps", "drops": (Duration(steps=5), Duration(epochs=1.0))},
            r"optimizer.drops: two at one step, \[5, 5\]",
        ),
    ],
)
def test_schedules_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(OptimizerConfig(**fields), **RUN)


def test_epochs_of_unknown_length():
    with pytest.raises(ValueError, match=r"epochs=3.0.*number of examples is not known"):
        make_schedule(OptimizerConfig(warmup=Duration(epochs=3.0)), total_steps=100, batch_size=10, num_examples=None)


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "steps"},
        {"drops": (Duration(steps=3),)},
        {"learning_rate": 0.0},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
    ],
)
def test_configs_that_cannot_be(fields):
    with pytest.raises(ValueError, match="optimizer: "):
        OptimizerConfig(**fields)


def test_config_round_trip():
    config = OptimizerConfig(schedule="steps", drops=(Duration(epochs=170.0), Duration(steps=9)), clip_norm=5.0)
    assert build(OptimizerConfig, to_dict(config)) == config


# Updates.

PARAMS = {
    "dense": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)},
    "blocks": {  # stacked by a scan: one more axis in front
        "qkv": {"kernel": jnp.full((4, 2, 3), 2.0), "bias": jnp.full((4, 3), 2.0)},
        "norm": {"scale": jnp.full((4, 3), 2.0), "bias": jnp.full((4, 3), 2.0)},
        "ls1": {"gamma": jnp.full((4, 3), 2.0)},
    },
    "cls_token": jnp.full((1, 1, 3), 2.0),
    "kernel_size": jnp.full((2, 2), 2.0),
}


def updates(config, gradients, params=PARAMS, steps=1):
    """Parameters' changes in the last of `steps` updates."""
    optimizer = make_optimizer(config, make_schedule(config, **RUN))
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for _ in range(steps):
        change, state = step(gradients, state, params)
        params = optax.apply_updates(params, change)
    return change


def test_weight_decay_is_decoupled_and_of_kernels_only():
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    change = updates(config, jax.tree.map(jnp.zeros_like, PARAMS))
    for path, leaf in jax.tree_util.tree_leaves_with_path(change):
        is_kernel = jax.tree_util.keystr(path).endswith("['kernel']")
        np.testing.assert_allclose(leaf, -0.5 * 0.1 * 2.0 if is_kernel else 0.0, err_msg=jax.tree_util.keystr(path))


def test_adam():
    config = OptimizerConfig(learning_rate=0.01, b1=0.5, b2=0.9, eps=1e-8)
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(config, make_schedule(config, **RUN))
    params = {"x": jnp.zeros(5)}
    state, first, second = optimizer.init(params), np.zeros(5), np.zeros(5)
    for step in range(1, 5):
        gradient = rng.normal(size=5)
        change, state = optimizer.update({"x": jnp.asarray(gradient, jnp.float32)}, state, params)
        first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
        expected = -0.01 * (first / (1 - 0.5**step)) / (np.sqrt(second / (1 - 0.9**step)) + 1e-8)
        np.testing.assert_allclose(change["x"], expected, rtol=1e-4)


def test_the_learning_rate_follows_the_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup=Duration(steps=4))
    gradients = {"x": jnp.ones(2)}
    for steps, rate in ((1, 0.25), (3, 0.75), (6, 1.0)):
        np.testing.assert_allclose(updates(config, gradients, {"x": jnp.zeros(2)}, steps)["x"], -rate, rtol=1e-5)


def test_clipping_is_by_the_global_norm_before_adam():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # norm 5
    config = {"learning_rate": 1.0, "eps": 1.0, "b1": 0.0, "b2": 0.0}  # the change is -g / (|g| + 1)
    clipped = updates(OptimizerConfig(**config, clip_norm=1.0), gradients, params)
    np.testing.assert_allclose(clipped["a"], [-0.6 / 1.6, 0], rtol=1e-5)
    np.testing.assert_allclose(clipped["b"], -0.8 / 1.8, rtol=1e-5)
    for clip in (None, 5.1):
        free = updates(OptimizerConfig(**config, clip_norm=clip), gradients, params)
        np.testing.assert_allclose(free["b"], -4 / 5, rtol=1e-5)


def test_muon_takes_kernels_as_matrices_and_adam_the_rest():
    shapes = {
        "conv": {"kernel": (3, 3, 8, 16), "bias": (16,)},
        "blocks": {"fc": {"kernel": (2, 24, 16)}, "dwconv": {"kernel": (2, 3, 3, 1, 8)}},
        "conv_out": {"kernel": (3, 3, 16, 3)},
    }
    rng = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    gradients = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=is_shape)
    params = jax.tree.map(jnp.zeros_like, gradients)
    both = OptimizerConfig(learning_rate=0.1, muon_learning_rate=0.4, adam_kernels=("conv_out",))
    change = updates(both, gradients, params)
    matrices = [change["conv"]["kernel"].reshape(72, 16), *change["blocks"]["fc"]["kernel"]]
    for matrix in matrices:  # Newton-Schulz takes singular values near 1, wherever they were
        values = np.linalg.svd(np.asarray(matrix) / 0.4, compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3
    nadam = optax.nadam(0.1)
    adam, _ = nadam.update(gradients, nadam.init(params))
    for path in (("conv", "bias"), ("blocks", "dwconv"), ("conv_out", "kernel")):
        ours, theirs = (tree[path[0]][path[1]] for tree in (change, adam))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_muon_follows_the_schedule():
    config = OptimizerConfig(learning_rate=0.1, muon_learning_rate=0.4, warmup=Duration(steps=4))
    gradients, params = {"kernel": jnp.eye(4)}, {"kernel": jnp.zeros((4, 4))}
    first, fifth = (np.abs(updates(config, gradients, params, steps)["kernel"]).max() for steps in (1, 5))
    np.testing.assert_allclose(first / fifth, 0.25, rtol=0.05)


@pytest.mark.parametrize("fields", [{"adam_kernels": ("x",)}, {"muon_learning_rate": -1.0}])
def test_muon_errors(fields):
    with pytest.raises(ValueError, match=r"optimizer\.(adam_kernels|muon_learning_rate)="):
        OptimizerConfig(**fields)


def test_only_some_parameters_are_trained():
    """The others keep their values under weight decay and clipping, have no moments, and no gradient is computed."""
    params = {"head": {"kernel": jnp.full((2, 2), 2.0)}, "body": {"kernel": jnp.ones((2, 2))}}
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=1.0, only=("^head/",))
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))

    def loss(params):
        params = constant_unless(params, config.only)
        return jnp.sum(params["head"]["kernel"] * params["body"]["kernel"])

    gradients, state = jax.grad(loss)(params), optimizer.init(params)
    assert not np.any(gradients["body"]["kernel"]) and np.all(gradients["head"]["kernel"])
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 12
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not np.any(updates["body"]["kernel"]) and np.all(updates["head"]["kernel"])
    with pytest.raises(ValueError, match=r"optimizer\.only: '\^tail' matches no parameter; there are body/kernel"):
        make_optimizer(dataclasses.replace(config, only=("^head/", "^tail")), optax.constant_schedule(0.1)).init(params)


def test_moving_average_warms_up():
    average = {"x": jnp.zeros(2)}
    expected = 0.0
    for step in range(40):
        average = ema_update(average, {"x": jnp.full(2, step + 1.0)}, jnp.asarray(step), 0.6)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
        np.testing.assert_allclose(average["x"], expected, rtol=1e-5)
    assert (1 + 12) / (10 + 12) < 0.6 < (1 + 13) / (10 + 13)  # both sides of the limit were passed


def test_moving_average_is_float32():
    average = ema_update({"x": jnp.ones(2)}, {"x": jnp.full(2, 2.0, jnp.bfloat16)}, jnp.asarray(10**6), 0.999)
    assert average["x"].dtype == jnp.float32
    np.testing.assert_allclose(average["x"], 1.001, rtol=1e-6)
