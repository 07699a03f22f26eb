"""Source recovery: predicts from the kept tokens which of them each raw position belongs to (paper section 3.3).

Axes: B batch, L raw tokens, K kept tokens, C channels of a code, D width.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from mergevq_jax.tokenizer.config import RecoveryConfig
from mergevq_jax.tokenizer.layers import Block, LayerScale, Mlp, ResBlock, dense, layer_norm
from runtime_jax.nn.attention import attention
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import Axis, constrain


class SourceRecovery(nn.Module):
    """L learned queries attend to the kept tokens; a shared head scores every query against every token.

    In the released layout kept tokens have no positions, so the module must guess from a code where it belongs. With
    `config.positions="starts"` the cell in which its group starts is known. Each code is placed there, and convolutions
    spread it; the token also gets that cell's query, and each score a learned bias for the offset from the cell.
    """

    config: RecoveryConfig
    raw_tokens: int  # L, of a training-size image
    num_groups: int = 1  # of GroupNorm
    layer_scale: float = 1e-5
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, codes: Float[Array, "B K C"], group_starts: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B L K"]:
        """Logits over the K kept tokens for each of the L raw positions.

        `group_starts`: raster position of each group's first member, L for an empty group; unused without positions.
        """
        config, compute = self.config, self.compute
        width, placed = config.rec_embed_dim, config.positions == "starts"
        queries = self.param(
            "rec_tokens", nn.initializers.normal(0.02 if placed else 1e-6), (1, self.raw_tokens, width)
        )
        codes = codes.astype(compute.jax_dtype)
        tokens = dense(width, "rec_embed", compute)(codes)
        if placed:
            tokens += jnp.take(queries[0], group_starts, axis=0, mode="fill", fill_value=0).astype(compute.jax_dtype)
        keys = layer_norm("norm_in", compute)(tokens)
        x = jnp.broadcast_to(queries, (codes.shape[0], *queries.shape[1:])).astype(compute.jax_dtype)
        if placed:
            x = self._spread(_placed(x, dense(width, "rec_place", compute)(codes), group_starts))
        for index in range(config.num_layers):
            x = CrossAttentionBlock(config.num_heads, self.layer_scale, compute, name=f"blocks_{index}")(x, keys)
        for index in range(config.num_self_layers):
            x, _, _ = Block(config.num_heads, self.layer_scale, compute, name=f"self_blocks_{index}")(x)
        head = dense(width, "rec_head", compute)
        logits = jnp.einsum("bld,bkd->blk", head(x), head(keys), preferred_element_type=jnp.float32)
        return logits + self._offset_bias(group_starts) if placed else logits

    def _spread(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        side = math.isqrt(self.raw_tokens)
        x = rearrange(x, "b (h w) d -> b h w d", h=side)
        for index in range(self.config.num_res_blocks):
            x = ResBlock(x.shape[-1], self.num_groups, self.compute, name=f"res_blocks_{index}")(x)
        return rearrange(x, "b h w d -> b (h w) d")

    def _offset_bias(self, group_starts: Int[Array, "B K"]) -> Float[Array, "B L K"]:
        side = math.isqrt(self.raw_tokens)
        biases = self.param("offset_bias", nn.initializers.zeros, (2 * side - 1, 2 * side - 1))
        row, column = np.divmod(np.arange(self.raw_tokens), side)
        of_start = biases[row - row[:, None] + side - 1, column - column[:, None] + side - 1]  # [start, position]
        return jnp.swapaxes(jnp.take(of_start, group_starts, axis=0, mode="fill", fill_value=0), 1, 2)


def _placed(
    x: Float[Array, "B L D"], tokens: Float[Array, "B K D"], group_starts: Int[Array, "B K"]
) -> Float[Array, "B L D"]:
    """x with each token added in the cell in which its group starts; empty groups have none."""
    placed = jax.vmap(lambda x, tokens, starts: x.at[starts].add(tokens, mode="drop"))(x, tokens, group_starts)
    return constrain(placed, Axis.BATCH, None, None)


class CrossAttentionBlock(nn.Module):
    """Cross-attention to keys that are already normalised, then an MLP."""

    num_heads: int
    layer_scale: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], keys: Float[Array, "B K D"]) -> Float[Array, "B L D"]:
        width, heads = x.shape[-1], self.num_heads
        query = dense(width, "q", self.compute)(layer_norm("norm1", self.compute)(x))
        key, value = jnp.split(dense(2 * width, "kv", self.compute)(keys), 2, axis=-1)
        split = "b n (h d) -> b n h d"
        attended = attention(
            rearrange(query, split, h=heads),
            rearrange(key, split, h=heads),
            rearrange(value, split, h=heads),
            backend=self.compute.attention,
        )
        attended = dense(width, "proj", self.compute)(rearrange(attended, "b n h d -> b n (h d)"))
        x = x + LayerScale(self.layer_scale, name="ls1")(attended)
        return x + LayerScale(self.layer_scale, name="ls2")(
            Mlp(self.compute, name="mlp")(layer_norm("norm2", self.compute)(x))
        )


def source_loss(logits: Float[Array, "B L K"], source_map: Int[Array, "B L"]) -> Float[Array, ""]:
    """L_src: mean cross-entropy over the K groups, of all L positions, in nats."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probability, source_map[..., None], axis=-1))


def recovered_source_map(
    logits: Float[Array, "B L K"], group_starts: Int[Array, "B K"] | None = None
) -> Int[Array, "B L"]:
    """The likeliest group of each position.

    `group_starts` are the raster positions of the groups' first members, if known. A position is then in the group that
    starts there, or else in one that started before it; before the first start every group is possible.
    """
    if group_starts is not None:
        position, start = jnp.arange(logits.shape[1])[None, :, None], group_starts[:, None]
        possible = start <= position
        possible |= ~possible.any(axis=-1, keepdims=True)
        logits = jnp.where(start == position, jnp.inf, jnp.where(possible, logits, -jnp.inf))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
