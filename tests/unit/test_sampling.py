"""Euler steps against a plain loop, noise that no layout changes, guidance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime_jax.mesh import MeshConfig, make_mesh
from tokenverse_jax.flux import sampling, schedule

SIGMAS = schedule.sigmas(schedule.PRESETS["dev"], 7, 300)
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 4)), jnp.float32)


def field(x, times):
    """A velocity that depends on everything."""
    return jnp.sin(3 * x) + x.mean(axis=(1, 2), keepdims=True) * times[:, None, None]


@jax.jit
def sample(noise):
    return sampling.euler(field, noise, SIGMAS)[0]


def test_euler_equals_a_loop():
    x = np.asarray(NOISE, np.float64)
    for now, after in itertools.pairwise(SIGMAS):
        x += (float(after) - float(now)) * (np.sin(3 * x) + x.mean(axis=(1, 2), keepdims=True) * float(now))
    np.testing.assert_allclose(sample(NOISE), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_straight_paths_end_at_the_data(num_steps):
    clean = NOISE[::-1]
    sigmas = schedule.sigmas(schedule.PRESETS["dev"], num_steps, 300)
    np.testing.assert_allclose(sampling.euler(lambda x, t: NOISE - clean, NOISE, sigmas)[0], clean, atol=2e-6)


def test_one_scan_traces_the_model_once():
    calls = []

    def velocity(x, times):
        calls.append(times.shape)
        return field(x, times)

    jaxpr = jax.make_jaxpr(lambda noise: sampling.euler(velocity, noise, SIGMAS))(NOISE)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert calls == [(8,)]
    assert [scan.params["length"] for scan in scans] == [7]


def test_samples_stay_in_float32():
    got = sampling.euler(lambda x, t: field(x, t).astype(jnp.bfloat16), NOISE, SIGMAS)[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, sample(NOISE), atol=0.02)
    assert np.abs(got - sample(NOISE)).max() > 0


def draw(examples):
    return sampling.initial_noise(jax.random.key(3), examples, (5, 4))


def test_noise_is_standard_normal():
    noise = np.asarray(sampling.initial_noise(jax.random.key(3), np.arange(100), (20, 16)))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_noise_follows_the_example_not_the_batch():
    whole = draw(np.arange(8))
    np.testing.assert_array_equal(whole[3:5], draw(np.array([3, 4])))
    np.testing.assert_array_equal(whole[::-1], draw(np.arange(8)[::-1]))
    assert np.abs(whole[0] - whole[1]).max() > 0.1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_images_do_not_depend_on_the_mesh(sizes):
    generate = jax.jit(lambda examples: (draw(examples), sampling.euler(field, draw(examples), SIGMAS)[0]))
    noise, image = generate(np.arange(8))
    with jax.set_mesh(make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))):
        sharded_noise, sharded_image = generate(np.arange(8))
    assert len(sharded_image.sharding.device_set) == 8 and not sharded_image.is_fully_replicated
    np.testing.assert_array_equal(sharded_noise, noise)
    np.testing.assert_allclose(sharded_image, image, atol=1e-6)


def test_guidance():
    x, times = NOISE, jnp.full(8, 0.5)
    negative = lambda x, times: x * times[:, None, None]  # noqa: E731
    for scale in (0.0, 1.0, 3.5):
        guided = sampling.with_cfg(field, negative, scale)(x, times)
        expected = (1 - scale) * negative(x, times) + scale * field(x, times)
        np.testing.assert_allclose(guided, expected, atol=1e-5)
