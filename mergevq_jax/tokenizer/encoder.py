"""Images to kept tokens: CNN (or patchify) downsampling, then transformer blocks that merge tokens.

Axes: B batch, H W image, L raw tokens, K kept tokens, D width, C channels of a code.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.layers import MATCHING, Block, ResBlock, conv, conv_uniform, convolve, dense, layer_norm
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.gelu import gelu
from runtime_jax.nn.group_norm import GroupNorm
from runtime_jax.sharding import Axis, constrain


@flax.struct.dataclass
class Encoded:
    """The encoder's output; `size` counts the raw tokens in each kept one."""

    z: Float[Array, "B K C"]  # before quantisation
    source_map: Int[Array, "B L"]  # kept token that each raw token went into
    size: Float[Array, "B K"]
    head: Float[Array, "B classes"] | None  # of the alignment head, if asked for
    hidden: Float[Array, "B 1+K D"]  # class token and kept tokens after the last block


class Encoder(nn.Module):
    """The MergeVQ encoder (paper section 3.2): G and G+R with CNN stages, R with one patchify convolution."""

    config: TokenizerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], *, keep: int, with_head: bool = False) -> Encoded:
        """Encodes images to `keep` tokens each.

        Args:
          images: in [-1, 1]; sides are multiples of the downsampling.
          keep: K, static: every value is another program.
          with_head: also compute the alignment head.

        Raises:
          ValueError: impossible image size or keep, or no alignment head.
        """
        config, compute = self.config, self.compute
        grid = config.grid(*images.shape[1:3])
        counts = config.merge_counts(grid[0] * grid[1], keep)
        if with_head and config.dist_head is None:
            raise ValueError("this tokenizer has no alignment head (dist_head is None)")
        x = _Stem(config, compute, name="stem")(images.astype(compute.jax_dtype))
        x = rearrange(x, "b h w d -> b (h w) d")
        x, size, source_map = _MergingBlocks(config, compute, counts, name="attn")(x)
        head = _AlignmentHead(config, compute, name="head")(x) if with_head else None
        z = nn.silu(GroupNorm(compute, config.norm_num_groups, name="norm_out")(x[:, 1:]))
        z = nn.Dense(config.z_channels, dtype=compute.jax_dtype, kernel_init=conv_uniform, name="conv_out")(z)
        return Encoded(
            z=z.astype(jnp.float32),
            source_map=source_map[:, 1:] - 1,
            size=size[:, 1:],
            head=head,
            hidden=x.astype(jnp.float32),
        )


class _Stem(nn.Module):
    """Downsampling to the raw tokens."""

    config: TokenizerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        config, compute = self.config, self.compute
        if config.isotropic is not None:
            patch, width = config.downsampling, config.isotropic
            x = nn.Conv(
                width,
                (patch, patch),
                (patch, patch),
                "VALID",
                dtype=compute.jax_dtype,
                conv_general_dilated=convolve,
                name="conv_in",
            )(x)
            return GroupNorm(compute, groups=width, name="norm_in")(x)
        x = conv(config.ch, "conv_in", compute, bias=False)(x)
        res_block = nn.remat(ResBlock) if compute.remat else ResBlock
        for level, (width, blocks) in enumerate(zip(config.widths, config.encoder_res_blocks, strict=True)):
            for index in range(blocks):
                x = res_block(width, config.norm_num_groups, compute, name=f"down_{level}_block_{index}")(x)
            if level < len(config.widths) - 1:
                x = conv(width, f"down_{level}_downsample", compute, stride=2)(x)
        return x


class _MergingBlocks(nn.Module):
    """Class token and blocks, which are not scanned: each has another number of tokens."""

    config: TokenizerConfig
    compute: Compute
    counts: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        batch, raw, width = x.shape
        cls_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, width))
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (batch, 1, width)).astype(x.dtype), x], axis=1)
        x = constrain(x, Axis.BATCH, None, None)
        size = jnp.ones((batch, raw + 1), jnp.float32)
        source_map = jnp.broadcast_to(jnp.arange(raw + 1, dtype=jnp.int32), (batch, raw + 1))
        keep = jax.checkpoint_policies.save_only_these_names(MATCHING)
        block = nn.remat(Block, policy=keep) if self.compute.remat else Block
        for index, count in enumerate(self.counts):
            x, size, source_map = block(
                self.config.encoder_heads,
                self.config.layer_scale,
                self.compute,
                count,
                merge_rule=self.config.merge_rule,
                name=f"blocks_{index}",
            )(x, size, source_map)
        return x, size, source_map


class _AlignmentHead(nn.Module):
    """Extra blocks, if any, then an MLP on the class token (paper section 3.4)."""

    config: TokenizerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        config, compute = self.config, self.compute
        for index in range(config.num_rep_blocks):
            x, _, _ = Block(config.encoder_heads, config.layer_scale, compute, name=f"blocks_{index}")(x)
        x = x[:, 0]
        width = 4 * x.shape[-1]
        x = gelu(dense(width, "fc1", compute)(x))
        x = gelu(dense(width, "fc2", compute)(x)) if config.dist_head == "layer3" else layer_norm("norm", compute)(x)
        return dense(config.num_classes, "out", compute)(x).astype(jnp.float32)
