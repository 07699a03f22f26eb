"""Sampling MergeAR, or plain autoregression, in one compiled loop over a compressed store (paper section 4.2).

Axes: B examples, R rows of the network (two for each example under guidance: its class and the null class), L raster
tokens, P prefix tokens, S sub-tokens, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mergevq_jax.generator import decode, position_cache
from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.draw import draw, guided, keep_likely
from mergevq_jax.generator.plan import Knobs, Plan, SamplingConfig, make_plan
from mergevq_jax.generator.position_cache import PositionCache, Store
from mergevq_jax.generator.transformer import Generator, Params, head_rope_table, rope_table
from mergevq_jax.tokenizer.lfq import join_indices
from runtime_jax.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.sharding import Axis, constrain


class Samples(NamedTuple):
    """What `sample` returns."""

    indices: Int[Array, "B L"]  # codes in raster order
    first_occurrence: Bool[Array, "B L"]  # tokens that were no duplicate of one in the store
    occupancy: Int[Array, "B L"]  # slots in use once a token is in the store, prefix included
    overflows: Int[Array, "B"]  # first occurrences that the store had no room for


class _Carry(NamedTuple):
    store: Store
    cache: PositionCache
    x: Float[Array, "R 1 D"]  # the next input
    slot: Int[Array, "B"]  # where its keys and values go


def sample(
    params: Params,
    labels: Int[Array, "B"] | Int[np.ndarray, "B"],
    merge_number: int | None,
    *,
    config: GeneratorConfig,
    sampling: SamplingConfig,
    seed: int,
    examples: Int[Array, "B"] | Int[np.ndarray, "B"] | None = None,
    compute: Compute = Compute(),
) -> Samples:
    """Codes of one image for each label; a compiled program for each batch size and kind of sampling.

    Args:
      params: of `Generator`.
      labels: classes; the null class draws without one.
      merge_number: distinct tokens that the model is asked for, one of `merge_numbers`; None without merge instruction.
      config: sizes of the generator.
      sampling: how to draw.
      seed: with an example's number it determines the example's random numbers, whatever the batch and the mesh.
      examples: numbers of the examples; None: 0 to B - 1.
      compute: dtype, also of the store.

    Raises:
      ValueError: what is asked for is not possible with this generator.
    """
    labels = np.asarray(labels)
    _check_labels(labels, config)
    plan, knobs = make_plan(config, sampling, merge_number, compute)
    examples = np.arange(len(labels), dtype=np.int32) if examples is None else np.asarray(examples)
    if examples.shape != labels.shape:
        raise ValueError(f"{len(examples)} example numbers for {len(labels)} labels")
    merge = config.merge_index(merge_number)
    merge = None if merge is None else np.full(labels.shape, merge, np.int32)
    return run(params, labels, merge, stream_key(seed, Stream.SAMPLE), examples, knobs, plan=plan)


def _check_labels(labels: np.ndarray, config: GeneratorConfig) -> None:
    limit = config.num_classes + (config.null_class is not None)
    if not labels.size or labels.min() < 0 or labels.max() >= limit:
        null = "" if config.null_class is None else f", or the null class {config.null_class}"
        raise ValueError(f"labels {labels.tolist()}: classes are 0 to {config.num_classes - 1}{null}; at least one")


@functools.partial(jax.jit, static_argnames="plan")
def run(
    params: Params,
    labels: Int[Array, "B"],
    merge: Int[Array, "B"] | None,
    key: Key[Array, ""],
    examples: Int[Array, "B"],
    knobs: Knobs,
    *,
    plan: Plan,
) -> Samples:
    """The compiled sampler: one scan over prefix and raster, all of whose inputs are arrays."""
    config, batch = plan.config, labels.shape[0]
    steps = config.prefix + config.length - 1  # the last code is drawn and not looked at again
    sampler = _Sampler(params, plan, knobs, draw_keys(example_keys(key, examples), config))
    prefix = sampler.prefix(labels, merge)
    carry = _Carry(
        store=decode.new_store(
            config, plan.compute, layers=config.num_layers, rows=batch * plan.rows, slots=plan.slots
        ),
        cache=position_cache.empty_cache(batch, plan.slots - config.prefix),
        x=prefix[:, :1],
        slot=jnp.zeros(batch, jnp.int32),
    )
    body = functools.partial(sampler.step, prefix)
    carry, (codes, first, occupancy) = lax.scan(body, carry, jnp.arange(steps))
    real = slice(config.prefix - 1, None)
    return Samples(
        indices=codes[real].T,
        first_occurrence=first[real].T,
        occupancy=occupancy[real].T,
        overflows=carry.cache.overflows,
    )


def draw_keys(keys: Key[Array, "B"], config: GeneratorConfig) -> Key[Array, "L S B"]:
    """A key for every draw, from the examples' own; made before the loop, which has only the noise left to make."""
    shape = config.length, len(config.code_bits)
    numbered = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(None, 0))
    drawn = numbered(keys, jnp.arange(shape[0] * shape[1])).reshape(*shape, -1)
    return constrain(drawn, None, None, Axis.BATCH)


class _Sampler:
    """The parts of one step, with what all steps share."""

    def __init__(self, params: Params, plan: Plan, knobs: Knobs, keys: Key[Array, "L S B"]):
        self.plan, self.config, self.knobs, self.keys = plan, plan.config, knobs, keys
        self.blocks = decode.unstacked(params["spatial_blocks"])
        self.head_blocks = decode.unstacked(params["factorized_blocks"])
        self.apply = functools.partial(Generator(plan.config, plan.compute).apply, {"params": params})
        self.step_blocks = functools.partial(decode.step, config=plan.config, compute=plan.compute)

    def rows(self, x: Array) -> Array:
        """[B, ...] -> [R, ...]: an example's two rows lie side by side, so that a batch split over devices stays so."""
        return jnp.repeat(x, self.plan.rows, axis=0)

    def prefix(self, labels, merge) -> Float[Array, "R P D"]:
        """The embedded prefix."""
        labels = self.rows(labels)
        if self.plan.rows == 2:
            labels = jnp.where(jnp.arange(labels.shape[0]) % 2 == 0, labels, self.config.null_class)
        return self.apply(labels, None if merge is None else self.rows(merge), method=Generator.embed_prefix)

    def step(self, prefix: Float[Array, "R P D"], carry: _Carry, time: Int[Array, ""]):
        """Looks at one position, draws the next code, and makes room for it."""
        plan, config = self.plan, self.config
        rope = lax.dynamic_slice_in_dim(jnp.asarray(rope_table(config)), time, 1, axis=1)
        visible = position_cache.visible(carry.cache, prefix=config.prefix, seen=time + 1)
        x, slot = carry.x, self.rows(carry.slot)
        hidden, store = self.step_blocks(self.blocks, carry.store, x, rope, slot, self.rows(visible))

        position = time - (config.prefix - 1)  # of the code that comes next; below 0 it is the prefix that comes
        in_raster = position >= 0
        code, embedded = self.next_code(hidden, jnp.maximum(position, 0))
        placed = position_cache.insert(
            carry.cache, code, position, window=plan.window, capacity=plan.capacity, policy=plan.policy
        )
        cache = jax.tree.map(lambda new, old: jnp.where(in_raster, new, old), placed.cache, carry.cache)
        forced = lax.dynamic_slice_in_dim(prefix, jnp.minimum(time + 1, config.prefix - 1), 1, axis=1)
        carry = _Carry(
            store=store,
            cache=cache,
            x=jnp.where(in_raster, embedded, forced),
            slot=jnp.where(in_raster, config.prefix + placed.slot, time + 1),
        )
        occupancy = config.prefix + jnp.sum(cache.positions != position_cache.EMPTY, axis=1)
        return carry, (code, placed.first, occupancy)

    def next_code(self, hidden: Float[Array, "R 1 D"], position: Int[Array, ""]):
        """Draws a code sub-token by sub-token; returns it [B] and its embedding [R, 1, D]."""
        plan, config = self.plan, self.config
        parts, rows = len(config.code_bits), hidden.shape[0]
        store = decode.new_store(config, plan.compute, layers=config.head_layers, rows=rows, slots=parts)
        rope, scales, keys = jnp.asarray(head_rope_table(config)), self.knobs.scales[position], self.keys[position]
        x, values, embedded = hidden, [], []
        for index in range(parts):
            slot = jnp.full(rows, index, jnp.int32)
            seen = jnp.broadcast_to(jnp.arange(parts)[None] <= index, (rows, parts))
            x, store = self.step_blocks(self.head_blocks, store, x, rope[:, index : index + 1], slot, seen)
            logits = self.apply(index, x, method=Generator.logits)
            values.append(self.next_value(index, logits, scales[index], keys[index]))
            x = self.apply(index, self.rows(values[-1])[:, None], method=Generator.embed_sub_token)
            embedded.append(x)
        return join_indices(values, config.code_bits), sum(embedded)

    def next_value(
        self, index: int, logits: Float[Array, "R 1 V"], scale: Array, keys: Key[Array, "B"]
    ) -> Int[Array, "B"]:
        """Draws sub-token `index`."""
        plan, knobs = self.plan, self.knobs
        logits = rearrange(logits, "(b g) 1 v -> b g v", g=plan.rows)
        logits = guided(logits, scale) if plan.rows == 2 else logits[:, 0]
        if plan.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        top_p = knobs.top_p[index] if plan.nucleus[index] else None
        logits = keep_likely(logits / knobs.temperature[index], plan.top_k[index], top_p)
        return draw(logits, keys)
