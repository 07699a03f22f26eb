"""FLUX's autoencoder: images to a grid of latents and back, and latents as the transformer's tokens.

Axes: B batch, H W image, h w grid of latents, C latent channels, N image tokens (2x2 latents each), D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, UInt8

from runtime_jax.config import to_dict
from runtime_jax.nn.attention import attention
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.group_norm import GroupNorm
from runtime_jax.sharding import Axis, Rule, constrain
from tokenverse_jax.flux import config_json

PATCH = 2  # latents along each side of a token
LOGVAR_RANGE = (-30.0, 20.0)
SHARDING_RULES: tuple[Rule, ...] = ((r".*", ()),)  # 84M parameters at full size: every device has them all


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes, under the names of diffusers' vae/config.json; the defaults are FLUX's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        sizes = (*self.block_out_channels, self.layers_per_block, self.latent_channels, self.norm_num_groups)
        if not self.block_out_channels or min(sizes) < 1:
            raise ValueError(f"sizes must be positive, with at least one width; got {self}")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: "
                f"multiples of norm_num_groups={self.norm_num_groups} are needed"
            )

    @property
    def downsampling(self) -> int:
        """Pixels along each side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image of height x width pixels.

        Raises:
          ValueError: a side is no positive multiple of a token's (16 pixels for FLUX).
        """
        side = PATCH * self.downsampling
        if height < 1 or width < 1 or height % side or width % side:
            raise ValueError(f"image size {height}x{width}: positive multiples of {side} are needed")
        return height // side, width // side


def _fixed(levels: int) -> dict[str, Any]:
    """The fields of vae/config.json that are the same for every autoencoder with FLUX's architecture."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": True,
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latents_mean": None,
        "latents_std": None,
    }


def parse_config(fields: Mapping[str, Any]) -> AutoencoderConfig:
    """The config in diffusers' vae/config.json; ConfigError where it is another kind or does not build."""
    widths = fields.get("block_out_channels", AutoencoderConfig.block_out_channels)
    levels = len(widths) if isinstance(widths, list | tuple) else 0
    unused = ("sample_size", "force_upcast")
    return config_json.parse(AutoencoderConfig, fields, "vae/config.json", fixed=_fixed(levels), unused=unused)


def config_fields(config: AutoencoderConfig) -> dict[str, Any]:
    """The content of diffusers' vae/config.json."""
    return _fixed(len(config.block_out_channels)) | to_dict(config)


@flax.struct.dataclass
class Posterior:
    """A normal distribution for every latent."""

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]

    def sample(self, noise: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """One draw, from standard normal `noise`."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class Autoencoder(nn.Module):
    """FLUX's autoencoder, under FLUX's names."""

    config: AutoencoderConfig
    compute: Compute = Compute()

    def setup(self):
        self.encoder = Encoder(self.config, self.compute)
        self.decoder = Decoder(self.config, self.compute)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Images from the means of their latents."""
        return self.decode(self.encode(images).mean)

    def encode(self, images: Float[Array, "B H W 3"]) -> Posterior:
        """Unscaled float32 latents of images in [-1, 1], whose sides are multiples of the downsampling (8 for FLUX)."""
        return self.encoder(images)

    def decode(self, sample: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Images, nominally in [-1, 1] (not clipped) and in float32, from unscaled latents."""
        return self.decoder(sample)


class Encoder(nn.Module):
    """Residual blocks on every level of resolution, one attention layer on the lowest."""

    config: AutoencoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Posterior:
        config, compute = self.config, self.compute
        if any(side % config.downsampling or not side for side in images.shape[1:3]):
            raise ValueError(
                f"image size {images.shape[1]}x{images.shape[2]}: multiples of {config.downsampling} are needed"
            )
        x = _conv(config.block_out_channels[0], "conv_in", compute)(images.astype(compute.jax_dtype))
        for level, width in enumerate(config.block_out_channels):
            for index in range(config.layers_per_block):
                x = _remat(ResBlock, compute)(width, config, compute, name=f"down_{level}_block_{index}")(x)
            if level < len(config.block_out_channels) - 1:
                # FLUX pads below and on the right only.
                x = _conv(width, f"down_{level}_downsample", compute, stride=2, padding=((0, 1), (0, 1)))(x)
        x = _remat(Middle, compute)(config, compute, name="mid")(x)
        x = nn.silu(_norm("norm_out", config, compute)(x))
        x = _conv(2 * config.latent_channels, "conv_out", compute)(x).astype(jnp.float32)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return Posterior(mean=mean, logvar=jnp.clip(logvar, *LOGVAR_RANGE))


class Decoder(nn.Module):
    """The encoder's mirror image, with one residual block more on every level."""

    config: AutoencoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, sample: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        config, compute = self.config, self.compute
        x = _conv(config.block_out_channels[-1], "conv_in", compute)(sample.astype(compute.jax_dtype))
        x = _remat(Middle, compute)(config, compute, name="mid")(x)
        for level, width in reversed(list(enumerate(config.block_out_channels))):
            for index in range(config.layers_per_block + 1):
                x = _remat(ResBlock, compute)(width, config, compute, name=f"up_{level}_block_{index}")(x)
            if level:
                x = repeat(x, "b h w d -> b (h i) (w j) d", i=2, j=2)
                x = _conv(width, f"up_{level}_upsample", compute)(x)
        x = nn.silu(_norm("norm_out", config, compute)(x))
        return _conv(3, "conv_out", compute)(x).astype(jnp.float32)


class Middle(nn.Module):
    """Residual block, attention, residual block, on the lowest resolution."""

    config: AutoencoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        config, compute, width = self.config, self.compute, x.shape[-1]
        x = ResBlock(width, config, compute, name="block_1")(x)
        x = AttnBlock(config, compute, name="attn_1")(x)
        return ResBlock(width, config, compute, name="block_2")(x)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, beside a 1x1 shortcut where the width changes."""

    features: int
    config: AutoencoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w features"]:
        config, compute, residual = self.config, self.compute, x
        x = nn.silu(_norm("norm1", config, compute)(x))
        x = _conv(self.features, "conv1", compute)(x)
        x = nn.silu(_norm("norm2", config, compute)(x))
        x = _conv(self.features, "conv2", compute)(x)
        if residual.shape[-1] != self.features:
            residual = nn.Dense(self.features, dtype=compute.jax_dtype, name="nin_shortcut")(residual)
        return constrain(x + residual, Axis.BATCH, None, None, None)


class AttnBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    config: AutoencoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        dtype, width = self.compute.jax_dtype, x.shape[-1]
        normed = rearrange(_norm("norm", self.config, self.compute)(x), "b h w d -> b (h w) 1 d")
        query, key, value = (nn.Dense(width, dtype=dtype, name=name)(normed) for name in "qkv")
        # Always XLA's: fused kernels take no head that is 512 wide.
        y = rearrange(attention(query, key, value), "b (h w) 1 d -> b h w d", h=x.shape[1])
        return constrain(x + nn.Dense(width, dtype=dtype, name="proj_out")(y), Axis.BATCH, None, None, None)


def _conv(features: int, name: str, compute: Compute, *, stride: int = 1, padding: Any = 1) -> nn.Conv:
    return nn.Conv(features, (3, 3), (stride, stride), padding, dtype=compute.jax_dtype, name=name)


def _norm(name: str, config: AutoencoderConfig, compute: Compute) -> GroupNorm:
    return GroupNorm(compute, config.norm_num_groups, name=name)


def _remat(module: type[nn.Module], compute: Compute) -> type[nn.Module]:
    return nn.remat(module) if compute.remat else module


def to_float(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Images as the encoder takes them, in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """The inverse of `to_float` for what the decoder gives, clipped."""
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def to_latents(sample: Float[Array, "B h w C"], config: AutoencoderConfig) -> Float[Array, "B h w C"]:
    """The encoder's latents at the transformer's scale: about unit variance."""
    return (sample - config.shift_factor) * config.scaling_factor


def from_latents(latents: Float[Array, "B h w C"], config: AutoencoderConfig) -> Float[Array, "B h w C"]:
    """The inverse of `to_latents`."""
    return latents / config.scaling_factor + config.shift_factor


def pack(latents: Float[Array, "B h w C"]) -> Float[Array, "B N 4*C"]:
    """Tokens of 2x2 latents, row by row; FLUX's channel order is (C, row, column)."""
    return rearrange(latents, "b (h i) (w j) c -> b (h w) (c i j)", i=PATCH, j=PATCH)


def unpack(tokens: Float[Array, "B N D"], grid: tuple[int, int]) -> Float[Array, "B h w D//4"]:
    """The inverse of `pack` for `grid` (rows, columns) of tokens."""
    return rearrange(tokens, "b (h w) (c i j) -> b (h i) (w j) c", h=grid[0], w=grid[1], i=PATCH, j=PATCH)


def image_ids(grid: tuple[int, int]) -> Float[Array, "N 3"]:
    """Positions (0, row, column) of the tokens of a grid (rows, columns); those of text are all zeros."""
    rows, columns = jnp.meshgrid(*(jnp.arange(side, dtype=jnp.float32) for side in grid), indexing="ij")
    return rearrange(jnp.stack([jnp.zeros_like(rows), rows, columns], axis=-1), "h w three -> (h w) three")
