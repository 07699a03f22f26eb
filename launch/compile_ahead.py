"""Compiles a training's step for a slice of TPUs that is not there, on any machine, and prints what it will cost.

    python -m launch.compile_ahead --config mergear_imagenet:L --topology v5e:4x4 --config.mesh.fsdp=16

It needs the extra `ahead` (libtpu). The step is the one that training compiles, from abstract state and batch. Exit
status 3: the program does not fit into a chip's memory.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from launch import slices
from mergevq_jax.cli import training
from mergevq_jax.generator import inspect as generator
from mergevq_jax.tokenizer import inspect as tokenizer
from runtime_jax import sharding
from runtime_jax.cli import overrides_of
from runtime_jax.cost import count, count_flops, peak_flops, size_of, table
from runtime_jax.training.program import Program

DOES_NOT_FIT = 3
# Otherwise libtpu looks for the TPU that this machine has not, and refuses a second process.
ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
LARGE = 2**20  # bytes of a leaf that is worth splitting


class Chip(NamedTuple):
    """One chip, from the maker's data sheet (cloud.google.com/tpu/docs); its peak is in `runtime_jax.cost`."""

    memory: float  # bytes
    bandwidth: float  # of memory, bytes per second
    links: float  # between chips, bytes per second, all together


CHIPS = {
    "v4": Chip(32 * 2**30, 1.228e12, 300e9),
    "v5e": Chip(16 * 2**30, 0.819e12, 200e9),
    "v5p": Chip(95 * 2**30, 2.765e12, 600e9),
    "v6e": Chip(32 * 2**30, 1.64e12, 448e9),
}
BETWEEN_SLICES = "between slices, "  # prefix of the collectives over the data-centre network
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="launch.compile_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="of mergevq train: a name or a path")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:2x2x2 or v6e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology (default: 1)")
    parser.add_argument("--keep", type=int, help="K of the step (default: the largest that is drawn)")
    parser.add_argument("--codes", action="store_true", help="a generator on codes, without its tokenizer")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        kind, devices = topology(args.topology, args.slices)
        overrides = overrides_of(args, rest, "launch.compile_ahead")
        report = compile_step(*training(args.config, overrides), kind, devices, keep=args.keep, codes=args.codes)
    except ValueError as error:
        print(f"launch.compile_ahead: {error}", file=sys.stderr)
        return 1
    shown = args.topology if args.slices == 1 else f"{args.slices} x {args.topology}"
    report = {"config": args.config, "overrides": overrides, "topology": shown, **report}
    print(render(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["fits"] else DOES_NOT_FIT


def topology(name: str, count: int = 1) -> tuple[str, list[jax.Device]]:
    """The kind of chip, and the devices of `count` such slices that need not be there.

    Raises:
      ValueError: a name that libtpu does not know, no slices, or no libtpu.
    """
    found = slices.find(name)
    if count < 1:
        raise ValueError(f"--slices {count}: at least 1")
    options = {"num_slices": count} if count > 1 else {}
    if found.name == "v4":  # otherwise every core is a device
        options["chip_config_name"] = "megacore"
    before = dict(os.environ)
    try:
        os.environ |= ABSENT
        description = topologies.get_topology_desc(f"{found.name}:{found.topology}", "tpu", **options)
        return found.name, list(description.devices)
    except Exception as error:
        missing = "libtpu" in str(error) or "not found" in str(error)
        hint = "; pip install -e '.[ahead]' brings libtpu" if missing else ""
        raise ValueError(f"topology {name!r}: {str(error).splitlines()[0]}{hint}") from error
    finally:
        for variable in ABSENT.keys() - before.keys():
            del os.environ[variable]
        os.environ |= before


def compile_step(
    config: Any, task: str, kind: str, devices: Sequence[jax.Device], *, keep: int | None, codes: bool
) -> dict[str, Any]:
    """Compiles the step that a config of `mergevq_jax.cli.training` trains, and measures the program."""
    program, batch, variant = abstract_program(config, task, devices, keep=keep, codes=codes)
    with jax.set_mesh(program.mesh):
        begin = time.perf_counter()
        traced = program.trace(batch, variant)
        lowered = traced.lower()
        compiling = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    memory, chip, chips = compiled.memory_analysis(), CHIPS[kind], len(devices)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    flops = count_flops(traced.jaxpr.jaxpr)
    cost = compiled.cost_analysis() or {}
    collectives = count_collectives(compiled.as_text())
    moved = sum(entry["bytes"] for kind, entry in collectives.items() if not kind.startswith(BETWEEN_SLICES))
    seconds = {
        "matmuls": flops / chips / peak_flops(f"TPU {kind}", "bfloat16"),
        "memory": cost.get("bytes accessed", 0.0) / chip.bandwidth,
        "links": moved / chip.links,
    }
    return {
        "chips": chips,
        "mesh": dict(program.mesh.shape),
        "variant": variant,
        "parameters": count(program.abstract_state.params),
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "total": total,
            "chip": chip.memory,
        },
        "flops": {"jaxpr": flops, "xla of one device": cost.get("flops", 0.0)},
        "bytes accessed of one device": cost.get("bytes accessed", 0.0),
        "collectives": collectives,
        "replicated": replicated_leaves(program),
        "seconds at least": seconds,
        "steps per second at most": 1 / max(seconds.values()),
        "seconds of tracing": compiling - begin,
        "seconds of compiling": end - compiling,
        "fits": total <= chip.memory,
    }


def abstract_program(
    config: Any, task: str, devices: Sequence[jax.Device], *, keep: int | None, codes: bool
) -> tuple[Program, dict[str, jax.ShapeDtypeStruct], int]:
    """The program of a config's training on these devices, a batch's shapes, and the largest K that is drawn."""
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch("data.batch_size", config.data.batch_size, mesh, config.accumulate)
    with jax.set_mesh(mesh):
        if task == "generator":
            program, batch = generator.abstract_step(config, mesh, codes=codes)
        else:
            program, batch = tokenizer.abstract_step(config, mesh)
    split = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split) for name, leaf in batch.items()}
    return program, batch, keep or max(config.merge_ratio.keeps)


def count_collectives(text: str) -> dict[str, dict[str, float]]:
    """Number and bytes (of the results on one device) of each kind of collective in an optimised program.

    One inside of a loop, such as that over stacked blocks, counts once. Of a collective between slices, the bytes are
    those that a device sends.
    """
    found: dict[str, Counter] = {}
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if sent := re.search(r"= \((\w+)\[([\d,]*)\].*? send\(.*_xla_megascale_transfer_type=\"(\w+)", line):
            entry = found.setdefault(BETWEEN_SLICES + sent[3].lower().replace("_", "-"), Counter())
            entry["count"] += 1
            entry["bytes"] += _BYTES.get(sent[1], 4) * math.prod(int(n) for n in sent[2].split(",") if n)
        elif match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            numbers = [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in shapes]
            size = sum(_BYTES.get(kind, 4) * count for kind, count in numbers)
            entry = found.setdefault(match[2], Counter())
            entry["count"] += 1
            entry["bytes"] += size / (2 if match[3] else 1)  # a start's result holds its operand too
    return {kind: dict(entry) for kind, entry in found.items()}


def replicated_leaves(program: Program) -> list[tuple[str, int]]:
    """Leaves of the state above 1 MiB that every device holds whole, and their bytes, the largest first."""
    leaves = jax.tree_util.tree_leaves_with_path(program.abstract_state)
    sizes = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), size_of(leaf))
        for path, leaf in leaves
        if leaf.sharding.is_fully_replicated and len(program.mesh.devices.flat) > 1
    ]
    return sorted((entry for entry in sizes if entry[1] > LARGE), key=lambda entry: -entry[1])


def render(report: Mapping[str, Any]) -> str:
    """The numbers as a Markdown table."""
    size, gib = report["bytes"], 2**30
    whole = sum(size for _, size in report["replicated"])
    rows = [
        ("slice, mesh", f"{report['topology']}, {report['mesh']}"),
        ("parameters", f"{report['parameters']:,}"),
        ("arguments, GiB a chip", f"{size['arguments'] / gib:.2f}"),
        ("temporaries, GiB a chip", f"{size['temporaries'] / gib:.2f}"),
        ("total, GiB a chip", f"{size['total'] / gib:.2f} of {size['chip'] / gib:.0f}"),
        ("TFLOP of a step", f"{report['flops']['jaxpr'] / 1e12:.1f}"),
        *(
            (f"{kind} (in loops: once)", f"{entry['count']} of {entry['bytes'] / 2**20:.1f} MiB in all")
            for kind, entry in sorted(report["collectives"].items())
        ),
        ("replicated leaves above 1 MiB", f"{len(report['replicated'])}, {whole / gib:.2f} GiB"),
        *((f"seconds at least, {name}", f"{value:.4f}") for name, value in report["seconds at least"].items()),
        ("steps per second at most", f"{report['steps per second at most']:.2f}"),
        ("seconds of tracing, compiling", f"{report['seconds of tracing']:.0f}, {report['seconds of compiling']:.0f}"),
    ]
    lines = table((f"{report['config']}, K = {report['variant']}", "fits" if report["fits"] else "DOES NOT FIT"), rows)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
