"""How large things are, from shapes alone, and tables of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from runtime_jax.flops import count_flops


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def program_row(name: str, traced: Any, compile: bool) -> tuple[str, str, str]:
    """A traced program's name, its GFLOP, and, if it is to be compiled, the MB of temporary memory that it takes."""
    flops = count_flops(traced.jaxpr.jaxpr)
    memory = f"{traced.lower().compile().memory_analysis().temp_size_in_bytes / 1e6:.1f}" if compile else "(--compile)"
    return name, f"{flops / 1e9:,.1f}", memory
