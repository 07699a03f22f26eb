"""An update in several parts, for batches too large for the memory: gradients are summed over micro-batches.

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

    Means over examples equal those of the whole batch. Everything else (an entropy of the mean, batch statistics) is
    computed for each part and averaged.

    On accelerators the parts are a loop, which holds the activations of one part. On CPUs the loop is unrolled: inside
    a loop XLA leaves convolutions in a form for which it has no fast kernel, and a step takes ten times as long. So a
    CPU saves no memory: XLA computes the parts side by side (benchmarks/README.md).

    Args:
      part: (carry, micro-batch) -> (gradients, carry, metrics).
      carry: what a part hands to the next one.
      batch: arrays [B, ...]; part a takes the examples a, a + A, a + 2 A, ..., so that every device has a share of it.
      parts: A, which divides B.

    Returns:
      Mean gradients, the last carry, mean metrics.
    """
    if parts == 1:
        return part(carry, batch)
    micro = {name: rearrange(value, "(m a) ... -> a m ...", a=parts) for name, value in batch.items()}
    part = jax.jit(part, inline=True)  # keeps the trace of eval_shape for the loop

    def body(sums, micro_batch):
        gradients, carry = sums
        new, carry, metrics = part(carry, micro_batch)
        return (jax.tree.map(jnp.add, gradients, new), carry), metrics

    shapes, _, _ = jax.eval_shape(part, carry, {name: value[0] for name, value in micro.items()})
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    unroll = parts if platform() == "cpu" else 1
    (gradients, carry), metrics = jax.lax.scan(body, (zeros, carry), micro, unroll=unroll)
    gradients = jax.tree.map(lambda gradient: gradient / parts, gradients)
    return gradients, carry, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
