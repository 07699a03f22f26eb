"""Attention of long sequences, forward and backward: the backends that run here, or on TPUs that are not there.

python benchmarks/attention.py                                     # 4608 tokens: FLUX at 1024 px
python benchmarks/attention.py --topology v5e:2x2                 # memory alone; needs the extra `ahead`
"""

import argparse
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from merged_attention import compile_gradients, measure

from launch.compile_ahead import topology
from runtime_jax.cost import count_flops, table
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.attention import attention

SHAPE = (1, 4608, 24, 128)
HEAD = ("backend", "GFLOP", "temporary MB a device", "gradient, ms", "largest difference")


class Row(NamedTuple):
    """One backend; what only a run can tell is None for TPUs that are not there."""

    backend: str
    gflop: float
    temporary: int  # bytes
    seconds: float | None = None
    error: float | None = None  # largest difference to xla's gradients, as a share of the largest gradient


def run(shape: tuple[int, int, int, int], dtype: str, repeats: int) -> list[Row]:
    """Times on this device; `shape` is batch, tokens, heads and channels of a head."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for _ in ("q", "k", "v")]
    kernel = {"gpu": ["cudnn"], "tpu": ["tpu_flash"]}.get(jax.default_backend(), [])
    rows, reference = [], None
    for backend in ("xla", *kernel):
        found = measure(functools.partial(attention, backend=backend), inputs, repeats)
        gradients = [part.astype(np.float32) for part in found.gradients]
        reference = gradients if reference is None else reference
        pairs = zip(gradients, reference, strict=True)
        error = max(float(np.abs(ours - xla).max() / np.abs(xla).max()) for ours, xla in pairs)
        rows.append(Row(backend, found.gflop, found.temporary, found.seconds, error))
    return rows


def ahead(name: str, shape: tuple[int, int, int, int], dtype: str) -> list[Row]:
    """Memory on a TPU slice, whose chips share the heads."""
    mesh = make_mesh(MeshConfig(data=1, tensor=-1), topology(name)[1])
    split = jax.NamedSharding(mesh, jax.P(None, None, "tensor", None))
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=split)] * 3
    rows = []
    for backend in ("xla", "tpu_flash"):
        with jax.set_mesh(mesh):
            traced, compiled = compile_gradients(functools.partial(attention, backend=backend), inputs)
        gflop = count_flops(traced.jaxpr.jaxpr) / 1e9
        rows.append(Row(backend, gflop, compiled.memory_analysis().temp_size_in_bytes))
    return rows


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    ran = ("", "") if row.seconds is None else (f"{1e3 * row.seconds:.1f}", f"{row.error:.1e}")
    return row.backend, f"{row.gflop:.0f}", f"{row.temporary / 1e6:.1f}", *ran


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, help="batch, tokens, heads, channels of a head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--topology", help="TPUs that are not there, such as v5e:2x2")
    args = parser.parse_args()
    where = args.topology or f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    shape = tuple(args.shape)
    rows = ahead(args.topology, shape, args.dtype) if args.topology else run(shape, args.dtype, args.repeats)
    print(f"{shape}, {args.dtype}, {where}, jax {jax.__version__}\n")
    print("\n".join(table(HEAD, map(cells, rows))))


if __name__ == "__main__":
    main()
