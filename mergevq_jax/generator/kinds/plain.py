"""Plain autoregression, the baseline: a position sees all before it."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Array, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.kinds.kind import Kind, LossConfig
from mergevq_jax.generator.losses import Means, next_code_loss
from mergevq_jax.generator.sampling.plan import SamplingConfig
from mergevq_jax.generator.transformer import Params


class Plain(Kind):
    """Autoregression that keeps every token."""

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: LossConfig, keep: int
    ) -> tuple[Array, Means]:
        """As of `Kind`."""
        return next_code_loss(params, batch, key, config=config.model, compute=config.compute, keep=keep, seen=None)

    def window(self, model: GeneratorConfig, window: int) -> int:
        """All tokens."""
        return model.length

    def settings(self, sampling: SamplingConfig, model: GeneratorConfig, window: int) -> SamplingConfig:
        """Settings in which an unset capacity is all tokens."""
        sampling = super().settings(sampling, model, window)
        return replace(sampling, capacity=model.length) if sampling.capacity is None else sampling
