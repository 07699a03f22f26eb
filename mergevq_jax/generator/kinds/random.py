"""RandAR as a kind of generator; the model is in `randar`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.images import recovered_to_images
from mergevq_jax.generator.kinds.kind import CacheUse, Counts, Kind, LossConfig
from mergevq_jax.generator.kinds.positions import count_starts, new_counts
from mergevq_jax.generator.kinds.randar import Codes, randar_loss
from mergevq_jax.generator.losses import Means
from mergevq_jax.generator.sampling.plan import DrawPlan, Knobs, SamplingConfig, abstract_request
from mergevq_jax.generator.sampling.random_order import make_randar_plan, randar_sample, run
from mergevq_jax.generator.transformer import Params
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax.nn.compute import Compute

GROUP_STARTS = "group_starts"  # int32 [M, C, L], counted as in `positions`


class RandAR(Kind):
    """Parallel decoding of distinct codes; source recovery assigns them to the raster."""

    positions = True
    recovers = True
    compresses = False

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: LossConfig, keep: int
    ) -> tuple[Array, Means]:
        """As of `Kind`."""
        return randar_loss(params, batch, key, config=config.model, compute=config.compute, keep=keep)

    def check_keeps(self, model: GeneratorConfig, keeps: Sequence[int]) -> None:
        """Without a merge instruction all codes are drawn."""
        if not model.merge_instruction and tuple(keeps) != (model.length,):
            raise ValueError(f"K = {tuple(keeps)}: without model.merge_instruction RandAR draws {model.length} codes")

    def new_counts(self, model: GeneratorConfig) -> Counts:
        """How often groups start at each position."""
        return {GROUP_STARTS: new_counts(model)}

    def count(self, counts: Counts, batch: Mapping[str, Array], *, model: GeneratorConfig, keep: int) -> Counts:
        """As of `Kind`."""
        starts = count_starts(counts[GROUP_STARTS], batch["label"], batch["source_map"], config=model, keep=keep)
        return {GROUP_STARTS: starts}

    def settings(self, sampling: SamplingConfig, model: GeneratorConfig, window: int) -> SamplingConfig:
        """The settings as they are: there is no window."""
        return sampling

    def plan(
        self,
        model: GeneratorConfig,
        sampling: SamplingConfig,
        keep: int | None,
        *,
        steps: int | None,
        compute: Compute,
    ) -> tuple[DrawPlan, Knobs]:
        """As of `Kind`."""
        return make_randar_plan(model, sampling, keep, steps, compute)

    def calls(self, model: GeneratorConfig, plan: DrawPlan) -> int:
        """As of `Kind`."""
        return len(plan.counts)

    def tokens(self, model: GeneratorConfig) -> int:
        """All codes, and the position instruction before each."""
        return 2 * model.length

    def draw(
        self, params: Params, labels: Int[np.ndarray, "B"], keep: int | None, *, counts: Counts, **settings: Any
    ) -> Any:
        """As of `Kind`."""
        return randar_sample(params, labels, keep, start_counts=counts.get(GROUP_STARTS), **settings)

    def trace(self, params: Params, batch_size: int, plan: DrawPlan, knobs: Knobs) -> jax.stages.Traced:
        """As of `Kind`."""
        labels, merge, key = abstract_request(batch_size, plan.config)
        positions = jax.ShapeDtypeStruct((batch_size, sum(plan.counts)), jnp.int32)
        return run.trace(params, labels, merge, positions, key, labels, jax.eval_shape(lambda: knobs), plan=plan)

    def images(self, tokenizer: Tokenizer, drawn: Codes) -> UInt8[Array, "B H W 3"]:
        """As of `Kind`."""
        return recovered_to_images(tokenizer, drawn)

    def use(self, drawn: Codes) -> CacheUse | None:
        """None."""
        return None
