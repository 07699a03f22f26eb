"""Decodes a full grid of codes: transformer with convolutional positions, then adaptive GroupNorm and upsampling.

Axes: B batch, h w grid of raw tokens, L = h w, C channels of a code, D width.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.layers import Block, DepthwiseConv, ResBlock, conv, conv_uniform
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.group_norm import GroupNorm
from runtime_jax.sharding import Axis, constrain


class Decoder(nn.Module):
    """The MergeVQ decoder."""

    config: TokenizerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, codes: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Unmerged codes of every raw position to images, nominally in [-1, 1] but not clipped."""
        config, compute = self.config, self.compute
        style = codes.astype(jnp.float32)
        x = conv(config.decoder_width, "conv_in", compute)(codes.astype(compute.jax_dtype))
        x = _PositionedBlocks(config, compute, name="attn")(x)
        res_block = nn.remat(ResBlock) if compute.remat else ResBlock
        for level, width in reversed(list(enumerate(config.widths))):
            x = AdaptiveGroupNorm(config.norm_num_groups, compute, name=f"adaptive_{level}")(x, style)
            for index in range(config.decoder_res_blocks[level]):
                x = res_block(width, config.norm_num_groups, compute, name=f"up_{level}_block_{index}")(x)
            if level:
                x = conv(4 * x.shape[-1], f"up_{level}_upsample", compute)(x)
                x = rearrange(x, "b h w (i j d) -> b (h i) (w j) d", i=2, j=2)
                x = constrain(x, Axis.BATCH, None, None, None)
        x = nn.silu(GroupNorm(compute, config.norm_num_groups, name="norm_out")(x))
        return conv(config.in_channels, "conv_out", compute)(x).astype(jnp.float32)


class _PositionedBlocks(nn.Module):
    """Scanned blocks; depthwise convolutions encode positions, so any grid works."""

    config: TokenizerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        grid = x.shape[1:3]
        x = x + DepthwiseConv(self.compute, name="pos_embed")(x)
        x = rearrange(x, "b h w d -> b (h w) d")
        block = nn.remat(Block, prevent_cse=False) if self.compute.remat else Block
        scan = nn.scan(
            lambda module, x: (module(x)[0], None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_att_blocks,
        )
        module = block(self.config.decoder_heads, self.config.layer_scale, self.compute, grid=grid, name="blocks")
        x, _ = scan(module, constrain(x, Axis.BATCH, None, None))
        return rearrange(x, "b (h w) d -> b h w d", h=grid[0])


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm with scale and bias from the standard deviation and mean of the codes over the image."""

    num_groups: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"], style: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        spread = jnp.sqrt(jnp.var(style, axis=(1, 2), ddof=1) + 1e-6)
        gamma = nn.Dense(x.shape[-1], kernel_init=conv_uniform, name="gamma")(spread)
        beta = nn.Dense(x.shape[-1], kernel_init=conv_uniform, name="beta")(style.mean(axis=(1, 2)))
        x = GroupNorm(self.compute, self.num_groups, affine=False, name="norm")(x)
        return x * gamma[:, None, None].astype(x.dtype) + beta[:, None, None].astype(x.dtype)
