"""Noise levels bit for bit, and what training draws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime_jax.config import ConfigError
from runtime_jax.prng import example_keys
from runtime_jax.weights import read_safetensors
from tokenverse_jax.flux import schedule
from tokenverse_jax.flux.schedule import PRESETS, ScheduleConfig

# The file of FLUX.1-dev.
DEV_JSON = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def test_sigmas_are_those_of_diffusers(goldens):
    tensors, metadata = read_safetensors(goldens / "flow_schedule.safetensors")
    shifts = json.loads(metadata["config"])
    assert len(tensors) == 6
    for name, expected in tensors.items():
        _, preset, steps, tokens = name.split("_")
        config = PRESETS[preset]
        assert (config.base_shift, config.max_shift) == (shifts["base_shift"], shifts["max_shift"])
        got = schedule.sigmas(config, int(steps), int(tokens))
        assert got.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


def test_constant_shift():
    got = schedule.sigmas(ScheduleConfig(shift=3.0), 4, 10)
    np.testing.assert_allclose(got, [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(got, schedule.sigmas(ScheduleConfig(shift=3.0), 4, 5000))


@pytest.mark.parametrize("config", PRESETS.values())
def test_one_step(config):
    np.testing.assert_array_equal(schedule.sigmas(config, 1, 1024), [1, 0])


def test_no_steps():
    with pytest.raises(ValueError, match="num_steps: got 0, at least 1 is needed"):
        schedule.sigmas(PRESETS["dev"], 0, 1024)


def test_configs_of_diffusers():
    assert schedule.parse_config(DEV_JSON) == PRESETS["dev"]
    assert schedule.parse_config({}) == PRESETS["schnell"], "their defaults are ours"
    assert schedule.parse_config(schedule.config_fields(PRESETS["dev"])) == PRESETS["dev"]
    written = schedule.config_fields(PRESETS["dev"])
    assert {name: written.get(name) for name in DEV_JSON} == DEV_JSON | {"_diffusers_version": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name: got 'DDIMScheduler', only 'FlowMatchEulerDiscreteScheduler'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas: got True, only False is supported"),
        ({"shifts": 2.0}, "scheduler/scheduler_config.json.shifts: unknown key .* did you mean 'shift'"),
        ({"shift": 0.0}, "shift=0.0: a positive number is needed"),
        ({"max_image_seq_len": 256}, "are both 256"),
    ],
)
def test_configs_that_are_refused(changes, message):
    fields = {name: value for name, value in DEV_JSON.items() if name != "shift"} | changes
    with pytest.raises(ConfigError, match=message):
        schedule.parse_config(fields)


KEYS = example_keys(jax.random.key(0), np.arange(4000))


def test_logit_normal_times():
    times = np.asarray(schedule.logit_normal_times(KEYS, 0.5, 2.0))
    logits = np.log(times / (1 - times))
    assert abs(logits.mean() - 0.5) < 0.1 and abs(logits.std() - 2) < 0.1


def test_times_follow_the_example_not_the_batch():
    times = schedule.logit_normal_times
    np.testing.assert_array_equal(times(KEYS)[5:9], times(KEYS[5:9]))


def test_flow():
    clean, noise = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    times = np.array([0, 0.25, 1], np.float32)
    noisy, velocity = schedule.flow(*map(jnp.asarray, (clean, noise, times)))
    np.testing.assert_array_equal(noisy[0], clean[0])
    np.testing.assert_array_equal(noisy[2], noise[2])
    t = times[:, None, None]
    np.testing.assert_allclose(noisy - t * velocity, clean, atol=1e-6)
    np.testing.assert_allclose(noisy + (1 - t) * velocity, noise, atol=1e-6)
