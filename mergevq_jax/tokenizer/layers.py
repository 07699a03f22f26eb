"""Layers that encoder, decoder and source recovery share, under the released names.

Axes: B batch, H W image, N tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from mergevq_jax.tokenizer import tome
from runtime_jax.nn.attention import attention
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.gelu import gelu
from runtime_jax.nn.group_norm import GroupNorm
from runtime_jax.sharding import Axis, constrain, gathered

LAYER_NORM_EPSILON = 1e-5
linear_normal = nn.initializers.normal(0.02)  # the released one is truncated at +-2, a hundred standard deviations
# The default of the released convolutions: uniform with bound 1 / sqrt(fan_in).
conv_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def dense(features: int, name: str, compute: Compute) -> nn.Dense:
    """A linear layer of a transformer."""
    return nn.Dense(features, dtype=compute.jax_dtype, kernel_init=linear_normal, name=name)


def convolve(x, kernel, *args, **kwargs):
    """`jax.lax.conv_general_dilated` with a whole kernel.

    With a split one, XLA convolves once for each part, with too few channels to fill a matrix unit.
    """
    return jax.lax.conv_general_dilated(x, gathered(kernel), *args, **kwargs)


def conv(features: int, name: str, compute: Compute, *, size: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv:
    """A convolution with the padding of the released code: size // 2 on every side."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=bias,
        dtype=compute.jax_dtype,
        kernel_init=conv_uniform,
        conv_general_dilated=convolve,
        name=name,
    )


class DepthwiseConv(nn.Module):
    """A depthwise 3x3 convolution with bias; sums in float32.

    Written as nine shifted products, which compilers fuse into one pass over memory. On CPUs, XLA computes the weight
    gradient of its own depthwise convolution as a dense one's, which is D times the work.
    """

    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        height, width, channels = x.shape[1:]
        kernel = self.param("kernel", linear_normal, (3, 3, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = (
            padded[:, i : i + height, j : j + width].astype(jnp.float32) * kernel[i, j][None, None]
            for i in range(3)
            for j in range(3)
        )
        return (sum(shifted) + bias[None, None, None]).astype(self.compute.jax_dtype)


def layer_norm(name: str, compute: Compute) -> nn.LayerNorm:
    """LayerNorm over the width, statistics in float32."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=compute.jax_dtype, name=name)


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU and 3x3 convolution, with a 1x1 shortcut where the width changes."""

    features: int
    num_groups: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W features"]:
        residual = x
        x = nn.silu(GroupNorm(self.compute, self.num_groups, name="norm1")(x))
        x = conv(self.features, "conv1", self.compute, bias=False)(x)
        x = nn.silu(GroupNorm(self.compute, self.num_groups, name="norm2")(x))
        x = conv(self.features, "conv2", self.compute, bias=False)(x)
        if residual.shape[-1] != self.features:
            residual = conv(self.features, "nin_shortcut", self.compute, size=1, bias=False)(residual)
        return constrain(x + residual, Axis.BATCH, None, None, None)


class Attention(nn.Module):
    """Self-attention; also returns the keys' mean over heads, which is ToMe's metric."""

    num_heads: int
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], size: Float[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N head"]]:
        """`size`: raw tokens in each token; its logarithm is added to the logits ("proportional attention")."""
        width = x.shape[-1]
        qkv = dense(3 * width, "qkv", self.compute)(x)
        qkv = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.num_heads)
        query, key, value = (constrain(part, Axis.BATCH, None, Axis.HEADS, None) for part in qkv)
        key_bias = None if size is None else jnp.log(size)
        x = attention(query, key, value, key_bias=key_bias, backend=self.compute.attention)
        x = dense(width, "proj", self.compute)(rearrange(x, "b n h d -> b n (h d)"))
        return constrain(x, Axis.BATCH, None, None), key.mean(axis=2)


class Mlp(nn.Module):
    """Linear, GELU, linear; with a grid, a depthwise 3x3 convolution before the GELU."""

    compute: Compute
    grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        x = constrain(dense(4 * width, "fc1", self.compute)(x), Axis.BATCH, None, Axis.MLP)
        if self.grid is not None:
            x = rearrange(x, "b (h w) d -> b h w d", h=self.grid[0])
            x = rearrange(DepthwiseConv(self.compute, name="dwconv")(x), "b h w d -> b (h w) d")
        return constrain(dense(width, "fc2", self.compute)(gelu(x)), Axis.BATCH, None, None)


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    init: float

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        gamma = self.param("gamma", nn.initializers.constant(self.init), (x.shape[-1],))
        return x * gamma.astype(x.dtype)[None, None]


class Block(nn.Module):
    """Pre-norm transformer block that merges `merge_count` tokens between attention and MLP, by `merge_rule`."""

    num_heads: int
    layer_scale: float
    compute: Compute
    merge_count: int = 0  # token 0 is the class token and never merges
    grid: tuple[int, int] | None = None  # of the MLP's depthwise convolution
    merge_rule: str = "tome"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        size: Float[Array, "B N"] | None = None,
        source_map: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K"] | None, Int[Array, "B L"] | None]:
        """Returns the new tokens, sizes and source map; only blocks that merge need the last two."""
        attended, metric = Attention(self.num_heads, self.compute, name="attn")(
            layer_norm("norm1", self.compute)(x), size
        )
        x = x + LayerScale(self.layer_scale, name="ls1")(attended)
        if self.merge_count:
            matching = tome.MERGE_RULES[self.merge_rule](metric, self.merge_count, class_token=True)
            source_map = constrain(tome.merge_source_map(matching, source_map), Axis.BATCH, None)
            x, size = tome.merge(matching, x, size)
            size = constrain(size, Axis.BATCH, None)
        x = constrain(x, Axis.BATCH, None, None)
        x = x + LayerScale(self.layer_scale, name="ls2")(
            Mlp(self.compute, self.grid, name="mlp")(layer_norm("norm2", self.compute)(x))
        )
        return constrain(x, Axis.BATCH, None, None), size, source_map
