"""Samples MergeAR or plain autoregression in one compiled loop with a compressed KV cache (paper section 4.2).

Axes: B examples, R rows of the network (two for each example under guidance: its class and the null class), L raster
tokens, P prefix tokens, S sub-tokens, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.sampling import decode, position_cache
from mergevq_jax.generator.sampling.head import HeadSampler, check_drawn, draw_keys
from mergevq_jax.generator.sampling.plan import Knobs, Plan, SamplingConfig, checked_request, make_plan
from mergevq_jax.generator.sampling.position_cache import KVCache, PositionCache
from mergevq_jax.generator.transformer import Params, rope_table
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key


class Samples(NamedTuple):
    """What `sample` returns."""

    indices: Int[Array, "B L"]  # codes in raster order
    first_occurrence: Bool[Array, "B L"]  # tokens that were no duplicates of one in the KV cache
    kept: Bool[Array, "B L"]  # tokens that are in the KV cache at the end
    occupancy: Int[Array, "B L"]  # slots in use after each token, prefix included
    overflows: Int[Array, "B"]  # first occurrences that were evicted


class _Carry(NamedTuple):
    kv_cache: KVCache
    cache: PositionCache
    x: Float[Array, "R 1 D"]  # the next input
    slot: Int[Array, "B"]  # of its keys and values


def sample(
    params: Params,
    labels: Int[Array, "B"] | Int[np.ndarray, "B"],
    keep: int | None,
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
      keep: K, distinct tokens that the model is asked for, one of `keeps`; None without merge instruction.
      config: sizes of the generator.
      sampling: how to draw.
      seed: with an example's number it determines the example's random numbers, for any batch and mesh.
      examples: numbers of the examples; None: 0 to B - 1.
      compute: dtype, also of the KV cache.

    Raises:
      ValueError: this generator cannot sample so.
      NotFiniteError: logits that are not finite; names the first code that has them.
    """
    labels, examples, merge = checked_request(labels, examples, keep, config)
    plan, knobs = make_plan(config, sampling, keep, compute)
    samples = run(params, labels, merge, stream_key(seed, Stream.SAMPLE), examples, knobs, plan=plan)
    check_drawn(samples.indices, params)
    return samples


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
    """The compiled sampler: one scan over prefix and raster."""
    config, batch = plan.config, labels.shape[0]
    steps = config.prefix + config.length - 1  # the last code is drawn but never an input
    keys = draw_keys(example_keys(key, examples), config.length, len(config.vocab_sizes))
    sampler = _Sampler(params, plan, knobs, keys)
    prefix = sampler.prefix(labels, merge)
    carry = _Carry(
        kv_cache=decode.new_kv_cache(
            config, plan.compute, layers=config.num_layers, rows=batch * plan.rows, slots=plan.slots
        ),
        cache=position_cache.empty_cache(batch, plan.slots - config.prefix),
        x=prefix[:, :1],
        slot=jnp.zeros(batch, jnp.int32),
    )
    body = functools.partial(sampler.step, prefix)
    carry, (indices, first, occupancy) = lax.scan(body, carry, jnp.arange(steps))
    real = slice(config.prefix - 1, None)
    return Samples(
        indices=indices[real].T,
        first_occurrence=first[real].T,
        kept=position_cache.kept(carry.cache, config.length),
        occupancy=occupancy[real].T,
        overflows=carry.cache.overflows,
    )


class _Sampler(HeadSampler):
    """One step, and what all steps share."""

    def __init__(self, params: Params, plan: Plan, knobs: Knobs, keys: Key[Array, "L S B"]):
        super().__init__(params, plan, knobs)
        self.keys = keys

    def step(self, prefix: Float[Array, "R P D"], carry: _Carry, time: Int[Array, ""]):
        """Computes one position, draws the next code, and makes room for it."""
        plan, config = self.plan, self.config
        rope = lax.dynamic_slice_in_dim(jnp.asarray(rope_table(config)), time, 1, axis=1)
        visible = position_cache.visible(carry.cache, prefix=config.prefix, seen=time + 1)
        slot, visible = (self.rows(part)[:, None] for part in (carry.slot, visible))
        hidden, kv_cache = self.step_blocks(self.blocks, carry.kv_cache, carry.x, rope, slot, visible)

        following = time + 1 - config.prefix  # raster position of what comes next; below 0 that is the prefix
        in_raster, position = following >= 0, jnp.maximum(following, 0)
        indices, embedded = self.next_indices(hidden, self.knobs.scales[position], self.keys[position][..., None])
        index = indices[:, 0]
        placed = position_cache.insert(
            carry.cache, index, position, window=plan.window, capacity=plan.capacity, policy=plan.policy
        )
        cache = jax.tree.map(lambda new, old: jnp.where(in_raster, new, old), placed.cache, carry.cache)
        forced = lax.dynamic_slice_in_dim(prefix, jnp.minimum(time + 1, config.prefix - 1), 1, axis=1)
        carry = _Carry(
            kv_cache=kv_cache,
            cache=cache,
            x=jnp.where(in_raster, embedded, forced),
            slot=jnp.where(in_raster, config.prefix + placed.slot, time + 1),
        )
        occupancy = config.prefix + jnp.sum(cache.positions != position_cache.EMPTY, axis=1)
        return carry, (index, placed.first, occupancy)
