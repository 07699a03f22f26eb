"""The encoder of T5 v1.1 (Raffel et al. 2020; gated GELU), FLUX's text stream; names as in transformers.

Axes: B batch, T text tokens, D width, H heads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from runtime_jax.nn.compute import Compute
from runtime_jax.nn.stacked import stacked
from runtime_jax.sharding import Axis, Rule, constrain


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The fields of config.json that the encoder uses; `T5_XXL` is FLUX's."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    feed_forward_proj: Literal["gated-gelu"]
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets={buckets}, relative_attention_max_distance={distance}: buckets are a "
                "multiple of 4, and the distance exceeds a quarter of them"
            )


T5_XXL = T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)

SHARDING_RULES: tuple[Rule, ...] = (
    (r"shared/embedding", (Axis.VOCAB, Axis.EMBED)),
    (r"blocks/[qkv]/kernel", (None, Axis.EMBED, Axis.HEADS)),
    (r"blocks/o/kernel", (None, Axis.HEADS, Axis.EMBED)),
    (r"blocks/wi_[01]/kernel", (None, Axis.EMBED, Axis.MLP)),
    (r"blocks/wo/kernel", (None, Axis.MLP, Axis.EMBED)),
    (r".*", ()),  # norms and the position bias are replicated
)


def relative_position_buckets(length: int, config: T5Config) -> Int[np.ndarray, "T T"]:
    """Bucket of the distance of every (query, key).

    Half of the buckets are for keys that follow the query. Half of each half hold one distance each (0, 1, ...); the
    others grow logarithmically up to the maximal distance, and the last also holds everything beyond.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    progress = np.log(np.maximum(distance, exact) / exact) / math.log(config.relative_attention_max_distance / exact)
    far = np.minimum(exact + (progress * (half - exact)).astype(int), half - 1)
    return half * (offset > 0) + np.where(distance < exact, distance, far)


class T5Encoder(nn.Module):
    """Pre-norm blocks without biases; one relative position bias serves the attention of all of them.

    The residual stream (which grows large), norms, softmax and output are float32, matmuls are `compute.dtype`.
    Attention is always XLA's: at most 512 tokens, once a caption.
    """

    config: T5Config = T5_XXL
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Encodes token ids; padding is not masked, as in FLUX."""
        config = self.config
        embed = nn.Embed(config.vocab_size, config.d_model, embedding_init=nn.initializers.normal(1.0), name="shared")
        x = constrain(embed(input_ids).astype(jnp.float32), Axis.BATCH, None, None)
        buckets = relative_position_buckets(input_ids.shape[1], config)
        bias = nn.Embed(config.relative_attention_num_buckets, config.num_heads, name="relative_attention_bias")
        bias = rearrange(bias(buckets).astype(jnp.float32), "query key h -> 1 h query key")
        blocks = stacked(Block, config.num_layers, self.compute)(config, self.compute, name="blocks")
        x, _ = blocks(x, bias)
        return _rms_norm(config, "final_layer_norm")(x)


class Block(nn.Module):
    """Self-attention with a position bias, then a gated MLP; in the form that nn.scan takes."""

    config: T5Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "1 H T T"]) -> tuple[Float[Array, "B T D"], None]:
        config = self.config

        def dense(features: int, name: str, variance: float = 1.0) -> nn.Dense:
            init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
            return nn.Dense(features, use_bias=False, dtype=self.compute.jax_dtype, kernel_init=init, name=name)

        y = _rms_norm(config, "attention_layer_norm")(x)

        def heads(name: str, variance: float = 1.0) -> Array:
            projected = dense(config.num_heads * config.d_kv, name, variance)(y)
            projected = rearrange(projected, "b t (h d) -> b t h d", h=config.num_heads)
            return constrain(projected, Axis.BATCH, None, Axis.HEADS, None)

        # T5 does not scale its logits: queries start small instead.
        y = jax.nn.dot_product_attention(
            heads("q", 1 / config.d_kv), heads("k"), heads("v"), bias, scale=1.0, implementation="xla"
        )
        x = constrain(x + dense(config.d_model, "o")(rearrange(y, "b t h d -> b t (h d)")), Axis.BATCH, None, None)
        y = _rms_norm(config, "mlp_layer_norm")(x)
        y = nn.gelu(dense(config.d_ff, "wi_0")(y), approximate=True) * dense(config.d_ff, "wi_1")(y)
        y = constrain(y, Axis.BATCH, None, Axis.MLP)
        return constrain(x + dense(config.d_model, "wo")(y), Axis.BATCH, None, None), None


def _rms_norm(config: T5Config, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=jnp.float32, name=name)
