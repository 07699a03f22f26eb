"""Draws codes from the trunk's outputs, sub-token by sub-token; the samplers of all orders share it.

Axes: B examples, R rows of the network (two for each example under guidance: its class and the null class), n codes
that are drawn side by side, P prefix tokens, S sub-tokens, V values of a sub-token, D width.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key

from mergevq_jax.generator.sampling import decode
from mergevq_jax.generator.sampling.draw import draw, guided, keep_likely, likeliest
from mergevq_jax.generator.sampling.plan import DrawPlan, Knobs
from mergevq_jax.generator.sub_tokens import join_indices
from mergevq_jax.generator.transformer import Generator, Params, head_rope_table
from runtime_jax.finite import check_finite
from runtime_jax.sharding import Axis, constrain

UNDRAWN = -1  # in place of a code: its logits were not finite


def check_drawn(indices: Int[Array, "B n"], params: Params) -> None:
    """Checks that all codes were drawn.

    Args:
      indices: in the order of drawing.
      params: of the generator.

    Raises:
      NotFiniteError: names the first code whose logits were not finite, and the parameters that are not.
    """
    check_finite({"the logits of code": _are_drawn(indices)}, {"generator": params})


@jax.jit
def _are_drawn(indices: Int[Array, "B n"]) -> Bool[Array, "n"]:
    return constrain((indices != UNDRAWN).all(axis=0), None)


def draw_keys(keys: Key[Array, "B"], codes: int, sub_tokens: int) -> Key[Array, "codes S B"]:
    """A key for every draw, from the examples' own; made before the loop, so that the loop only makes noise."""
    numbered = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(None, 0))
    drawn = numbered(keys, jnp.arange(codes * sub_tokens)).reshape(codes, sub_tokens, -1)
    return constrain(drawn, None, None, Axis.BATCH)


class HeadSampler:
    """The first and last parts of a sampler's step: the prefix, and the draw of codes."""

    def __init__(self, params: Params, plan: DrawPlan, knobs: Knobs):
        self.plan, self.config, self.knobs = plan, plan.config, knobs
        params = decode.cast(params, plan.compute)
        self.blocks = decode.unstacked(params["spatial_blocks"])
        self.head_blocks = decode.unstacked(params["factorized_blocks"])
        self.apply = functools.partial(Generator(plan.config, plan.compute).apply, {"params": params})
        self.step_blocks = functools.partial(decode.step, config=plan.config, compute=plan.compute)

    def rows(self, x: Array) -> Array:
        """[B, ...] -> [R, ...]: an example's two rows are adjacent, so a sharded batch stays sharded."""
        return jnp.repeat(x, self.plan.rows, axis=0)

    def prefix(self, labels: Int[Array, "B"], merge: Int[Array, "B"] | None) -> Float[Array, "R P D"]:
        """The embedded prefix."""
        labels = self.rows(labels)
        if self.plan.rows == 2:
            labels = jnp.where(jnp.arange(labels.shape[0]) % 2 == 0, labels, self.config.null_class)
        return self.apply(labels, None if merge is None else self.rows(merge), method=Generator.embed_prefix)

    def next_indices(
        self, hidden: Float[Array, "R n D"], scales: Float[Array, "S"], keys: Key[Array, "S B n"]
    ) -> tuple[Int[Array, "B n"], Float[Array, "R n D"]]:
        """Draws codes, each from the trunk's output that predicts it; returns them and their embeddings.

        A code whose logits are not finite is UNDRAWN.
        """
        plan, config, side_by_side = self.plan, self.config, hidden.shape[1]
        x = rearrange(hidden, "(b g) n d -> (b n g) 1 d", g=plan.rows)
        parts, rows = len(config.vocab_sizes), x.shape[0]
        kv_cache = decode.new_kv_cache(config, plan.compute, layers=config.head_layers, rows=rows, slots=parts)
        rope, values, embedded = jnp.asarray(head_rope_table(config)), [], []
        finite = jnp.ones(rows, bool)
        for index in range(parts):
            slots = jnp.full((rows, 1), index, jnp.int32)
            seen = (jnp.arange(parts) <= index)[None, None]
            x, kv_cache = self.step_blocks(self.head_blocks, kv_cache, x, rope[:, index : index + 1], slots, seen)
            logits = self.apply(index, x, method=Generator.logits)
            finite &= jnp.isfinite(logits).all(axis=(1, 2))
            values.append(self.next_values(index, logits, scales[index], keys[index].reshape(-1)))
            x = self.apply(index, self.rows(values[-1])[:, None], method=Generator.embed_sub_token)
            embedded.append(x)
        indices = rearrange(join_indices(values, config.vocab_sizes), "(b n) -> b n", n=side_by_side)
        finite = rearrange(finite, "(b n g) -> b n g", n=side_by_side, g=plan.rows).all(axis=-1)
        indices = jnp.where(finite, indices, UNDRAWN)
        return indices, rearrange(sum(embedded), "(b n g) 1 d -> (b g) n d", n=side_by_side, g=plan.rows)

    def next_values(
        self, index: int, logits: Float[Array, "rows 1 V"], scale: Float[Array, ""], keys: Key[Array, "Bn"]
    ) -> Int[Array, "Bn"]:
        """Draws sub-token `index` of every code."""
        plan, knobs = self.plan, self.knobs
        logits = rearrange(logits, "(b g) 1 v -> b g v", g=plan.rows)
        logits = guided(logits, scale) if plan.rows == 2 else logits[:, 0]
        if plan.greedy:
            return likeliest(logits)
        top_p = knobs.top_p[index] if plan.nucleus[index] else None
        logits = keep_likely(logits / knobs.temperature[index], plan.top_k[index], top_p)
        return draw(logits, keys)
