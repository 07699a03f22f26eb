"""CLIP's text transformer (Radford et al. 2021), whose pooled output conditions FLUX; names as in transformers.

Axes: B batch, T text tokens, D width, H heads.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from runtime_jax.nn.compute import Compute
from runtime_jax.nn.gelu import gelu
from runtime_jax.sharding import Axis, Rule, constrain
from tokenverse_jax.flux.layers import stacked


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The fields of config.json that the encoder uses; `CLIP_L` is FLUX's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    eos_token_id: int  # 2 pools at the largest id of a prompt, see `pooled_position`
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads} heads")


CLIP_L = CLIPTextConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    eos_token_id=2,
)

SHARDING_RULES: tuple[Rule, ...] = (
    (r"token_embedding/embedding", (Axis.VOCAB, Axis.EMBED)),
    (r"blocks/[qkv]_proj/kernel", (None, Axis.EMBED, Axis.HEADS)),
    (r"blocks/out_proj/kernel", (None, Axis.HEADS, Axis.EMBED)),
    (r"blocks/fc1/kernel", (None, Axis.EMBED, Axis.MLP)),
    (r"blocks/fc2/kernel", (None, Axis.MLP, Axis.EMBED)),
    (r".*", ()),  # positions, norms and biases are replicated
)


class CLIPTextOutput(NamedTuple):
    """Both after the final norm, float32."""

    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]


def pooled_position(input_ids: Int[Array, "B T"], eos_token_id: int) -> Int[Array, " B"]:
    """Position of the end token, whose output stands for the whole prompt.

    The config.json of OpenAI's models, FLUX's among them, gives 2, although the end token is the vocabulary's last one.
    transformers therefore takes 2 to mean the (first) largest id, and so do we.
    """
    return jnp.argmax(input_ids if eos_token_id == 2 else input_ids == eos_token_id, axis=-1)


class CLIPTextEncoder(nn.Module):
    """The text transformer: causal, pre-norm, learned positions.

    The residual stream, norms, softmax and outputs are float32, matmuls are `compute.dtype`. Attention is always XLA's:
    77 tokens, once a caption.
    """

    config: CLIPTextConfig = CLIP_L
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B T"]) -> CLIPTextOutput:
        """Encodes token ids; padding is not masked, as in FLUX (causality keeps it from the pooled output).

        Raises:
          ValueError: more tokens than positions.
        """
        config, length = self.config, input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(f"CLIP: {length} tokens, but there are {config.max_position_embeddings} positions")

        def embedding(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.hidden_size, embedding_init=nn.initializers.normal(0.02), name=name)

        positions = embedding(config.max_position_embeddings, "position_embedding")(jnp.arange(length))
        x = embedding(config.vocab_size, "token_embedding")(input_ids).astype(jnp.float32) + positions[None]
        blocks = stacked(Block, config.num_hidden_layers, self.compute)(config, self.compute, name="blocks")
        x, _ = blocks(constrain(x, Axis.BATCH, None, None), None)
        hidden = _layer_norm(config, "final_layer_norm")(x)
        last = pooled_position(input_ids, config.eos_token_id)
        return CLIPTextOutput(hidden, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


class Block(nn.Module):
    """Causal self-attention, then an MLP; in the form that nn.scan takes."""

    config: CLIPTextConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], _: None) -> tuple[Float[Array, "B T D"], None]:
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.compute.jax_dtype, name=name)

        y = _layer_norm(config, "layer_norm1")(x)
        query, key, value = (
            constrain(
                rearrange(dense(config.hidden_size, name)(y), "b t (h d) -> b t h d", h=config.num_attention_heads),
                *(Axis.BATCH, None, Axis.HEADS, None),
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")
        x = x + dense(config.hidden_size, "out_proj")(rearrange(y, "b t h d -> b t (h d)"))
        x = constrain(x, Axis.BATCH, None, None)
        y = dense(config.intermediate_size, "fc1")(_layer_norm(config, "layer_norm2")(x))
        y = constrain(_activation(config, y), Axis.BATCH, None, Axis.MLP)
        return constrain(x + dense(config.hidden_size, "fc2")(y), Axis.BATCH, None, None), None


def _activation(config: CLIPTextConfig, x: Array) -> Array:
    return x * nn.sigmoid(1.702 * x) if config.hidden_act == "quick_gelu" else gelu(x)


def _layer_norm(config: CLIPTextConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)
