"""FLUX's diffusion transformer with an offset of the modulation for every text token (TokenVerse's space M+).

Axes: B batch, N image tokens, T text tokens, D width, C channels of an image token, J and P the
text encoders' widths.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from runtime_jax import config as config_lib
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.stacked import stacked
from runtime_jax.prng import key_shape
from runtime_jax.sharding import IF_LARGE, Axis, Rule, constrain
from tokenverse_jax.flux.layers import DoubleBlock, LastLayer, MLPEmbedder, SingleBlock, dense
from tokenverse_jax.flux.math import rope, timestep_embedding
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a FLUX transformer, under the names of diffusers' transformer/config.json; defaults: FLUX.1-dev."""

    patch_size: Literal[1] = 1  # latents are packed before the transformer
    in_channels: int = 64
    out_channels: int | None = None  # None: as many as come in
    num_layers: int = 19  # double blocks
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # of the text tokens (T5)
    pooled_projection_dim: int = 768  # of the text vector (CLIP)
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        sizes = {name: value for name, value in vars(self).items() if isinstance(value, int) and value < 1}
        bad = [f"{name}={value}" for name, value in sizes.items() if not isinstance(value, bool)]
        if bad:
            raise ValueError(f"FLUX config: {', '.join(bad)}: positive numbers are needed")
        dims = self.axes_dims_rope
        if any(dim < 2 or dim % 2 for dim in dims) or sum(dims) != self.attention_head_dim:
            raise ValueError(
                f"FLUX config: axes_dims_rope={dims}: even numbers whose sum is "
                f"attention_head_dim={self.attention_head_dim} are needed"
            )

    @property
    def width(self) -> int:
        """D, of tokens and of the modulation vector."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_blocks(self) -> int:
        """Double and single blocks."""
        return self.num_layers + self.num_single_layers


PRESETS: Mapping[str, FluxConfig] = MappingProxyType(
    {"dev": FluxConfig(), "schnell": FluxConfig(guidance_embeds=False)}
)


def parse_config(fields: Mapping[str, Any]) -> FluxConfig:
    """The sizes in a diffusers transformer/config.json; keys that start with "_" are its own notes.

    Raises:
      ConfigError: unknown or ill-typed keys, or sizes that do not fit together.
    """
    own = {name: value for name, value in fields.items() if not name.startswith("_")}
    return config_lib.build(FluxConfig, own, path="transformer/config.json")


class Flux(nn.Module):
    """The transformer. Blocks of a kind are stacked along the first axis of their parameters.

    Attributes:
      config: sizes.
      compute: dtype, attention backend, remat.
      unroll: a program without loops, slower to compile and faster on CPUs, with the same parameters and values.
    """

    config: FluxConfig
    compute: Compute = Compute()
    unroll: bool = False

    def setup(self):
        config, compute = self.config, self.compute
        self.img_in = dense(config.width, compute)
        self.txt_in = dense(config.width, compute)
        self.time_in = MLPEmbedder(config.width)
        self.vector_in = MLPEmbedder(config.width)
        if config.guidance_embeds:
            self.guidance_in = MLPEmbedder(config.width)
        self.double_blocks = self._stack(DoubleBlock, config.num_layers)
        self.single_blocks = self._stack(SingleBlock, config.num_single_layers)
        self.final_layer = LastLayer(config.out_channels or config.in_channels, compute)

    def _stack(self, block: type[nn.Module], length: int) -> nn.Module:
        in_axes = (nn.broadcast, nn.broadcast, Offsets(nn.broadcast, 1, nn.broadcast, nn.broadcast))
        blocks = stacked(block, length, self.compute, in_axes=in_axes, unroll=length if self.unroll else 1)
        return blocks(self.config.num_attention_heads, self.compute)

    def modulation_vector(
        self, timesteps: Float[Array, " B"], vec: Float[Array, "B P"], guidance: Float[Array, " B"] | None = None
    ) -> Float[Array, "B D"]:
        """y, which modulates all blocks: the sum of embedded time, guidance strength and pooled text; float32."""
        if self.config.guidance_embeds != (guidance is not None):
            needed = "needs a guidance strength" if guidance is None else "takes no guidance (guidance_embeds is false)"
            raise ValueError(f"this FLUX model {needed}")
        y = self.time_in(timestep_embedding(timesteps)) + self.vector_in(vec)
        return y if guidance is None else y + self.guidance_in(timestep_embedding(guidance))

    def __call__(
        self,
        img: Float[Array, "B N C"],
        img_ids: Float[Array, "N axes"],
        txt: Float[Array, "B T J"],
        txt_ids: Float[Array, "T axes"],
        timesteps: Float[Array, " B"],
        vec: Float[Array, "B P"],
        guidance: Float[Array, " B"] | None = None,
        *,
        offsets: Offsets = NO_OFFSETS,
    ) -> Float[Array, "B N out"]:
        """Velocity of every image token, float32.

        Args:
          img: packed noisy latents.
          img_ids: position of each image token on each axis of `axes_dims_rope`.
          txt: T5's outputs.
          txt_ids: positions of the text tokens; FLUX gives all of them 0.
          timesteps: from 1 (noise) to 0 (image).
          vec: CLIP's pooled output.
          guidance: strength, for models with guidance_embeds only.
          offsets: of the modulation vector.

        Raises:
          ValueError: shapes that do not fit; guidance missing, or given to a model without guidance_embeds.
        """
        self._check(img=img, img_ids=img_ids, txt=txt, txt_ids=txt_ids, timesteps=timesteps, vec=vec, guidance=guidance)
        double = self.config.num_layers
        offsets.check(img.shape[0], self.config.num_blocks, txt.shape[1], img.shape[1], self.config.width)
        y = self.modulation_vector(timesteps, vec, guidance)
        if offsets.everywhere is not None:
            y = y + offsets.everywhere
        y = constrain(y, Axis.BATCH, None)
        pe = rope(jnp.concatenate([txt_ids, img_ids]), self.config.axes_dims_rope)

        img = constrain(self.img_in(img), Axis.BATCH, None, None)
        txt = constrain(self.txt_in(txt), Axis.BATCH, None, None)
        (img, txt), _ = self.double_blocks((img, txt), y, pe, offsets.of_blocks("double", slice(None, double)))
        x = constrain(jnp.concatenate([txt, img], axis=1), Axis.BATCH, None, None)
        x, _ = self.single_blocks(x, y, pe, offsets.of_blocks("single", slice(double, None)))
        return self.final_layer(x[:, txt.shape[1] :], y)

    def _check(self, **arrays: Array | None) -> None:
        config, img, txt = self.config, arrays["img"], arrays["txt"]
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(f"FLUX: img {img.shape} and txt {txt.shape} must be [batch, tokens, channels]")
        (batch, tokens, _), text = img.shape, txt.shape[1]
        axes = len(config.axes_dims_rope)
        expected = {
            "img": (batch, tokens, config.in_channels),
            "img_ids": (tokens, axes),
            "txt": (batch, text, config.joint_attention_dim),
            "txt_ids": (text, axes),
            "timesteps": (batch,),
            "vec": (batch, config.pooled_projection_dim),
            "guidance": (batch,),
        }
        wrong = [
            f"{name} has shape {array.shape}, not {expected[name]}"
            for name, array in arrays.items()
            if array is not None and array.shape != expected[name]
        ]
        if wrong:
            raise ValueError(f"FLUX: {'; '.join(wrong)}")


def direction(
    config: FluxConfig, params: Params, attribute: Float[Array, "B P"], neutral: Float[Array, "B P"]
) -> Float[Array, "B D"]:
    """MLP(t, attribute) - MLP(t, neutral): a direction without training, as from "a dog" to "a poodle dog"; float32.

    The modulation vector is a sum of embedded time, guidance and text. Time and guidance cancel, so the direction is
    the same at all t. It is a step in M as `Offsets.everywhere`, and in M+ as `Offsets.shared` on the tokens of a word.

    Args:
      params: of the FLUX model; only vector_in's are used.
      attribute: CLIP's pooled output for the prompt with the attribute.
      neutral: the same for the prompt without it.
    """
    embedder, variables = MLPEmbedder(config.width), {"params": params["vector_in"]}
    return embedder.apply(variables, attribute) - embedder.apply(variables, neutral)


def init_params(config: FluxConfig, key: Array) -> Params:
    """Random parameters, float32. Modulations and the last layer start at zero, so blocks start as identities."""
    axes = len(config.axes_dims_rope)
    one = jnp.zeros((1,))
    return Flux(config).init(
        key,
        img=jnp.zeros((1, 1, config.in_channels)),
        img_ids=jnp.zeros((1, axes)),
        txt=jnp.zeros((1, 1, config.joint_attention_dim)),
        txt_ids=jnp.zeros((1, axes)),
        timesteps=one,
        vec=jnp.zeros((1, config.pooled_projection_dim)),
        guidance=one if config.guidance_embeds else None,
    )["params"]


@functools.cache
def param_shapes(config: FluxConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing anything."""
    return jax.eval_shape(functools.partial(init_params, config), key_shape())


SHARDING_RULES: tuple[Rule, ...] = (
    (r"(img|txt)_attn/qkv/kernel", (None, Axis.EMBED, Axis.HEADS)),
    (r"(img|txt)_attn/proj/kernel", (None, Axis.HEADS, Axis.EMBED)),
    (r"((img|txt)_mod/lin|modulation/lin|(img|txt)_mlp/in_layer|linear1)/kernel", (None, Axis.EMBED, Axis.MLP)),
    (r"((img|txt)_mlp/out_layer|linear2)/kernel", (None, Axis.MLP, Axis.EMBED)),
    (r"((time|vector|guidance)_in/(in|out)_layer|adaLN_modulation)/kernel", (Axis.EMBED, Axis.MLP)),
    (r"(img|txt)_in/kernel", (None, Axis.EMBED)),
    (r"final_layer/linear/kernel", (Axis.EMBED, None)),
    (r".*/(bias|scale)", IF_LARGE),
)
