"""Rectified flow: noise levels for sampling, and times, noisy examples and targets for training.

Time t is in [0, 1]: 0 is the data, 1 is noise, and a path between them is a straight line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from runtime_jax.config import to_dict
from tokenverse_jax.flux import config_json


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How noise levels are spaced, under the names and with the defaults of diffusers' scheduler_config.json."""

    shift: float = 1.0
    use_dynamic_shifting: bool = False  # larger images spend more of the steps at high noise; `shift` is not used
    base_shift: float = 0.5  # log-shift at base_image_seq_len image tokens, linear in their number
    max_shift: float = 1.15  # and at max_image_seq_len
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}: a positive number is needed")
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {self.max_image_seq_len}")


PRESETS = MappingProxyType(
    {"dev": ScheduleConfig(shift=3.0, use_dynamic_shifting=True), "schnell": ScheduleConfig(shift=1.0)}
)
_FIXED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def parse_config(fields: Mapping[str, Any]) -> ScheduleConfig:
    """The config in diffusers' scheduler_config.json; ConfigError where it is another kind or does not build."""
    return config_json.parse(ScheduleConfig, fields, "scheduler/scheduler_config.json", fixed=_FIXED, unused=())


def config_fields(config: ScheduleConfig) -> dict[str, Any]:
    """The content of diffusers' scheduler/scheduler_config.json."""
    return _FIXED | to_dict(config)


def sigmas(config: ScheduleConfig, num_steps: int, image_tokens: int) -> Float[np.ndarray, "steps_and_end"]:
    """Times [num_steps + 1] from 1 down to 0 of a sampler's `num_steps` >= 1 steps, exactly diffusers' numbers."""
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, at least 1 is needed")
    even = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        factor = math.exp(image_tokens * slope + (config.base_shift - slope * config.base_image_seq_len))
        shifted = factor / (factor + (1 / even - 1))
    else:
        shifted = config.shift * even / (1 + (config.shift - 1) * even)
    return np.append(shifted, np.float32(0))


def logit_normal_times(keys: Key[Array, "B"], mean: float = 0.0, std: float = 1.0) -> Float[Array, "B"]:
    """Times for training, the sigmoid of a normal variable, one for each example's key (arXiv 2403.03206, sec. 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys))


def flow(
    clean: Float[Array, "B N D"], noise: Float[Array, "B N D"], times: Float[Array, "B"]
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """A model's input and target: (1 - t) clean + t noise, and the velocity there, noise - clean."""
    t = times[:, None, None]
    return (1 - t) * clean + t * noise, noise - clean
