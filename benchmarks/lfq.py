"""Entropy terms of lookup-free quantisation: factored (the library's) against dense (over all 2^b codes).

python benchmarks/lfq.py
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergevq_jax.tokenizer.quantizers import lfq

TEMPERATURE, EPS = 0.01, 1e-5


class Measured(NamedTuple):
    """Loss and gradient of one form, and their cost."""

    value: float
    gradient: np.ndarray  # [N, b]
    seconds: float
    temporary: int  # bytes


def factored(z: jax.Array) -> jax.Array:
    """Entropy loss of features [N, b], computed by the library."""
    return lfq.entropy_terms(z, temperature=TEMPERATURE, eps=EPS).loss


def dense(z: jax.Array) -> jax.Array:
    """Entropy loss of features [N, b], from a softmax over a codebook [2^b, b] (MAGVIT-v2, arXiv 2310.05737)."""
    codebook = lfq.from_indices(jnp.arange(2 ** z.shape[1]), z.shape[1]).astype(z.dtype)
    logits = (2 / TEMPERATURE) * jnp.einsum("nb,cb->nc", z, codebook, precision="highest")
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    probability = jnp.exp(log_probability)
    per_sample = -jnp.mean(jnp.sum(probability * log_probability, axis=-1))
    mean = probability.mean(axis=0)
    return per_sample + jnp.sum(mean * jnp.log(mean + EPS))


def measure(loss: Callable, z: np.ndarray, repeats: int) -> Measured:
    """Compiles a loss with its gradient and times it; the time is the best of `repeats` runs."""
    z = jnp.asarray(z)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(z).compile()
    seconds = []
    for _ in range(repeats + 1):  # the first run is a warm-up: it also pages in memory
        start = time.perf_counter()
        value, gradient = jax.block_until_ready(compiled(z))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Measured(float(value), np.asarray(gradient), min(seconds[1:]), temporary)


def compare(bits: int, tokens: int, repeats: int) -> list[str]:
    """Table rows for one code length."""
    # Bits are uncertain for |z| < TEMPERATURE, so features of that size spread over many codes.
    z = (TEMPERATURE * np.random.default_rng(bits).normal(size=(tokens, bits))).astype(np.float32)
    ours, theirs = measure(factored, z, 10 * repeats), measure(dense, z, repeats)
    error = np.abs(ours.gradient - theirs.gradient).max() / np.abs(theirs.gradient).max()
    return [
        _row(bits, "factored", f"{1e3 * ours.seconds:.2f}", f"{ours.temporary / 1e6:.2f}", f"{ours.value:.6f}", ""),
        _row(bits, "dense", f"{1e3 * theirs.seconds:.2f}", f"{theirs.temporary / 1e6:.2f}", f"{theirs.value:.6f}", ""),
        _row(
            bits,
            "dense / factored",
            f"{theirs.seconds / ours.seconds:.0f}x",
            f"{theirs.temporary / ours.temporary:.0f}x",
            f"differ by {abs(ours.value - theirs.value):.1e}",
            f"{error:.1e}",
        ),
    ]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[10, 18], help="code lengths b")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="of the dense form; the factored one runs 10x as often")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{args.tokens} tokens, float32, {device.device_kind} ({device.platform}), jax {jax.__version__}\n")
    print(_row("bits", "form", "value and gradient, ms", "temporary MB", "loss, nats", "gradient, relative error"))
    print(_row(*["---"] * 6))
    for bits in args.bits:
        print("\n".join(compare(bits, args.tokens, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
