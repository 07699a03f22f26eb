"""What the losses of all generators share: class dropout, and the cross-entropy of a factorised code.

Axes: B batch, L raster tokens, n codes, N positions.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.merged_attention import MergedKeys
from mergevq_jax.generator.sub_tokens import split_indices
from mergevq_jax.generator.transformer import Generator, Params
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import example_keys

Means = dict[str, Array]


def next_code_loss(
    params: Params,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None,
    *,
    config: GeneratorConfig,
    compute: Compute,
    keep: int,
    seen: Bool[Array, "B N N"] | MergedKeys | None,
) -> tuple[Float[Array, ""], Means]:
    """Teacher forcing in raster order.

    Args:
      batch: "indices" int32 [B, L], "label" and "example" int [B].
      key: of the class dropout; None: no dropout.
      keep: the merge instruction of all examples, where the generator has one.
      seen: of `merge_mask` or `merged_keys`; None: plain autoregression.
    """
    labels, merge = conditions(batch, key, config, keep)
    logits = Generator(config, compute).apply({"params": params}, batch["indices"], labels, merge, seen)
    return code_loss(logits, batch["indices"], config)


def conditions(
    batch: Mapping[str, Array], key: Key[Array, ""] | None, config: GeneratorConfig, keep: int
) -> tuple[Int[Array, "B"], Int[Array, "B"] | None]:
    """Labels and merge instructions of a batch.

    Each label becomes the null class with probability `class_dropout`, drawn with the example's own key; with
    key None, none does.
    """
    labels = batch["label"]
    merge = jnp.full_like(labels, config.merge_index(keep)) if config.merge_instruction else None
    if key is None or config.null_class is None:
        return labels, merge
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, config.class_dropout))(example_keys(key, batch["example"]))
    return jnp.where(dropped, config.null_class, labels), merge


def code_loss(
    logits: tuple[Float[Array, "B n _"], ...], indices: Int[Array, "B n"], config: GeneratorConfig
) -> tuple[Float[Array, ""], Means]:
    """The sum of the sub-tokens' mean cross-entropies, in nats; and the loss and accuracy of each sub-token."""
    means: Means = {}
    for part, (scores, values) in enumerate(zip(logits, split_indices(indices, config.vocab_sizes), strict=True)):
        means[f"loss/{part}"] = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, values))
        means[f"accuracy/{part}"] = jnp.mean((jnp.argmax(scores, axis=-1) == values).astype(jnp.float32))
    total = sum(means[f"loss/{part}"] for part in range(len(logits)))
    return total, means | {"loss": total}
