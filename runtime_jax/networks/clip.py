"""CLIP (Radford et al. 2021): its text transformer, whose pooled output also conditions FLUX, its vision transformer,
and their projections into one space, in which cosines measure similarity. Names as in transformers.

Axes: B batch, T text tokens, S image tokens, H W image, D width, E width of the common space.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8

from runtime_jax.nn.compute import Compute
from runtime_jax.nn.gelu import gelu
from runtime_jax.nn.stacked import stacked
from runtime_jax.sharding import Axis, Rule, constrain

Activation = Literal["quick_gelu", "gelu"]
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of its images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


def _check_heads(config: "CLIPTextConfig | CLIPVisionConfig") -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"hidden_size={config.hidden_size} is no multiple of {config.num_attention_heads} heads")


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The fields of config.json that the text transformer uses; `CLIP_L` is FLUX's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    eos_token_id: int  # 2 pools at the largest id of a prompt, see `pooled_position`
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        _check_heads(self)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The fields of config.json that the vision transformer uses; the defaults are ViT-B/32's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: Literal[3] = 3
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        _check_heads(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both transformers and E."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512


CLIP_L = CLIPTextConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    eos_token_id=2,
)

TEXT_SHARDING_RULES: tuple[Rule, ...] = (
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


class CLIPVisionEncoder(nn.Module):
    """The vision transformer: pre-norm, with a class token, learned positions and one more norm before the blocks.

    Dtypes as of `CLIPTextEncoder`; attention is XLA's.
    """

    config: CLIPVisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """The class token's output after the final norm, float32, of images as `standardize` gives them.

        Raises:
          ValueError: images of another size than the positions are for.
        """
        config, side, patch = self.config, self.config.image_size, (self.config.patch_size,) * 2
        if images.shape[1:3] != (side, side):
            raise ValueError(f"CLIP: images of {images.shape[1]}x{images.shape[2]}, but {side}x{side} is needed")
        x = nn.Conv(
            config.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=self.compute.jax_dtype,
            name="patch_embedding",
        )(images)
        x = rearrange(x, "b h w d -> b (h w) d").astype(jnp.float32)
        normal = nn.initializers.normal(0.02)
        first = self.param("class_embedding", normal, (config.hidden_size,))
        first = jnp.broadcast_to(first[None, None], (len(x), 1, config.hidden_size))
        positions = self.param("position_embedding", normal, (x.shape[1] + 1, config.hidden_size))
        x = jnp.concatenate([first, x], axis=1) + positions[None]
        x = _layer_norm(config, "pre_layer_norm")(x)
        blocks = stacked(Block, config.num_hidden_layers, self.compute)
        x, _ = blocks(config, self.compute, causal=False, name="blocks")(constrain(x, Axis.BATCH, None, None), None)
        return _layer_norm(config, "post_layer_norm")(x[:, 0])


class CLIP(nn.Module):
    """Images and texts in one space. Embeddings are float32 and not normalised."""

    config: CLIPConfig
    compute: Compute = Compute()

    def setup(self):
        self.text = CLIPTextEncoder(self.config.text, self.compute)
        self.vision = CLIPVisionEncoder(self.config.vision, self.compute)
        self.text_projection = nn.Dense(self.config.projection_dim, use_bias=False)
        self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False)

    def embed_texts(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Of token ids, padded at the end; raises as `CLIPTextEncoder`."""
        return self.text_projection(self.text(input_ids).pooled)

    def embed_images(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Of images as `standardize` gives them; raises as `CLIPVisionEncoder`."""
        return self.visual_projection(self.vision(images))

    def __call__(
        self, images: Float[Array, "B H W 3"], input_ids: Int[Array, "B2 T"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B2 E"]]:
        """Both."""
        return self.embed_images(images), self.embed_texts(input_ids)


class Block(nn.Module):
    """Self-attention, then an MLP; in the form that nn.scan takes."""

    config: CLIPTextConfig | CLIPVisionConfig
    compute: Compute
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], _: None) -> tuple[Float[Array, "B S D"], None]:
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
        y = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal, implementation="xla")
        x = x + dense(config.hidden_size, "out_proj")(rearrange(y, "b t h d -> b t (h d)"))
        x = constrain(x, Axis.BATCH, None, None)
        y = dense(config.intermediate_size, "fc1")(_layer_norm(config, "layer_norm2")(x))
        y = constrain(_activation(config, y), Axis.BATCH, None, Axis.MLP)
        return constrain(x + dense(config.hidden_size, "fc2")(y), Axis.BATCH, None, None), None


def _activation(config: CLIPTextConfig | CLIPVisionConfig, x: Array) -> Array:
    return x * nn.sigmoid(1.702 * x) if config.hidden_act == "quick_gelu" else gelu(x)


def _layer_norm(config: CLIPTextConfig | CLIPVisionConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def standardize(images: UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Pixels as the vision transformer takes them: in [0, 1], minus CLIP's mean, divided by its standard deviation."""
    mean, std = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (MEAN, STD))
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std
