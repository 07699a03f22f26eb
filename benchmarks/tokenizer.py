"""Throughput of a tokenizer's encode, decode and train step, as a share of the device's measured matmul rate.

python benchmarks/tokenizer.py --preset gr-d64 --batch-size 1                          # CPU
python benchmarks/tokenizer.py --preset gr-d64 --batch-size 64 --dtype bfloat16        # GPU, TPU

FLOPs are counted as usual for MFU: matmuls and convolutions of the traced program, two per multiply-add, with padding;
norms, activations, softmax and merging are excluded. XLA's own count is printed beside it. XLA counts the body of a
scan only once, whatever its length, and excludes padded taps. On a shared CPU, trust the share in processor time: it
compares only the seconds in which this program ran.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mergevq_jax.tokenizer import model
from mergevq_jax.tokenizer import train as stage1
from mergevq_jax.tokenizer.config import PRESETS, TokenizerConfig
from mergevq_jax.tokenizer.losses.perceptual import load_lpips
from runtime_jax.cost import count_flops, peak_flops
from runtime_jax.nn.compute import Compute
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.update import Optimizer

MATMUL_SIZES = {"cpu": (768, 1536, 3072), "gpu": (4096, 8192, 16384), "tpu": (4096, 8192, 16384)}


class Program(NamedTuple):
    """A function to time; `carry` passes its first result to the next call as the first argument."""

    name: str
    function: Callable
    arguments: tuple
    carry: bool = False


class Measured(NamedTuple):
    """FLOPs and times of one program."""

    name: str
    flops: float  # per call
    xla_flops: float
    compile_seconds: float
    best: float  # seconds per call
    median: float
    cpu: float  # processor seconds per call, over all threads


def programs(
    config: TokenizerConfig,
    batch_size: int,
    compute: Compute,
    lpips: list[str],
    discriminator: stage1.DiscriminatorConfig,
) -> Iterator[Program]:
    """Encode, decode and train step at the training resolution, with random parameters."""
    rng = np.random.default_rng(0)
    params = random_like(rng, model.param_shapes(config))
    side = config.resolution
    images = rng.uniform(-1, 1, (batch_size, side, side, config.in_channels)).astype(np.float32)
    encode = functools.partial(model.encode, config=config, keep=config.keep, compute=compute)
    yield Program("encode", lambda params, images: encode(params, images=images), (params, jnp.asarray(images)))
    codes = np.sign(rng.normal(size=(batch_size, config.keep, config.z_channels))).astype(np.float32)
    sources = rng.integers(config.keep, size=(batch_size, config.raw_tokens)).astype(np.int32)
    decode = functools.partial(model.decode, config=config, grid=config.grid(side, side), compute=compute)
    yield Program(
        "decode",
        lambda params, codes, sources: decode(params, codes=codes, source_map=sources),
        (params, jnp.asarray(codes), jnp.asarray(sources)),
    )
    losses = stage1.LossConfig(perceptual_weight=1.0 if lpips else 0.0)
    step_config = stage1.StepConfig(model=config, compute=compute, losses=losses, discriminator=discriminator)
    optimizer = Optimizer.make(OptimizerConfig(b1=0.5, b2=0.9), total_steps=1000, batch_size=1)
    optimizers = stage1.Optimizers(optimizer, optimizer)
    shapes = jax.eval_shape(functools.partial(stage1.init_state, step_config, optimizers))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = state.replace(params=jax.tree.map(jnp.copy, params), disc_params=random_like(rng, shapes.disc_params))
    frozen = stage1.Frozen(lpips=load_lpips(*lpips) if lpips else None)
    batch = {"image": jnp.asarray(rng.integers(256, size=images.shape).astype(np.uint8))}
    step = functools.partial(stage1.train_step, config=step_config, optimizers=optimizers, keep=config.keep)
    yield Program("train", step, (state, frozen, batch), carry=True)


def random_like(rng: np.random.Generator, shapes: Any) -> Any:
    """Small random float32 leaves, so that nothing has to be compiled and activations neither vanish nor overflow."""
    return jax.tree.map(lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), shapes)


def measure(program: Program, steps: int, repeats: int) -> Measured:
    """Compiles a program and times `repeats` runs of `steps` calls each."""
    traced = jax.jit(program.function, donate_argnums=0 if program.carry else ()).trace(*program.arguments)
    flops = count_flops(traced.jaxpr.jaxpr)
    start = time.perf_counter()
    lowered = traced.lower()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    arguments, seconds, cpu = program.arguments, [], []
    for _ in range(repeats + 1):  # the first run also warms up
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            result = compiled(*arguments)
            if program.carry:
                arguments = (result[0], *arguments[1:])
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / steps)
        cpu.append((time.process_time() - cpu_start) / steps)
    return Measured(
        name=program.name,
        flops=flops,
        xla_flops=lowered.cost_analysis()["flops"],
        compile_seconds=compile_seconds,
        best=min(seconds[1:]),
        median=float(np.median(seconds[1:])),
        cpu=min(cpu[1:]),
    )


def matmul_rates(dtype: str, repeats: int) -> tuple[float, float]:
    """FLOP/s of the fastest of several square matmuls: per wall-clock second, and per processor second of the host."""
    rates, cpu_rates = [], []
    for size in MATMUL_SIZES[jax.default_backend()]:
        matrix = jnp.full((size, size), 1 / size, dtype)
        multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
        chain = max(1, 4096 // size)  # several calls in a row, so that launch time does not count
        for _ in range(repeats + 1):
            start, cpu_start, result = time.perf_counter(), time.process_time(), matrix
            for _ in range(chain):
                result = multiply(result, matrix)
            result.block_until_ready()
            rates.append(2 * size**3 * chain / (time.perf_counter() - start))
            cpu_rates.append(2 * size**3 * chain / (time.process_time() - cpu_start))
    return max(rates), max(cpu_rates)


def table(rows: list[Measured], batch_size: int, rates: tuple[float, float], peak: float | None) -> str:
    """A Markdown table of the measurements."""
    on_cpu = jax.default_backend() == "cpu"
    head = ["part", "GFLOP / image", "XLA counts", "s / batch", "median", "images/s", "GFLOP/s", "of matmul rate"]
    head += ["in processor time"] if on_cpu else []
    head += ["MFU"] if peak else []
    lines = [[*head, "compile, s"], ["---"] * (len(head) + 1)]
    for row in rows:
        achieved = row.flops / row.best
        cells = [row.name, f"{row.flops / batch_size / 1e9:.1f}", f"{row.xla_flops / batch_size / 1e9:.1f}"]
        cells += [f"{row.best:.4f}", f"{row.median:.4f}", f"{batch_size / row.best:.2f}", f"{achieved / 1e9:.1f}"]
        cells += [f"{achieved / rates[0]:.1%}"]
        cells += [f"{row.flops / row.cpu / rates[1]:.1%}"] if on_cpu else []
        cells += [f"{achieved / peak:.1%}"] if peak else []
        lines.append([*cells, f"{row.compile_seconds:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="gr-d64")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn", "tpu_flash"), default="xla")
    parser.add_argument("--parts", default="encode,decode,train", help="which parts to time, separated by commas")
    parser.add_argument("--steps", type=int, default=1, help="calls per timed run; use 10 or more on accelerators")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; rates use the best, the median is shown")
    parser.add_argument("--lpips", nargs="*", default=[], help="files, folders or hub ids of LPIPS weights")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - {"encode", "decode", "train"}:
        parser.error(f"--parts {','.join(sorted(unknown))}: choose from encode, decode, train")
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, args.dtype)
    compute = Compute(dtype=args.dtype, attention=args.attention)
    rows, rates = [], [matmul_rates(args.dtype, args.repeats)]
    for program in programs(PRESETS[args.preset], args.batch_size, compute, args.lpips, stage1.DiscriminatorConfig()):
        if program.name in parts:
            rows.append(measure(program, args.steps, args.repeats))
            rates.append(matmul_rates(args.dtype, args.repeats))  # again, because the load on the machine may change
    rate, cpu_rate = map(max, zip(*rates, strict=True))
    print(f"{args.preset}, batch of {args.batch_size}, {args.dtype}, {device.device_kind} ({device.platform})")
    print(f"matmul: {rate / 1e9:.1f} GFLOP/s measured" + (f", {peak / 1e12:.0f} TFLOP/s by data sheet" if peak else ""))
    print(f"\n{table(rows, args.batch_size, (rate, cpu_rate), peak)}\n")
    record = {
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "matmul_flops_per_second": rate,
        "matmul_flops_per_processor_second": cpu_rate,
        "parts": [row._asdict() for row in rows],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
