"""The judge's network: from an image to maps of its objects' attributes, its background and its light.

Axes: B batch, H W image, h w cells of 4 x 4 pixels, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from mini_scenes import BACKGROUNDS, CLASSES, COLORS, TEXTURES
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.group_norm import GroupNorm

CELL = 4
GROUPS = 8  # of GroupNorm
KINDS = 1 + len(CLASSES)  # class 0 is the background


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Widths at a quarter and an eighth of the resolution; numbers of blocks on the way down, at the bottom and up."""

    width: int = 64
    bottom_width: int = 88
    blocks: tuple[int, int, int] = (2, 2, 2)

    def __post_init__(self):
        if self.width % GROUPS or self.bottom_width % GROUPS:
            raise ValueError(f"width={self.width}, bottom_width={self.bottom_width}: multiples of {GROUPS} needed")

    @property
    def features(self) -> int:
        """Length of an image's feature vector."""
        return self.width + self.bottom_width


class Views(NamedTuple):
    """Outputs of the network, logits unless noted. In maps of cells, each cell describes the object that covers it."""

    kind: Float[Array, "B H W kinds"]  # of each pixel: background, then CLASSES
    texture: Float[Array, "B h w textures"]
    color: Float[Array, "B h w colors"]
    rgb: Float[Array, "B h w 3"]  # the object's own colour before light and texture, sRGB in [0, 1]
    turn: Float[Array, "B h w 2"]  # cosine and sine of SYMMETRY x rotation
    background: Float[Array, "B backgrounds"]
    warmth: Float[Array, "B"]  # of the light, in [-1, 1]
    azimuth: Float[Array, "B 2"]  # of the light: cosine and sine
    features: Float[Array, "B features"]


class JudgeNet(nn.Module):
    """Convolutions at a quarter and an eighth of the resolution with one skip connection; about 0.7M parameters."""

    config: JudgeConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Views:
        """Reads images in [0, 1] whose sides are multiples of 8 pixels."""
        config = self.config
        down, bottom, up = config.blocks
        x = nn.gelu(_conv(config.width // 2, stride=2, name="stem_0")(images - 0.5), approximate=True)
        x = _conv(config.width, stride=2, name="stem_1")(x)
        for i in range(down):
            x = Block(name=f"down_{i}")(x)
        across = x
        x = _conv(config.bottom_width, stride=2, name="lower")(x)
        for i in range(bottom):
            x = Block(name=f"bottom_{i}")(x)
        deep = x
        x = jnp.repeat(jnp.repeat(nn.Dense(config.width, name="raise")(x), 2, axis=1), 2, axis=2)
        x = x + nn.Dense(config.width, name="across")(across)
        for i in range(up):
            x = Block(name=f"up_{i}")(x)
        x = nn.gelu(GroupNorm(Compute(), GROUPS, name="norm")(x), approximate=True)
        features = jnp.concatenate([reduce(cells, "b h w d -> b d", "mean") for cells in (across, deep)], axis=-1)
        pixels = nn.Dense(CELL * CELL * KINDS, name="kind")(x)
        return Views(
            kind=rearrange(pixels, "b h w (y x k) -> b (h y) (w x) k", y=CELL, x=CELL),
            texture=nn.Dense(len(TEXTURES), name="texture")(x),
            color=nn.Dense(len(COLORS), name="color")(x),
            rgb=nn.sigmoid(nn.Dense(3, name="rgb")(x)),
            turn=nn.Dense(2, name="turn")(x),
            background=nn.Dense(len(BACKGROUNDS), name="background")(features),
            warmth=nn.Dense(1, name="warmth")(features)[:, 0],
            azimuth=nn.Dense(2, name="azimuth")(features),
            features=features,
        )


class Block(nn.Module):
    """Norm, convolution, norm, convolution; a projection of the mean over the image is added in between."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        width = x.shape[-1]
        y = nn.gelu(GroupNorm(Compute(), GROUPS, name="norm_0")(x), approximate=True)
        y = _conv(width, name="conv_0")(y)
        y = y + nn.Dense(width, name="whole")(reduce(y, "b h w d -> b 1 1 d", "mean"))
        y = nn.gelu(GroupNorm(Compute(), GROUPS, name="norm_1")(y), approximate=True)
        return x + _conv(width, name="conv_1")(y)


def _conv(features: int, *, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(features, (3, 3), (stride, stride), name=name)


def init_params(config: JudgeConfig, key: Array) -> dict:
    """Random parameters, float32."""
    return JudgeNet(config).init(key, jnp.zeros((1, 64, 64, 3)))["params"]


def num_params(params: dict) -> int:
    """Total number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
