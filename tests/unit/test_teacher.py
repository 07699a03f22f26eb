"""Self-distillation: targets, loss, what shows a collapse, colours, and configs that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq_jax.teacher import losses
from mergevq_jax.teacher.colour import ColourConfig, jitter
from mergevq_jax.teacher.run import TrainConfig
from runtime_jax.config import build, load, to_dict

SAME = ColourConfig(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grey=0.0)


def cosines(seed: int, *shape: int) -> jax.Array:
    return jnp.tanh(jax.random.normal(jax.random.key(seed), shape))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_targets_are_distributions_that_share_the_prototypes(seed):
    p = losses.targets(cosines(seed, 2, 24, 6), 0.1, rounds=20)
    np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(p.mean(axis=(0, 1)), 1 / 6, rtol=0.05)


def test_the_loss_compares_different_views_only():
    """By hand for two whole views and a part: the target of view 0 goes with views 1 and 2, and so on."""
    student, goal = cosines(0, 3, 5, 4), losses.targets(cosines(1, 2, 5, 4), 0.05)
    log_student = np.asarray(jax.nn.log_softmax(student / 0.1, axis=-1))
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    expected = np.mean([-(np.asarray(goal[g]) * log_student[v]).sum(axis=-1).mean() for g, v in pairs])
    np.testing.assert_allclose(losses.distillation(student, goal, 0.1), expected, rtol=1e-5)


def test_no_gradient_reaches_the_teacher():
    def loss(teacher):
        return losses.distillation(cosines(0, 3, 5, 4), losses.targets(teacher, 0.05), 0.1)

    assert not np.asarray(jax.grad(loss)(cosines(1, 2, 5, 4))).any()


def test_a_collapse_shows_in_the_entropies():
    one = jnp.broadcast_to(cosines(0, 1, 1, 8), (2, 16, 8))
    collapsed, uniform, spread = (losses.spread(x, 0.05) for x in (one, 0 * one, cosines(0, 2, 16, 8)))
    for found in (collapsed, uniform):
        np.testing.assert_allclose(found.entropy, found.entropy_of_mean, atol=1e-5)
    np.testing.assert_allclose(uniform.entropy, np.log(8), rtol=1e-5)
    assert spread.entropy_of_mean > spread.entropy + 0.5


def images(count: int = 3) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (count, 4, 4, 3), minval=-1.0, maxval=1.0)


def test_colours_change_by_the_key_of_the_image_alone():
    keys = jax.random.split(jax.random.key(1), 3)
    config = ColourConfig(hue=0.5, probability=1.0)
    whole = jitter(images(), keys, config)
    assert np.abs(whole - images()).max() > 0.1 and np.abs(whole).max() <= 1.0
    np.testing.assert_allclose(jitter(images()[1:2], keys[1:2], config), whole[1:2], atol=1e-6)
    np.testing.assert_allclose(jitter(images(), keys, SAME), images(), atol=1e-5)
    never = dataclasses.replace(config, probability=0.0, grey=0.0)
    np.testing.assert_allclose(jitter(images(), keys, never), images(), atol=1e-5)


def test_grey_images_keep_their_brightness():
    grey = jitter(images(), jax.random.split(jax.random.key(1), 3), dataclasses.replace(SAME, grey=1.0))
    np.testing.assert_allclose(grey[..., 0], grey[..., 2], atol=1e-5)
    luminance = jnp.einsum("bhwc,c->bhw", images(), jnp.array([0.299, 0.587, 0.114]))
    np.testing.assert_allclose(grey[..., 1], luminance, atol=1e-5)


@pytest.mark.parametrize("arg", ["full", "demo"])
def test_the_shipped_config_builds(arg):
    config = build(TrainConfig, load(f"configs/mergevq_teacher.py:{arg}"))
    assert config.whole_views == ("image", "whole_1") and len(config.step_config().parts) == 4
    assert {source.split for source in config.data.sources} == {"train"}
    assert build(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=56"], "data.image_size=56 must be model.image_size=64"),
        (["model.patch_size=7"], "image_size=64 must be a multiple of patch_size=7"),
        (["model.num_heads=5"], "width=64 of num_heads=5"),
        (["data.views=()"], "at least one more view of 64 pixels"),
        (["data.views=({'name': 'a', 'image_size': 64}, {'name': 'b', 'image_size': 30})"], "sizes \\[30\\]; views"),
        (["data.views=({'name': 'a', 'image_size': 64}, {'name': 'b', 'image_size': 96})"], "sizes \\[96\\]; views"),
        (["losses.teacher_temperature=0.2"], "0 < teacher_temperature < student_temperature"),
        (["colour.hue=0.6"], "hue is 0 to 0.5"),
        (["model.layer_scale=False"], "DINOv2 has layer_scale=True and layer_norm_epsilon=1e-06"),
        (["head.prototypes=0"], "sizes are at least 1"),
        (["ema_decay=1.0"], "ema_decay=1.0 is in"),
    ],
)
def test_configs_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(TrainConfig, load("configs/mergevq_teacher.py", overrides, new_keys=True))
