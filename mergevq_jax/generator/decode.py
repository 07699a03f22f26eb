"""One position at a time: the trunk over the compressed store, the head over the sub-tokens of one code.

The layers are unrolled and each has its own parameters and its own part of the store, so that a loop over positions
reads both where they lie; a scan over stacked layers would copy each layer's slice at every step.

Axes: R rows, D width, C slots.
"""

import operator
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.position_cache import Store, empty_store
from mergevq_jax.generator.transformer import Block, Params
from runtime_jax.compute import Compute


def unstacked(blocks: Params) -> list[Any]:
    """Parameters of each block from those that are stacked along the first axis; to be called outside the loop."""
    layers = len(jax.tree.leaves(blocks)[0])
    return [jax.tree.map(operator.itemgetter(layer), blocks) for layer in range(layers)]


def new_store(config: GeneratorConfig, compute: Compute, *, layers: int, rows: int, slots: int) -> Store:
    """An empty store for this many blocks, in the dtype that they compute in."""
    return empty_store(layers, rows, config.num_heads, slots, config.head_dim, compute.jax_dtype)


def step(
    layers: list[Any],
    store: Store,
    x: Float[Array, "R 1 D"],
    rope: Float[Array, "2 1 pairs"],
    slot: Int[Array, "R"],
    visible: Bool[Array, "R C"],
    *,
    config: GeneratorConfig,
    compute: Compute,
) -> tuple[Float[Array, "R 1 D"], Store]:
    """One position through all blocks of a stack.

    Args:
      layers: of `unstacked`.
      store: keys and values of the positions before it.
      x: its embedding.
      rope: its row of the stack's rope table.
      slot: where its keys and values go.
      visible: slots that it sees, its own included.

    Returns:
      its output, and the store that holds it as well.
    """
    block = Block(config, compute)
    keys, values = [], []
    for params, layer_keys, layer_values in zip(layers, store.keys, store.values, strict=True):
        x, layer_keys, layer_values = block.apply(
            {"params": params}, x, rope, layer_keys, layer_values, slot, visible, method=Block.step
        )
        keys.append(layer_keys)
        values.append(layer_values)
    return x, Store(keys=tuple(keys), values=tuple(values))
