"""Costs of programs: FLOPs from their jaxprs, sizes from shapes, and tables of both.

XLA's own count takes the body of a scan once, however often it runs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend as jex
import numpy as np

# Dense bfloat16 peaks of one device, FLOP/s, from the makers' data sheets; the first name that fits decides.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device by its data sheet; None if unknown or `dtype` is not bfloat16."""
    return next((peak for name, peak in PEAKS if name in device_kind and dtype == "bfloat16"), None)


# Matmuls of queries [T, D] with keys or values [S, D] for each head in cuDNN's attention, which has no jaxpr.
_CUDNN_MATMULS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count_flops(jaxpr: jex.core.Jaxpr) -> float:
    """FLOPs of a program's matmuls and convolutions, over all devices.

    The body of a scan counts once for every turn, that of a Pallas kernel for every cell of its grid.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # per output number
            holes = math.prod(equation.params["lhs_dilation"])  # zeros between inputs: a strided one's gradient
            groups = equation.params["batch_group_count"]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * taps / holes / groups
        elif matmuls := _CUDNN_MATMULS.get(equation.primitive.name):
            query, key = (operand.aval.shape for operand in equation.invars[:2])  # [B, T, H, D], [B, S, H, D]
            total += matmuls * 2 * math.prod(query) * key[1]
        total += _turns(equation) * sum(map(count_flops, jex.core.jaxprs_in_params(equation.params)))
    return total


def _turns(equation: jex.core.JaxprEqn) -> int:
    """How often the programs inside an equation run."""
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid)
        case "shard_map":  # on every device
            return equation.params["mesh"].size
    return 1


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size_rows(trees: Mapping[str, Any], unit: float = 1e6, digits: int = 1) -> list[tuple[str, str, str]]:
    """Rows of a table: names, numbers in each tree, and its bytes in `unit`."""
    return [(name, f"{count(tree):,}", f"{size_of(tree) / unit:.{digits}f}") for name, tree in trees.items()]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def program_row(name: str, traced: Any, compile: bool) -> tuple[str, str, str]:
    """A traced program's name, its GFLOP, and with `compile` the MB of temporary memory that it takes."""
    flops = count_flops(traced.jaxpr.jaxpr)
    memory = f"{traced.lower().compile().memory_analysis().temp_size_in_bytes / 1e6:.1f}" if compile else "(--compile)"
    return name, f"{flops / 1e9:,.1f}", memory
