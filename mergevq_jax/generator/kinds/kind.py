"""What differs between the kinds of generators; the base class has what kinds in raster order share.

Axes: B batch, L raster tokens, M choices of K, C classes.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt8

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.images import codes_to_images
from mergevq_jax.generator.losses import Means
from mergevq_jax.generator.sampling.plan import DrawPlan, Knobs, SamplingConfig, abstract_request, make_plan
from mergevq_jax.generator.sampling.raster import Samples, run, sample
from mergevq_jax.generator.transformer import Params
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax.nn.compute import Compute

Counts = Mapping[str, Array]  # what training counts, beside the parameters; by name


class CacheUse(NamedTuple):
    """What the sampler's KV cache did for each image."""

    first_occurrence: Bool[Array, "B L"] | Bool[np.ndarray, "B L"]
    kept: Bool[Array, "B L"] | Bool[np.ndarray, "B L"]  # at the end
    occupancy: Int[Array, "B L"] | Int[np.ndarray, "B L"]  # slots
    overflows: Int[Array, "B"] | Int[np.ndarray, "B"]


@runtime_checkable
class LossConfig(Protocol):
    """What the losses read of `train.StepConfig`."""

    model: GeneratorConfig
    window: int
    groups: str
    compute: Compute


class Kind(abc.ABC):
    """A kind of generator that draws all raster tokens, one by one."""

    positions = False  # whether the model has a position instruction
    recovers = False  # whether its images need source recovery
    compresses = True  # whether its sampler keeps some tokens and not others

    @abc.abstractmethod
    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: LossConfig, keep: int
    ) -> tuple[Array, Means]:
        """The loss, and the means to log.

        Args:
          params: of `Generator`.
          batch: of `train.tokenize`.
          key: of the class dropout; None: no dropout.
          config, keep: static.
        """

    def check_keeps(self, model: GeneratorConfig, keeps: Sequence[int]) -> None:  # noqa: B027 (some check nothing)
        """Raises ValueError for numbers of kept tokens that this kind cannot be trained with."""

    def window(self, model: GeneratorConfig, window: int) -> int:
        """Number of recent tokens that the trained generator always sees."""
        return window

    def new_counts(self, model: GeneratorConfig) -> Counts:
        """The counts before the first step."""
        return {}

    def count(self, counts: Counts, batch: Mapping[str, Array], *, model: GeneratorConfig, keep: int) -> Counts:
        """The counts after one more batch."""
        return counts

    def settings(self, sampling: SamplingConfig, model: GeneratorConfig, window: int) -> SamplingConfig:
        """Sampling settings in which an unset window is that of training."""
        return replace(sampling, window=window if sampling.window is None else sampling.window)

    def plan(
        self,
        model: GeneratorConfig,
        sampling: SamplingConfig,
        keep: int | None,
        *,
        steps: int | None,
        compute: Compute,
    ) -> tuple[DrawPlan, Knobs]:
        """The static and the dynamic part of a sampler.

        Raises:
          ValueError: lists all settings that this generator cannot sample with.
        """
        _check_steps(steps)
        return make_plan(model, sampling, keep, compute)

    def calls(self, model: GeneratorConfig, plan: DrawPlan) -> int:
        """How often the sampler calls the network for codes."""
        return model.length

    def tokens(self, model: GeneratorConfig) -> int:
        """Tokens, beside the prefix, in a KV cache that keeps all of them."""
        return model.length

    def draw(
        self,
        params: Params,
        labels: Int[np.ndarray, "B"],
        keep: int | None,
        *,
        steps: int | None,
        positions: Int[np.ndarray, "B K"] | None,
        counts: Counts,
        **settings: Any,
    ) -> Any:
        """What `GeneratorModel.sample` returns; `counts` are those of training, `settings` go to any kind's sampler."""
        _check_steps(steps)
        if positions is not None:
            raise ValueError("positions: this generator draws all codes, in raster order")
        return sample(params, labels, keep, **settings)

    def trace(self, params: Params, batch_size: int, plan: DrawPlan, knobs: Knobs) -> jax.stages.Traced:
        """The traced program of `draw`, for parameters of these shapes and what `plan` returns."""
        labels, merge, key = abstract_request(batch_size, plan.config)
        return run.trace(params, labels, merge, key, labels, jax.eval_shape(lambda: knobs), plan=plan)

    def images(self, tokenizer: Tokenizer, drawn: Samples) -> UInt8[Array, "B H W 3"]:
        """The images of what `draw` returned."""
        return codes_to_images(tokenizer, drawn.indices)

    def use(self, drawn: Samples) -> CacheUse | None:
        """What the KV cache did; None if it keeps everything."""
        return CacheUse(drawn.first_occurrence, drawn.kept, drawn.occupancy, drawn.overflows)


def _check_steps(steps: int | None) -> None:
    if steps is not None:
        raise ValueError(f"{steps} steps: this generator draws one code per step, in raster order")
