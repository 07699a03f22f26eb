"""How codes are drawn: the settings, and their static and dynamic parts for one generator.

Axes: B examples, L raster tokens, N codes that are drawn (L, or RandAR's K), S sub-tokens, C slots of the KV cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.sampling.draw import CfgSchedule, guidance_scales
from mergevq_jax.generator.sampling.position_cache import POLICIES, CachePolicy, token_slots
from runtime_jax.config import added
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import key_shape

WINDOW = 2  # the paper's figure 4


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn and which of them the KV cache keeps; a tuple has a value for each sub-token."""

    cfg_scale: float | tuple[float, ...] = 1.0  # 1 is no guidance
    cfg_schedule: CfgSchedule = "constant"
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # part of the sequence that "interval" guides
    cfg_power: float = added(1.0)  # of "power-cosine": the higher, the later guidance sets in
    temperature: float | tuple[float, ...] = 1.0
    top_k: int | tuple[int, ...] = 0  # 0: off
    top_p: float | tuple[float, ...] = 1.0  # 1: off
    greedy: bool = False  # the likeliest value, whatever temperature, top_k and top_p say
    window: int | None = None  # recent tokens that are always seen; None: 2, or L without a merge instruction
    capacity: int | None = None  # older first occurrences that are kept; None: K, or L without a merge instruction
    policy: str = "evict-oldest"  # of `POLICIES`: which older token is evicted when there are more


@dataclass(frozen=True, kw_only=True)
class DrawPlan:
    """The static part of any sampler."""

    config: GeneratorConfig
    compute: Compute
    rows: int  # of the network for each example: 2 under guidance
    greedy: bool
    top_k: tuple[int, ...]
    nucleus: tuple[bool, ...]  # which sub-tokens have a top_p below 1


@dataclass(frozen=True, kw_only=True)
class Plan(DrawPlan):
    """The static part of the sampler in raster order."""

    window: int
    capacity: int
    policy: CachePolicy

    @property
    def slots(self) -> int:
        """C."""
        config = self.config
        return config.prefix + token_slots(config.length, window=self.window, capacity=self.capacity)


class Knobs(NamedTuple):
    """The dynamic part of a sampler: it may change without compiling again."""

    scales: Float[Array, "N S"] | Float[np.ndarray, "N S"]
    temperature: Float[Array, "S"] | Float[np.ndarray, "S"]
    top_p: Float[Array, "S"] | Float[np.ndarray, "S"]


# Name, text of what is allowed, and whether a value is allowed for a sub-token's vocabulary.
_PER_SUB_TOKEN: tuple[tuple[str, str, Callable[[Any, int], bool]], ...] = (
    ("cfg_scale", "finite numbers from 0", lambda scale, _: 0 <= scale < np.inf),
    ("temperature", "positive numbers", lambda temperature, _: 0 < temperature < np.inf),
    ("top_k", "0 (off) to the sub-tokens' vocabularies {}", lambda top_k, size: 0 <= top_k <= size),
    ("top_p", "above 0, up to 1 (off)", lambda top_p, _: 0 < top_p <= 1),
)


def make_plan(
    config: GeneratorConfig, sampling: SamplingConfig, keep: int | None, compute: Compute
) -> tuple[Plan, Knobs]:
    """The static and the dynamic part of the sampler in raster order.

    Raises:
      ValueError: lists all settings that this generator cannot sample with.
    """
    config.merge_index(keep)
    length = config.length
    window = (WINDOW if config.merge_instruction else length) if sampling.window is None else sampling.window
    capacity = (keep or length) if sampling.capacity is None else sampling.capacity
    problems = []
    if not 1 <= window <= capacity <= length:
        problems.append(f"window={window}, capacity={capacity}: needed is 1 <= window <= capacity <= {length} (tokens)")
    if config.position_instruction:
        problems.append("this generator draws codes in random order (position_instruction), not in raster order")
    draws, knobs = draw_plan(config, sampling, compute, length, problems)
    return Plan(**draws, window=window, capacity=capacity, policy=POLICIES[sampling.policy]), knobs


def draw_plan(
    config: GeneratorConfig, sampling: SamplingConfig, compute: Compute, length: int, problems: Sequence[str]
) -> tuple[dict[str, Any], Knobs]:
    """The fields of `DrawPlan`, and the dynamic part for a sequence of `length` codes.

    Raises:
      ValueError: lists all settings that this generator cannot sample with, and the caller's `problems`.
    """
    values, found = _settings(config, sampling)
    is_guided = any(scale != 1 for scale in values["cfg_scale"])
    if is_guided and config.null_class is None:
        found.append(f"cfg_scale={sampling.cfg_scale}: this generator has no null class (class_dropout is 0)")
    if found or problems:
        raise ValueError("sampling: " + "; ".join([*found, *problems]))
    draws = {
        "config": config,
        "compute": compute,
        "rows": 1 + is_guided,
        "greedy": sampling.greedy,
        "top_k": values["top_k"],
        "nucleus": tuple(top_p < 1 for top_p in values["top_p"]),
    }
    knobs = Knobs(
        scales=guidance_scales(
            values["cfg_scale"], length, sampling.cfg_schedule, sampling.cfg_interval, sampling.cfg_power
        ),
        temperature=np.asarray(values["temperature"], np.float32),
        top_p=np.asarray(values["top_p"], np.float32),
    )
    return draws, knobs


def checked_request(
    labels: Int[Array, "_"] | Int[np.ndarray, "_"],
    examples: Int[Array, "_"] | Int[np.ndarray, "_"] | None,
    keep: int | None,
    config: GeneratorConfig,
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"], Int[np.ndarray, "B"] | None]:
    """Labels, numbers of the examples (None: 0 to B - 1) and merge instructions, checked.

    Raises:
      ValueError: no labels, or unknown ones; not one number for each example; a K as in
        `GeneratorConfig.merge_index`.
    """
    labels = np.asarray(labels)
    limit = config.num_classes + (config.null_class is not None)
    if not labels.size or labels.min() < 0 or labels.max() >= limit:
        null = "" if config.null_class is None else f", or the null class {config.null_class}"
        raise ValueError(f"labels {labels.tolist()}: classes are 0 to {config.num_classes - 1}{null}; at least one")
    examples = np.arange(len(labels), dtype=np.int32) if examples is None else np.asarray(examples)
    if examples.shape != labels.shape:
        raise ValueError(f"{len(examples)} example numbers for {len(labels)} labels")
    merge = config.merge_index(keep)
    return labels, examples, None if merge is None else np.full(labels.shape, merge, np.int32)


def abstract_request(batch_size: int, config: GeneratorConfig) -> tuple[Any, Any, Any]:
    """Shapes of labels (or examples), merge instructions and the key of a request."""
    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return numbers, numbers if config.merge_instruction else None, key_shape()


def _settings(config: GeneratorConfig, sampling: SamplingConfig) -> tuple[dict[str, tuple], list[str]]:
    """The settings by sub-token, one value for each; and what is wrong with any setting."""
    values, problems = {}, []
    for name, allowed, fits in _PER_SUB_TOKEN:
        given, parts = getattr(sampling, name), len(config.vocab_sizes)
        values[name] = given if isinstance(given, tuple) else (given,) * parts
        if len(values[name]) != parts:
            problems.append(f"{name}={given}: one value, or one for each of {parts} sub-tokens")
        elif not all(map(fits, values[name], config.vocab_sizes)):
            problems.append(f"{name}={given}: {allowed.format(config.vocab_sizes)}")
    for name, choices in (("cfg_schedule", get_args(CfgSchedule)), ("policy", tuple(POLICIES))):
        if getattr(sampling, name) not in choices:
            problems.append(f"{name}={getattr(sampling, name)!r}: allowed are {', '.join(choices)}")
    if sampling.cfg_schedule != "interval" and tuple(sampling.cfg_interval) != (0.0, 1.0):
        problems.append(f"cfg_interval={sampling.cfg_interval}: only with cfg_schedule='interval'")
    if sampling.cfg_schedule != "power-cosine" and sampling.cfg_power != 1.0:
        problems.append(f"cfg_power={sampling.cfg_power}: only with cfg_schedule='power-cosine'")
    if sampling.cfg_power <= 0:
        problems.append(f"cfg_power={sampling.cfg_power}: a positive number")
    if not 0 <= sampling.cfg_interval[0] < sampling.cfg_interval[1] <= 1:
        problems.append(f"cfg_interval={sampling.cfg_interval}: fractions of the sequence, the start before the end")
    return values, problems
