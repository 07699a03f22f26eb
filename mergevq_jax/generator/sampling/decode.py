"""A few positions at a time: the trunk over its KV cache, the head over the sub-tokens of one code.

The layers are unrolled, each with its own parameters and its own part of the KV cache, so that a loop over positions
reads both in place; a scan over stacked layers would copy each layer's slice at every step.

Axes: R rows, n positions, D width, C slots.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.sampling.position_cache import KVCache, empty_kv_cache
from mergevq_jax.generator.transformer import Block, Params
from runtime_jax.nn.compute import Compute


def cast(params: Params, compute: Compute) -> Params:
    """Casts kernels and embeddings to the compute dtype, once and not at every step."""

    def leaf(path: tuple[Any, ...], value: Array) -> Array:
        return value.astype(compute.jax_dtype) if path[-1].key in ("kernel", "embedding") else value

    return jax.tree_util.tree_map_with_path(leaf, params)


class Layer(NamedTuple):
    """Parameters of one block."""

    params: Params
    w13: Float[Array, "D 2 hidden"]  # the kernels of w1 and w3, for one product instead of two


def unstacked(blocks: Params) -> list[Layer]:
    """The layers of blocks stacked along the first axis; call it outside of the loop."""
    gate, up = (blocks["feed_forward"][name]["kernel"] for name in ("w1", "w3"))
    stacked = Layer(blocks, jnp.stack([gate, up], axis=-2))
    return [jax.tree.map(operator.itemgetter(layer), stacked) for layer in range(len(gate))]


def new_kv_cache(config: GeneratorConfig, compute: Compute, *, layers: int, rows: int, slots: int) -> KVCache:
    """An empty KV cache for this many blocks, in the dtype that they compute in."""
    return empty_kv_cache(layers, rows, config.num_heads, slots, config.head_dim, compute.jax_dtype)


def step(
    layers: list[Layer],
    kv_cache: KVCache,
    x: Float[Array, "R n D"],
    rope: Float[Array, "2 *rows n pairs"],
    slots: Int[Array, "R n"],
    visible: Bool[Array, "#R n C"],
    *,
    config: GeneratorConfig,
    compute: Compute,
) -> tuple[Float[Array, "R n D"], KVCache]:
    """New positions through all blocks of a stack.

    Args:
      layers: of `unstacked`.
      kv_cache: keys and values of the positions before them.
      x: their embeddings.
      rope: their rows of the stack's rope table.
      slots: where their keys and values go, all different.
      visible: slots that each of them sees, its own included.

    Returns:
      their outputs, and the KV cache that holds them as well.
    """
    block = Block(config, compute)
    keys, values = [], []
    for (params, w13), layer_keys, layer_values in zip(layers, kv_cache.keys, kv_cache.values, strict=True):
        x, layer_keys, layer_values = block.apply(
            {"params": params}, x, rope, layer_keys, layer_values, slots, visible, w13, method=Block.step
        )
        keys.append(layer_keys)
        values.append(layer_values)
    return x, KVCache(keys=tuple(keys), values=tuple(values))
