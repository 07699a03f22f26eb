"""Blocks of FLUX's transformer, under FLUX's names.

Axes: B batch, N image tokens, T text tokens, R first text tokens, S = T + N joint tokens, text first, D width, H heads.

Shift, scale and gate vectors modulate a block; a linear layer computes them from the modulation vector y [B, D].
Tokens with an offset of y (`Offsets`) have vectors of their own, all others share their sample's.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from runtime_jax.nn.attention import attention
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.rotary import apply_rope
from runtime_jax.sharding import Axis, constrain
from tokenverse_jax.flux.math import layer_norm
from tokenverse_jax.flux.offsets import Offsets

MLP_RATIO = 4
QK_NORM_EPSILON = 1e-6
zeros = nn.initializers.zeros


class MLPEmbedder(nn.Module):
    """Linear, SiLU, linear, from a vector to the modulation vector's width; always in float32."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B D"]:
        x = nn.Dense(self.width, dtype=jnp.float32, name="in_layer")(x)
        return nn.Dense(self.width, dtype=jnp.float32, name="out_layer")(nn.silu(x))


class ModulationOut(NamedTuple):
    """float32 [B, 1, D] for all tokens of a sample, or [B, S, D]."""

    shift: Array
    scale: Array
    gate: Array


class Modulation(nn.Module):
    """SiLU and a linear layer, from y to one (single block) or two (double block) triples of shift, scale and gate."""

    triples: int
    compute: Compute

    @nn.compact
    def __call__(
        self, vec: Float[Array, "B D"], num_tokens: int, offsets: Float[Array, "B R D"] | None = None
    ) -> tuple[ModulationOut, ...]:
        """With offsets, a triple for each of `num_tokens`: from y + offset for the first R, from y for the others."""
        features = 3 * self.triples * vec.shape[-1]
        lin = nn.Dense(features, use_bias=False, dtype=self.compute.jax_dtype, kernel_init=zeros, name="lin")
        bias = self.param("bias", zeros, (features,))
        active = nn.silu(vec)[:, None]
        out = lin(active).astype(jnp.float32) + bias.astype(jnp.float32)[None, None]
        if offsets is not None:
            # Only the change by an offset goes through the layer token by token: an offset of zero changes exactly
            # nothing, and bfloat16 does not round a small one away.
            change = lin(nn.silu(vec[:, None] + offsets.astype(jnp.float32)) - active)
            plain = num_tokens - offsets.shape[1]
            out = out + jnp.pad(change.astype(jnp.float32), ((0, 0), (0, plain), (0, 0)))
        vectors = jnp.split(constrain(out, Axis.BATCH, None, None), 3 * self.triples, axis=-1)
        return tuple(ModulationOut(*vectors[i : i + 3]) for i in range(0, len(vectors), 3))


def dense(features: int, compute: Compute, name: str | None = None) -> nn.Dense:
    """A linear layer."""
    return nn.Dense(features, dtype=compute.jax_dtype, name=name)


def modulate(x: Array, shift: Array, scale: Array, compute: Compute) -> Array:
    """The normalised tokens, scaled and shifted."""
    return (layer_norm(x) * (1 + scale) + shift).astype(compute.jax_dtype)


def add_gated(x: Array, gate: Array, change: Array) -> Array:
    """The residual connection."""
    return constrain((x + gate * change).astype(x.dtype), Axis.BATCH, None, None)


def gelu(x: Array) -> Array:
    """The tanh approximation."""
    return nn.gelu(x, approximate=True)


class QKNorm(nn.Module):
    """RMSNorm of every head's query and key."""

    @nn.compact
    def __call__(
        self, query: Float[Array, "B S H head"], key: Float[Array, "B S H head"]
    ) -> tuple[Float[Array, "B S H head"], Float[Array, "B S H head"]]:
        def norm(name):
            return nn.RMSNorm(epsilon=QK_NORM_EPSILON, dtype=jnp.float32, name=name)

        return norm("query_norm")(query), norm("key_norm")(key)


def split_heads(qkv: Array, num_heads: int) -> list[Array]:
    """[B, S, 3 D] to query, key and value [B, S, H, head]."""
    qkv = rearrange(qkv, "b s (three h d) -> three b s h d", three=3, h=num_heads)
    return [constrain(part, Axis.BATCH, None, Axis.HEADS, None) for part in qkv]


def attend(query: Array, key: Array, value: Array, pe: Array, compute: Compute) -> Array:
    """Attention over the joint tokens with rotary positions, heads side by side again [B, S, D]."""
    query, key = (apply_rope(x, pe).astype(value.dtype) for x in (query, key))
    return rearrange(attention(query, key, value, backend=compute.attention), "b s h d -> b s (h d)")


class SelfAttention(nn.Module):
    """The projections of one stream, before and after the joint attention."""

    width: int
    num_heads: int
    compute: Compute

    def setup(self):
        self.qkv = dense(3 * self.width, self.compute)
        self.norm = QKNorm()
        self.proj = dense(self.width, self.compute)

    def heads(self, x: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Query, key, both normalised, and value [B, S, H, head]."""
        query, key, value = split_heads(self.qkv(x), self.num_heads)
        return *self.norm(query, key), value

    def out(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The projection of the attention's outputs."""
        return self.proj(x)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        width = x.shape[-1]
        x = constrain(dense(MLP_RATIO * width, self.compute, "in_layer")(x), Axis.BATCH, None, Axis.MLP)
        return dense(width, self.compute, "out_layer")(gelu(x))


class DoubleBlock(nn.Module):
    """Image and text with weights of their own and one joint attention; in the form that nn.scan takes."""

    num_heads: int
    compute: Compute

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "B N D"], Float[Array, "B T D"]],
        vec: Float[Array, "B D"],
        pe: Float[Array, "2 S pairs"],
        offsets: Offsets,
    ) -> tuple[tuple[Float[Array, "B N D"], Float[Array, "B T D"]], None]:
        img, txt = streams
        compute, width, text_tokens = self.compute, img.shape[-1], txt.shape[1]
        img_attn = SelfAttention(width, self.num_heads, compute, name="img_attn")
        txt_attn = SelfAttention(width, self.num_heads, compute, name="txt_attn")
        img_mod1, img_mod2 = Modulation(2, compute, name="img_mod")(vec, img.shape[1], offsets.image)
        txt_mod1, txt_mod2 = Modulation(2, compute, name="txt_mod")(vec, text_tokens, offsets.text_tokens())

        img_heads = img_attn.heads(modulate(img, img_mod1.shift, img_mod1.scale, compute))
        txt_heads = txt_attn.heads(modulate(txt, txt_mod1.shift, txt_mod1.scale, compute))
        joint = (jnp.concatenate(parts, axis=1) for parts in zip(txt_heads, img_heads, strict=True))
        attended = attend(*joint, pe, compute)
        img = add_gated(img, img_mod1.gate, img_attn.out(attended[:, text_tokens:]))
        txt = add_gated(txt, txt_mod1.gate, txt_attn.out(attended[:, :text_tokens]))

        img_change = Mlp(compute, name="img_mlp")(modulate(img, img_mod2.shift, img_mod2.scale, compute))
        txt_change = Mlp(compute, name="txt_mlp")(modulate(txt, txt_mod2.shift, txt_mod2.scale, compute))
        return (add_gated(img, img_mod2.gate, img_change), add_gated(txt, txt_mod2.gate, txt_change)), None


class SingleBlock(nn.Module):
    """Attention and MLP side by side over the joint tokens, with fused projections; in the form that nn.scan takes."""

    num_heads: int
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        vec: Float[Array, "B D"],
        pe: Float[Array, "2 S pairs"],
        offsets: Offsets,
    ) -> tuple[Float[Array, "B S D"], None]:
        compute, width = self.compute, x.shape[-1]
        tokens = x.shape[1]
        (mod,) = Modulation(1, compute, name="modulation")(vec, tokens, offsets.joint_tokens(tokens))
        hidden = dense((3 + MLP_RATIO) * width, compute, "linear1")(modulate(x, mod.shift, mod.scale, compute))
        qkv, mlp = jnp.split(hidden, [3 * width], axis=-1)
        query, key, value = split_heads(qkv, self.num_heads)
        attended = attend(*QKNorm(name="norm")(query, key), value, pe, compute)
        mlp = gelu(constrain(mlp, Axis.BATCH, None, Axis.MLP))
        change = dense(width, compute, "linear2")(jnp.concatenate([attended, mlp], axis=-1))
        return add_gated(x, mod.gate, change), None


class LastLayer(nn.Module):
    """Image tokens to velocities."""

    features: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], vec: Float[Array, "B D"]) -> Float[Array, "B N features"]:
        vectors = nn.Dense(2 * x.shape[-1], dtype=self.compute.jax_dtype, kernel_init=zeros, name="adaLN_modulation")(
            nn.silu(vec)[:, None]
        )
        shift, scale = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
        x = modulate(x, shift, scale, self.compute)
        x = nn.Dense(self.features, dtype=self.compute.jax_dtype, kernel_init=zeros, name="linear")(x)
        return constrain(x.astype(jnp.float32), Axis.BATCH, None, None)
