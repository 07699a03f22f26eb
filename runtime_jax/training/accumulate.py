"""An update in several parts, for batches that do not fit in memory at once: gradients are summed over micro-batches.

Axes: B batch, A parts, M = B / A examples of a part.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from runtime_jax.sharding import platform

Batch = Mapping[str, Array]
Tree = Any


def accumulate(
    part: Callable[[Tree, Batch], tuple[Tree, Tree, Tree]], carry: Tree, batch: Batch, parts: int
) -> tuple[Tree, Tree, Tree]:
    """Mean gradients and metrics of a batch, a part at a time.

    A mean over examples comes out as that of the whole batch. What is no such mean (an entropy of the mean, batch
    statistics) is that of each part, averaged.

    On accelerators the parts are a loop, which holds the activations of one part. On CPUs they stand one after the
    other in the program: inside a loop XLA leaves convolutions in a form that it has no fast kernel for, and a step
    takes ten times as long. So a CPU saves no memory: XLA computes the parts side by side (benchmarks/README.md).

    Args:
      part: (carry, micro-batch) -> (gradients, carry, metrics).
      carry: what one part leaves to the next.
      batch: arrays [B, ...]; part a has the examples a, a + A, a + 2 A, ..., so that every device has its share.
      parts: A, which divides B.

    Returns:
      Mean gradients, the last carry, mean metrics.
    """
    if parts == 1:
        return part(carry, batch)
    micro = {name: rearrange(value, "(m a) ... -> a m ...", a=parts) for name, value in batch.items()}

    def body(sums, micro_batch):
        gradients, carry = sums
        new, carry, metrics = part(carry, micro_batch)
        return (jax.tree.map(jnp.add, gradients, new), carry), metrics

    first = jax.tree.map(lambda value: value[0], micro)
    shapes, _, _ = jax.eval_shape(part, carry, first)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    unroll = parts if platform() == "cpu" else 1
    (gradients, carry), metrics = jax.lax.scan(body, (zeros, carry), micro, unroll=unroll)
    gradients = jax.tree.map(lambda gradient: gradient / parts, gradients)
    return gradients, carry, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
