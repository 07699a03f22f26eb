"""MergeAR (paper section 4.2): a position sees recent tokens, and the first token of each older group."""

from collections.abc import Mapping

from jaxtyping import Array, Key

from mergevq_jax.generator.kinds.kind import Kind, LossConfig
from mergevq_jax.generator.losses import Means, next_code_loss
from mergevq_jax.generator.mask import first_of_group, merge_mask
from mergevq_jax.generator.merged_attention import merged_keys
from mergevq_jax.generator.transformer import Params


class MergeAR(Kind):
    """Autoregression over a compressed KV cache."""

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: LossConfig, keep: int
    ) -> tuple[Array, Means]:
        """As of `Kind`."""
        groups = batch["source_map"] if config.groups == "source_map" else batch["indices"]
        first, model = first_of_group(groups), config.model
        near = {"window": config.window, "prefix": model.prefix}
        if config.compute.attention in ("auto", "xla") and keep + config.window < model.length:
            seen = merged_keys(first, keep, **near)
        else:
            seen = merge_mask(first, **near)
        return next_code_loss(params, batch, key, config=model, compute=config.compute, keep=keep, seen=seen)
