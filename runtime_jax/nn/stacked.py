"""Blocks of a kind as one scanned module."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from runtime_jax.nn.compute import Compute


def stacked(
    block: type[nn.Module], length: int, compute: Compute, *, in_axes: Any = nn.broadcast, unroll: int = 1
) -> Callable[..., nn.Module]:
    """A row of blocks as one scanned module; their parameters are stacked along the first axis."""
    return nn.scan(
        nn.remat(block, prevent_cse=False) if compute.remat else block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=unroll,
    )
