"""Sampling speed: MergeAR at several K, plain autoregression, and a PyTorch Llama from transformers.

python benchmarks/mergear.py                                                   # a small model on CPU
python benchmarks/mergear.py --lengths 256 --batches 1                         # its smallest case
python benchmarks/mergear.py --preset L --dtype bfloat16 --torch-compile       # GPU

A step draws one code for each image of the batch. All steps cost the same, whatever the codes and the contents of the
KV cache. A step's time is therefore the time of `--steps` codes minus that of a quarter as many, divided by the
difference in steps; both runs have the cache of L tokens. This excludes one-time costs, such as zeroing gigabytes.
Parameters are random.

A step's floor is the larger of two times: its matmul FLOPs at the rate of the fastest square matmul, and the bytes that
it must read (weights and cache, once) at the rate of the fastest large copy. Both rates are measured beside each case.

The peer, if PyTorch is installed, is a Llama with the same number of blocks (head included), width and number of
logits. It has a static cache of all L tokens and samples with torch.multinomial.

The batch is split over all devices, and the rates are those of one device times the number of devices. On a CPU they
are not multiplied: XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two devices of the same cores. The peer
runs on one device.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizer import matmul_rates, random_like

from mergevq_jax.generator.config import PRESETS, GeneratorConfig
from mergevq_jax.generator.sampling.plan import Plan, SamplingConfig, make_plan
from mergevq_jax.generator.sampling.raster import run
from mergevq_jax.generator.transformer import SHARDING_RULES, Params, param_shapes
from runtime_jax.cost import count_flops, table
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, stream_key
from runtime_jax.sharding import param_shardings, place, replicated

SMALL = GeneratorConfig(num_layers=6, dim=384, num_heads=6, head_layers=1)  # small enough that overhead dominates
COPY_BYTES = 2**28
HEAD = ("L", "batch", "sampler", "slots", "ms a step", "tokens/s", "floor, ms", "bound by", "of floor", "of peer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongPlan(Plan):
    """A plan for a few codes, with the KV cache of the whole image."""

    whole: Plan

    @property
    def slots(self) -> int:
        """Cache slots of the whole image."""
        return self.whole.slots


class Rates(NamedTuple):
    """Rates measured on this device."""

    flops: float  # per second
    bytes: float  # read or written per second


class Draw(NamedTuple):
    """A compiled sampling run."""

    run: Callable[[], object]
    steps: int


class Contender(NamedTuple):
    """One sampler at one length and batch."""

    length: int
    batch: int
    name: str
    slots: int
    draws: tuple[Draw, Draw]  # short, long
    flops: float = math.nan  # per step
    bytes: float = math.nan  # read per step


def samplers(config: GeneratorConfig, length: int, ratios: list[float]) -> Iterator[tuple[str, GeneratorConfig, dict]]:
    """Name, model and cache settings of each sampler: plain autoregression, and MergeAR at K = ratio x L."""
    side = math.isqrt(length)
    config = dataclasses.replace(config, grid=(side, side), merge_instruction=False)
    yield "plain", config, {}
    for ratio in ratios:
        kept = round(ratio * length)
        merged = dataclasses.replace(config, merge_instruction=True, keeps=(kept,))
        yield f"MergeAR, K = {kept}", merged, {"window": 2, "capacity": kept}


def sampler(
    name: str,
    config: GeneratorConfig,
    kv_cache: dict,
    *,
    steps: tuple[int, int],
    batch: int,
    cfg_scale: float,
    compute: Compute,
    mesh: jax.sharding.Mesh,
) -> Contender:
    """Compiles a sampler for a short and a long draw. The devices split the batch if their number divides it."""
    settings = SamplingConfig(cfg_scale=cfg_scale)
    kept = config.keeps[0] if config.merge_instruction else None
    whole, _ = make_plan(config, dataclasses.replace(settings, **kv_cache), kept, compute)
    params = random_like(np.random.default_rng(0), param_shapes(config))
    placed = place(params, param_shardings(params, SHARDING_RULES, mesh))
    numbers = jnp.arange(batch, dtype=jnp.int32)
    labels = numbers % config.num_classes
    merge = None if kept is None else jnp.zeros_like(labels)

    def draw(codes: int) -> tuple[Draw, float]:
        """A draw of `codes` codes, and the FLOPs of a step."""
        keep = kept and min(kept, codes)
        few = dataclasses.replace(config, grid=(1, codes), keeps=(keep or 1,))
        plan, knobs = make_plan(few, settings, keep, compute)
        rest = labels, merge, stream_key(0, Stream.SAMPLE), numbers, knobs
        arguments = placed, *jax.device_put(rest, replicated(mesh))
        with jax.set_mesh(mesh):
            traced = run.trace(*arguments, plan=LongPlan(**vars(plan), whole=whole))
        program, count = traced.lower().compile(), config.prefix + codes - 1
        return Draw(lambda: jax.block_until_ready(program(*arguments)), count), count_flops(traced.jaxpr.jaxpr) / count

    (short, _), (long, flops) = map(draw, steps)
    read = bytes_read(params, whole, batch, parts=mesh.size if batch % mesh.size == 0 else 1)
    return Contender(config.length, batch, name, whole.slots, (short, long), flops, read)


def seconds_a_step(contenders: list[Contender], repeats: int) -> list[float]:
    """Seconds of a step, from each contender's fastest draws. They run in turn, so other load slows all of them."""
    draws = [draw for contender in contenders for draw in contender.draws]
    for draw in draws:
        draw.run()
    best = np.min([[timed(draw.run) for draw in draws] for _ in range(repeats)], axis=0)
    steps = np.array([draw.steps for draw in draws])
    return (np.diff(best.reshape(-1, 2)) / np.diff(steps.reshape(-1, 2)))[:, 0].tolist()


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after a warm-up call."""
    call()
    return min(timed(call) for _ in range(repeats))


def bytes_read(params: Params, plan: Plan, batch: int, parts: int) -> float:
    """Bytes that a step must read: all weights of matmuls, on each device that has a part of the batch, and the keys
    and values of all cache slots.
    """
    config = plan.config
    weights = sum(leaf.size for name, part in params.items() if "emb" not in name for leaf in jax.tree.leaves(part))
    stored = 2 * config.num_layers * batch * plan.rows * plan.slots * config.dim
    return (parts * weights + stored) * jnp.dtype(plan.compute.jax_dtype).itemsize


def copy_rate(repeats: int) -> float:
    """Bytes read and written per second by the faster of two passes over a large array: a sum and a copy."""
    array = jnp.ones(COPY_BYTES // 4, jnp.float32)
    rates = []
    for function, passes in ((jnp.sum, 1), (lambda x: x + 1, 2)):
        call = functools.partial(jax.jit(function), array)
        rates.append(passes * COPY_BYTES / best(lambda call=call: call().block_until_ready(), repeats))
    return max(rates)


def peer(
    config: GeneratorConfig, length: int, *, batch: int, rows: int, dtype: str, compiled: bool, steps: tuple[int, int]
) -> Contender:
    """A PyTorch Llama with a static cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    llama = LlamaConfig(
        vocab_size=sum(config.vocab_sizes),
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers + config.head_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=length + 1,
    )
    model = LlamaForCausalLM(llama).to(device, getattr(torch, dtype)).eval()
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model

    @torch.inference_mode()
    def draw(codes: int) -> None:
        cache = StaticCache(config=llama, max_cache_len=length + 1)
        token = torch.zeros(batch * rows, 1, dtype=torch.long, device=device)
        for step in range(codes):
            position = torch.tensor([step], device=device)
            logits = forward(token, past_key_values=cache, cache_position=position, position_ids=position[None]).logits
            drawn = torch.multinomial(logits[:batch, -1].float().softmax(dim=-1), 1)
            token = drawn.repeat(rows, 1)
        if device == "cuda":
            torch.cuda.synchronize()

    draws = tuple(Draw(functools.partial(draw, codes), codes) for codes in steps)
    return Contender(length, batch, "Llama, PyTorch", length + 1, draws)


def line(row: Contender, seconds: float, peer_seconds: float | None, rates: Rates) -> list[str]:
    """Cells of one table row."""
    computing, reading = row.flops / rates.flops, row.bytes / rates.bytes
    floor = max(computing, reading)
    cells = [row.length, row.batch, row.name, row.slots, f"{1e3 * seconds:.2f}", f"{row.batch / seconds:.0f}"]
    bound = [f"{1e3 * floor:.2f}", "FLOPs" if computing > reading else "bytes", f"{seconds / floor:.1f}x"]
    cells += [""] * 3 if math.isnan(floor) else bound
    return [*map(str, cells), "" if peer_seconds is None else f"{peer_seconds / seconds:.2f}x"]


def contenders(args: argparse.Namespace, length: int, batch: int, compute: Compute) -> Iterator[Contender]:
    """The peer, if wanted, and all samplers."""
    config = PRESETS[args.preset] if args.preset else SMALL
    sizes = {"batch": batch, "steps": (args.steps // 4, args.steps)}
    if args.peer:
        options = {"dtype": args.dtype, "compiled": args.torch_compile, "rows": 1 + (args.cfg_scale != 1)}
        yield peer(config, length, **sizes, **options)
    how = {"cfg_scale": args.cfg_scale, "compute": compute, "mesh": make_mesh(MeshConfig())}
    for name, model, kv_cache in samplers(config, length, args.ratios):
        yield sampler(name, model, kv_cache, **sizes, **how)


def main() -> None:
    """Prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 6+1 layers, width 384, 6 heads")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="square numbers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.56, 0.25], help="K / L")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="other than 1: two network rows per image")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="timed draws per sampler; the best counts")
    parser.add_argument("--steps", type=int, default=64, help="codes of a long draw; at least 4")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--torch-compile", action="store_true")
    args = parser.parse_args()
    if wrong := [length for length in args.lengths if math.isqrt(length) ** 2 != length]:
        parser.error(f"--lengths {wrong} must be square numbers")
    if not 4 <= args.steps <= min(args.lengths):
        parser.error(f"--steps {args.steps} must be between 4 and the smallest of --lengths, {min(args.lengths)}")
    if args.peer and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed, so there is no peer\n")
        args.peer = False
    compute, device = Compute(dtype=args.dtype), jax.devices()[0]
    lines, records, seen = [], [], []
    for length, batch in itertools.product(args.lengths, args.batches):
        rows = list(contenders(args, length, batch, compute))
        rates = Rates(matmul_rates(args.dtype, args.repeats)[0], copy_rate(args.repeats))
        if device.platform != "cpu" and batch % jax.device_count() == 0:
            rates = Rates(*(jax.device_count() * rate for rate in rates))
        seen.append(rates)
        seconds = seconds_a_step(rows, args.repeats)
        for row, of_step in zip(rows, seconds, strict=True):
            lines.append(line(row, of_step, seconds[0] if args.peer else None, rates))
            figures = row._asdict()
            del figures["draws"]
            records.append({"seconds": of_step, "rates": rates._asdict(), **figures})
            print(" | ".join(lines[-1]), flush=True, file=sys.stderr)
    devices = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    print(f"{args.preset or 'small'}, {args.dtype}, {devices}, jax {jax.__version__}")
    low, high = (Rates(*np.divide(limit(seen, axis=0), 1e9)) for limit in (np.min, np.max))
    print(f"measured beside each case: matmul {low.flops:.0f} to {high.flops:.0f} GFLOP/s", end=", ")
    print(f"copy {low.bytes:.0f} to {high.bytes:.0f} GB/s\n")
    print("\n".join(table(HEAD, lines)))
    record = {
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "rows": records,
    }
    print(f"\n{json.dumps(record)}")


if __name__ == "__main__":
    main()
