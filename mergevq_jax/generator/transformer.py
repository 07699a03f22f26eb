"""The generator's transformer, LlamaGen's with a factorised head (paper section 4.1), under the released names.

The index of a code is split into S sub-tokens. A raster token enters as the sum of their embeddings. The trunk's output
at the token before it, followed by the embeddings of its sub-tokens, then goes through the head's blocks, whose output
s gives the logits of sub-token s, predicted from those before it.

Axes: B batch, L raster tokens, P prefix tokens, N = P + L and n positions, D width, H heads, S sub-tokens, C slots.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.mask import causal_mask
from mergevq_jax.generator.merged_attention import MergedKeys, merged_attention
from mergevq_jax.generator.sampling.position_cache import attend, write
from mergevq_jax.generator.sub_tokens import split_indices
from mergevq_jax.tokenizer.layers import linear_normal
from runtime_jax.nn.attention import attention
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.rotary import apply_rope
from runtime_jax.prng import key_shape
from runtime_jax.sharding import Axis, Rule, constrain

Params = dict[str, Any]
Seen = Bool[Array, "#B n n"] | MergedKeys  # which positions a position sees


def rope_table(config: GeneratorConfig) -> Float[np.ndarray, "2 N pairs"]:
    """Cosines and sines of each position's rotation of queries and keys, for `apply_rope`.

    The first half of a head's pairs rotates by the raster row, the second by the column. The prefix is not rotated;
    with `zero_class_rope` the class token's row is zero, so that its query and key vanish.
    """
    pairs = config.head_dim // 4
    frequencies = config.rope_base ** -(np.arange(pairs) / pairs)
    rows, columns = np.divmod(np.arange(config.length), config.grid[1])
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1)
    table = np.stack([np.cos(angles), np.sin(angles)])
    table = np.concatenate([np.zeros((2, config.prefix, 2 * pairs)), table], axis=1)
    table[0, : config.prefix] = 1
    if config.zero_class_rope:
        table[:, 0] = 0
    return table.astype(np.float32)


def head_rope_table(config: GeneratorConfig) -> Float[np.ndarray, "2 S pairs"]:
    """The same for the head's positions: as released, the class token's row and the first of the raster."""
    table = np.delete(rope_table(config), np.arange(1, config.prefix), axis=1)
    return table[:, : len(config.vocab_sizes)]


def _dense(features: int, compute: Compute) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=compute.jax_dtype, kernel_init=linear_normal)


def _head(values: int, compute: Compute) -> nn.Dense:
    """Sums in float32 for any inputs: in bfloat16 the likeliest values would often be equal."""
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    zeros = nn.initializers.zeros
    return nn.Dense(values, use_bias=False, dtype=compute.jax_dtype, kernel_init=zeros, dot_general=product)


def _norm(config: GeneratorConfig, compute: Compute) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.norm_eps, dtype=compute.jax_dtype)


def _embed(count: int, config: GeneratorConfig, compute: Compute) -> nn.Embed:
    return nn.Embed(count, config.dim, dtype=compute.jax_dtype, embedding_init=linear_normal)


class Attention(nn.Module):
    """Self-attention with rotary positions, over a whole sequence or over a KV cache of keys and values."""

    config: GeneratorConfig
    compute: Compute

    def setup(self):
        self.wqkv = _dense(3 * self.config.dim, self.compute)
        self.wo = _dense(self.config.dim, self.compute)

    def __call__(
        self, x: Float[Array, "B n D"], rope: Float[Array, "2 *rows n pairs"], seen: Seen
    ) -> Float[Array, "B n D"]:
        query, key, value = self._project(x, rope)
        if isinstance(seen, MergedKeys):
            x = merged_attention(query, key, value, seen)
        else:
            x = attention(query, key, value, mask=seen, backend=self.compute.attention)
        return constrain(self.wo(rearrange(x, "b n h d -> b n (h d)")), Axis.BATCH, None, None)

    def step(
        self,
        x: Float[Array, "B n D"],
        rope: Float[Array, "2 *rows n pairs"],
        keys: Float[Array, "*B H C head"],
        values: Float[Array, "*B H C head"],
        slots: Int[Array, "B n"],
        visible: Bool[Array, "#B n C"],
    ) -> tuple[Float[Array, "B n D"], Float[Array, "*B H C head"], Float[Array, "*B H C head"]]:
        """Writes new positions to their slots, then attends from them to the slots visible to each."""
        query, key, value = self._project(x, rope)
        keys, values = write(keys, key, slots), write(values, value, slots)
        x = self.wo(rearrange(attend(query, keys, values, visible), "b n h d -> b n (h d)"))
        return constrain(x, Axis.BATCH, None, None), keys, values

    def _project(self, x, rope):
        qkv = rearrange(self.wqkv(x), "b n (three h d) -> three b n h d", three=3, h=self.config.num_heads)
        query, key, value = (constrain(part, Axis.BATCH, None, Axis.HEADS, None) for part in qkv)
        query, key = (apply_rope(part, rope).astype(value.dtype) for part in (query, key))
        return query, key, value


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    config: GeneratorConfig
    compute: Compute

    def setup(self):
        self.w1 = _dense(self.config.hidden_dim, self.compute)
        self.w3 = _dense(self.config.hidden_dim, self.compute)
        self.w2 = _dense(self.config.dim, self.compute)

    def __call__(self, x: Float[Array, "B n D"]) -> Float[Array, "B n D"]:
        return self._gated(self.w1(x), self.w3(x))

    def step(self, x: Float[Array, "B n D"], w13: Float[Array, "D 2 hidden"]) -> Float[Array, "B n D"]:
        """The same with the kernels of w1 and w3 side by side: one product that reads both."""
        gate, up = jnp.moveaxis(jnp.einsum("bnd,dtf->bntf", x, w13), 2, 0)
        return self._gated(gate, up)

    def _gated(self, gate: Float[Array, "B n hidden"], up: Float[Array, "B n hidden"]) -> Float[Array, "B n D"]:
        gated = constrain(nn.silu(gate) * up, Axis.BATCH, None, Axis.MLP)
        return constrain(self.w2(gated), Axis.BATCH, None, None)


class Block(nn.Module):
    """Pre-norm attention and feed-forward; the arguments are those of `Attention`."""

    config: GeneratorConfig
    compute: Compute

    def setup(self):
        self.attention_norm = _norm(self.config, self.compute)
        self.attention = Attention(self.config, self.compute)
        self.ffn_norm = _norm(self.config, self.compute)
        self.feed_forward = FeedForward(self.config, self.compute)

    def __call__(
        self, x: Float[Array, "B n D"], rope: Float[Array, "2 *rows n pairs"], seen: Seen
    ) -> tuple[Float[Array, "B n D"], None]:
        """For `nn.scan`, the second output is None."""
        x = x + self.attention(self.attention_norm(x), rope, seen)
        return constrain(x + self.feed_forward(self.ffn_norm(x)), Axis.BATCH, None, None), None

    def step(self, x, rope, keys, values, slots, visible, w13):
        """New positions; returns them and the KV cache's new keys and values."""
        attended, keys, values = self.attention.step(self.attention_norm(x), rope, keys, values, slots, visible)
        x = x + attended
        return x + self.feed_forward.step(self.ffn_norm(x), w13), keys, values


class Generator(nn.Module):
    """The transformer. Blocks are stacked along the first axis of their parameters.

    Attributes:
      config: sizes.
      compute: dtype, attention backend, remat.
    """

    config: GeneratorConfig
    compute: Compute = Compute()

    def setup(self):
        config, compute = self.config, self.compute
        self.code_emb = [_embed(size, config, compute) for size in config.vocab_sizes]
        self.class_emb = _embed(config.num_classes + (config.null_class is not None), config, compute)
        if config.merge_instruction:
            self.merge_emb = _embed(len(config.keeps), config, compute)
        if config.position_instruction:
            self.position_emb = self.param("position_emb", linear_normal, (1, config.dim))
        self.spatial_blocks = self._stack(config.num_layers)
        self.factorized_blocks = self._stack(config.head_layers)
        self.norm = _norm(config, compute)
        self.head = [_head(size, compute) for size in config.vocab_sizes]

    def _stack(self, length: int) -> nn.Module:
        block = nn.remat(Block, prevent_cse=False) if self.compute.remat else Block
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=length,
        )
        return scanned(self.config, self.compute)

    def __call__(
        self,
        indices: Int[Array, "B L"],
        labels: Int[Array, "B"],
        merge: Int[Array, "B"] | None = None,
        seen: Bool[Array, "#B N N"] | MergedKeys | None = None,
    ) -> tuple[Float[Array, "B L values"], ...]:
        """Logits of every sub-token of every code under teacher forcing: [B, L, values] for each sub-token, float32.

        Args:
          indices: codes in raster order.
          labels: classes, or the null class.
          merge: index in `keeps`; None for a model without merge instruction.
          seen: of `merge_mask` or `merged_keys`; None: plain autoregression.

        Raises:
          ValueError: a sequence of another length than the config's grid; a merge instruction missing or not known.
        """
        config = self.config
        if indices.shape[1] != config.length:
            raise ValueError(
                f"{indices.shape[1]} codes per image: this generator's grid {config.grid} has {config.length}"
            )
        prefix = self.embed_prefix(labels, merge)
        x = jnp.concatenate([prefix, self.embed_codes(indices[:, :-1])], axis=1)  # nothing follows the last code
        length = x.shape[1]
        if seen is None:
            seen = causal_mask(length)
        elif not isinstance(seen, MergedKeys):
            seen = seen[:, :length, :length]
        hidden = self.trunk(x, jnp.asarray(rope_table(config)[:, :length]), seen)
        return self.predict(hidden[:, config.prefix - 1 :], indices)

    def embed_codes(self, indices: Int[Array, "B n"]) -> Float[Array, "B n D"]:
        """The trunk's inputs for codes: the sum of their sub-tokens' embeddings."""
        return sum(self.embed_sub_token(index, part) for index, part in enumerate(self._split(indices)))

    def embed_sub_token(self, index: int, values: Int[Array, "B n"]) -> Float[Array, "B n D"]:
        """Embeddings of sub-token `index`."""
        return constrain(self.code_emb[index](values), Axis.BATCH, None, None)

    def embed_prefix(self, labels: Int[Array, "B"], merge: Int[Array, "B"] | None = None) -> Float[Array, "B P D"]:
        """The trunk's first inputs: class and merge instruction; arguments as in `__call__`."""
        if (merge is not None) != self.config.merge_instruction:
            raise ValueError(
                "this generator needs a merge instruction"
                if merge is None
                else "this generator has no merge instruction"
            )
        tokens = [self.class_emb(labels)] if merge is None else [self.class_emb(labels), self.merge_emb(merge)]
        return constrain(jnp.stack(tokens, axis=1), Axis.BATCH, None, None)

    def embed_positions(self, rope: Float[Array, "2 B n pairs"]) -> Float[Array, "B n D"]:
        """Position instructions (RandAR): the one learned vector, turned as a query at each of these positions."""
        heads = rearrange(self.position_emb, "1 (h d) -> 1 1 h d", h=self.config.num_heads)
        turned = apply_rope(jnp.broadcast_to(heads, (*rope.shape[1:3], *heads.shape[2:])), rope)
        x = rearrange(turned, "b n h d -> b n (h d)").astype(self.compute.jax_dtype)
        return constrain(x, Axis.BATCH, None, None)

    def trunk(
        self, x: Float[Array, "B n D"], rope: Float[Array, "2 *rows n pairs"], seen: Seen
    ) -> Float[Array, "B n D"]:
        """The blocks over positions: embedded inputs to hidden states."""
        return self.spatial_blocks(constrain(x, Axis.BATCH, None, None), rope, seen)[0]

    def predict(
        self, hidden: Float[Array, "B n D"], indices: Int[Array, "B n"]
    ) -> tuple[Float[Array, "B n values"], ...]:
        """Logits of each sub-token of `indices` from the hidden states that predict them and the sub-tokens before."""
        before = [self.embed_sub_token(index, part) for index, part in enumerate(self._split(indices)[:-1])]
        x = rearrange(jnp.stack([hidden, *before], axis=2), "b n s d -> (b n) s d")
        rope = jnp.asarray(head_rope_table(self.config))
        x, _ = self.factorized_blocks(constrain(x, Axis.BATCH, None, None), rope, causal_mask(x.shape[1]))
        x = rearrange(x, "(b n) s d -> s b n d", b=hidden.shape[0])
        return tuple(self.logits(index, part) for index, part in enumerate(x))

    def logits(self, index: int, x: Float[Array, "B n D"]) -> Float[Array, "B n values"]:
        """Logits of sub-token `index` from output `index` of the head's blocks, float32."""
        return constrain(self.head[index](self.norm(x)), Axis.BATCH, None, None)

    def _split(self, indices) -> Sequence[Array]:
        return split_indices(indices, self.config.vocab_sizes)


def init_params(config: GeneratorConfig, key: Array) -> Params:
    """Random parameters, float32; the heads start at zero, so a new model predicts a uniform distribution."""
    labels = jnp.zeros((1,), jnp.int32)
    merge = labels if config.merge_instruction else None
    return Generator(config).init(key, jnp.zeros((1, config.length), jnp.int32), labels, merge)["params"]


@functools.cache
def param_shapes(config: GeneratorConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing anything."""
    return jax.eval_shape(functools.partial(init_params, config), key_shape())


SHARDING_RULES: tuple[Rule, ...] = (
    (r"attention/wqkv/kernel", (None, Axis.EMBED, Axis.HEADS)),
    (r"attention/wo/kernel", (None, Axis.HEADS, Axis.EMBED)),
    (r"feed_forward/w[13]/kernel", (None, Axis.EMBED, Axis.MLP)),
    (r"feed_forward/w2/kernel", (None, Axis.MLP, Axis.EMBED)),
    (r"(code_emb_\d+|class_emb|merge_emb)/embedding", (None, Axis.EMBED)),
    (r"head_\d+/kernel", (Axis.EMBED, Axis.VOCAB)),
    (r".*/scale|position_emb|group_starts|ns_coeffs", ()),  # small; the last are Muon's
)
