"""MergeAR's attention in training: over merged keys only (the library's) against over all keys with a mask (jax.nn).

python benchmarks/merged_attention.py
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from mergear import best

from mergevq_jax.generator.mask import first_of_group, merge_mask
from mergevq_jax.generator.merged_attention import merged_attention, merged_keys
from runtime_jax.cost import count_flops, table
from runtime_jax.nn.attention import attention

PREFIX, WINDOW = 2, 2
HEAD = ("L", "K", "form", "GFLOP", "gradient, ms", "temporary MB", "largest difference")


class Measured(NamedTuple):
    """Gradients of one form, and their cost."""

    gradients: list[np.ndarray]
    gflop: float
    seconds: float
    temporary: int  # bytes


def compile_gradients(attend: Callable, inputs: list[Any]) -> tuple[Any, Any]:
    """Traced and compiled gradients of the output's sum of squares; of the inputs, shapes are enough."""
    gradients = jax.grad(lambda *x: jnp.square(attend(*x).astype(jnp.float32)).sum(), argnums=(0, 1, 2))
    traced = jax.jit(gradients).trace(*inputs)
    return traced, traced.lower().compile()


def measure(attend: Callable, inputs: list[jax.Array], repeats: int) -> Measured:
    """Compiles and times gradients; the time is the best of `repeats` runs."""
    traced, compiled = compile_gradients(attend, inputs)
    seconds = best(lambda: jax.block_until_ready(compiled(*inputs)), repeats)
    found = [np.asarray(part) for part in compiled(*inputs)]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Measured(found, count_flops(traced.jaxpr.jaxpr) / 1e9, seconds, temporary)


def compare(length: int, keep: int, shape: tuple[int, int, int], repeats: int) -> list[tuple[str, ...]]:
    """Table rows for one length and number of kept tokens; `shape` is batch, heads and channels per head."""
    batch, heads, width = shape
    rng = np.random.default_rng(keep)
    inputs = [
        jnp.asarray(rng.normal(size=(batch, PREFIX + length, heads, width)), jnp.float32) for _ in ("q", "k", "v")
    ]
    groups = np.concatenate([np.tile(np.arange(keep), (batch, 1)), rng.integers(keep, size=(batch, length - keep))], 1)
    first = first_of_group(jnp.asarray(rng.permuted(groups, axis=1), jnp.int32))
    mask = merge_mask(first, window=WINDOW, prefix=PREFIX)
    keys = merged_keys(first, keep, window=WINDOW, prefix=PREFIX)
    masked = measure(functools.partial(attention, mask=mask), inputs, repeats)
    merged = measure(lambda *x: merged_attention(*x, keys), inputs, repeats)
    error = max(np.abs(a - b).max() for a, b in zip(masked.gradients, merged.gradients, strict=True))
    rows = [
        (str(length), str(keep), name, f"{m.gflop:.2f}", f"{1e3 * m.seconds:.1f}", f"{m.temporary / 1e6:.1f}", "")
        for name, m in (("mask", masked), ("merged", merged))
    ]
    ratios = [masked.gflop / merged.gflop, masked.seconds / merged.seconds, masked.temporary / merged.temporary]
    return [*rows, (str(length), str(keep), "mask / merged", *(f"{ratio:.2f}x" for ratio in ratios), f"{error:.1e}")]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2304])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5625, 0.25], help="K / L")
    parser.add_argument("--shape", type=int, nargs=3, default=[2, 6, 64], help="batch, heads, channels per head")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{args.shape}, float32, {device.device_kind} ({device.platform}), jax {jax.__version__}\n")
    cases = [(length, round(ratio * length)) for length in args.lengths for ratio in args.ratios]
    rows = [row for length, keep in cases for row in compare(length, keep, tuple(args.shape), args.repeats)]
    print("\n".join(table(HEAD, rows)))


if __name__ == "__main__":
    main()
