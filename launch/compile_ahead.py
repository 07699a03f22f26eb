"""Compiles the programs of a training for a slice of TPUs that is not there, on any machine, and prints their costs.

    python -m launch.compile_ahead --config mergear_imagenet:L --topology v5e:4x4 --config.mesh.fsdp=16

It needs the extra `ahead` (libtpu). The step is the one that training compiles, from abstract state and batch. Exit
status 3: the program does not fit into a chip's memory.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from launch import hlo, programs, slices
from runtime_jax.cli import overrides_of
from runtime_jax.cost import count, count_flops, peak_flops, size_of, table
from runtime_jax.files import write_json
from runtime_jax.sharding import shard_bytes

DOES_NOT_FIT = 3
# Otherwise libtpu looks for the TPU that this machine has not, and only one process at a time may load it.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="launch.compile_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="of mergevq train or tokenverse learn: a name or a path")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:2x2x2 or v6e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology (default: 1)")
    parser.add_argument("--sample", action="store_true", help="the sampler instead of the train step")
    parser.add_argument("--batch-size", type=int, help="images of the sampler (default: one for each part of the mesh)")
    parser.add_argument("--keep", type=int, help="K (default: the largest of training, the usual one of sampling)")
    parser.add_argument("--codes", action="store_true", help="a generator's step on codes, without its tokenizer")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        kind, devices = topology(args.topology, args.slices)
        overrides = overrides_of(args, rest, "launch.compile_ahead")
        request = programs.Request(args.sample, args.keep, args.codes, args.batch_size)
        report = compile_program(*programs.read(args.config, overrides), kind, devices, request)
    except ValueError as error:
        print(f"launch.compile_ahead: {error}", file=sys.stderr)
        return 1
    where = args.topology if args.slices == 1 else f"{args.slices} x {args.topology}"
    report = {"config": args.config, "overrides": overrides, "topology": where, **report}
    print(render(report))
    if args.json:
        write_json(args.json, report)
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


def compile_program(
    config: Any,
    task: str,
    kind: str,
    devices: Sequence[jax.Device],
    request: programs.Request = programs.STEP,
) -> dict[str, Any]:
    """Compiles a program of a config for these chips, and measures it."""
    begin = time.perf_counter()
    subject = programs.trace(config, task, devices, request)
    known = known_before(subject)
    with jax.set_mesh(subject.mesh):
        lowered = subject.traced.lower()
        compiling = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return too_large(known, kind, error)
        end = time.perf_counter()
    memory, text, cost = compiled.memory_analysis(), _text(compiled), compiled.cost_analysis() or {}
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives = hlo.count_collectives(text) if text else None
    seconds = _bounds(known["flops"] / len(devices), kind, cost, collectives)
    return {
        **known,
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "total": total,
            "chip": CHIPS[kind].memory,
        },
        "largest": hlo.largest_arrays(text),
        "flops of one device by XLA, loops once": cost.get("flops", 0.0),
        "bytes accessed of one device, loops once": cost.get("bytes accessed", 0.0),
        "collectives": collectives,
        "seconds at least": seconds,
        "runs per second at most": 1 / max(seconds.values()),
        "seconds of tracing": compiling - begin,
        "seconds of compiling": end - compiling,
        "fits": total <= CHIPS[kind].memory,
    }


def _text(compiled: jax.stages.Compiled) -> str:
    """The optimised program; "" where XLA cannot print it, as with some of libtpu's asynchronous copies."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return ""


def known_before(subject: programs.Subject) -> dict[str, Any]:
    """What is known of a program before it is compiled."""
    return {
        "program": subject.name,
        "chips": subject.mesh.size,
        "mesh": dict(subject.mesh.shape),
        "numbers": {name: count(tree) for name, tree in subject.held.items()},
        "bytes held on one device": {
            name: sum(map(shard_bytes, jax.tree.leaves(tree))) for name, tree in subject.held.items()
        },
        "replicated": replicated_leaves(subject),
        "flops": count_flops(subject.traced.jaxpr.jaxpr),
    }


def too_large(known: Mapping[str, Any], kind: str, error: Exception) -> dict[str, Any]:
    """The report of a program for which XLA finds no room; its message lists the largest allocations."""
    found = re.search(r"Used ([\d.]+)([KMG]) of", str(error))
    used = float(found[1]) * 1024 ** (1 + "KMG".index(found[2])) if found else float("nan")
    sizes = {"total": used, "chip": CHIPS[kind].memory}
    return {**known, "bytes": sizes, "message": str(error), "fits": False}


def _bounds(
    flops: float, kind: str, cost: Mapping[str, float], collectives: Mapping[str, Mapping[str, float]] | None
) -> dict[str, float]:
    """Seconds that each resource of a chip needs at least, if nothing else kept it waiting."""
    seconds = {
        "matmuls": flops / peak_flops(f"TPU {kind}", "bfloat16"),
        "memory": cost.get("bytes accessed", 0.0) / CHIPS[kind].bandwidth,
    }
    if collectives is not None:
        within = (entry["bytes"] for name, entry in collectives.items() if not name.startswith(hlo.BETWEEN_SLICES))
        seconds["links"] = sum(within) / CHIPS[kind].links
    return seconds


def replicated_leaves(subject: programs.Subject) -> list[tuple[str, int]]:
    """Leaves above 1 MiB that every device holds whole, and their bytes, the largest first."""
    if len(subject.mesh.devices.flat) == 1:
        return []
    sizes = [
        (f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}", size_of(leaf))
        for name, tree in subject.held.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated
    ]
    return sorted((entry for entry in sizes if entry[1] > LARGE), key=lambda entry: -entry[1])


def render(report: Mapping[str, Any]) -> str:
    """The numbers as a Markdown table."""
    size, replicated = report["bytes"], report["replicated"]
    rows = [
        ("slice, mesh", f"{report['topology']}, {axes_of(report['mesh'])}"),
        *((f"{name}, numbers", f"{number:,}") for name, number in report["numbers"].items()),
        *((f"{name}, GiB a chip", _gib(held)) for name, held in report["bytes held on one device"].items()),
        *(
            (f"{name}, GiB a chip", _gib(size[name]))
            for name in ("arguments", "temporaries", "results")
            if name in size
        ),
        ("total, GiB a chip", f"{_gib(size['total'])} of {size['chip'] / 2**30:.0f}"),
        ("TFLOP", f"{report['flops'] / 1e12:.1f}"),
        ("replicated leaves above 1 MiB", f"{len(replicated)}, {_gib(sum(size for _, size in replicated))} GiB"),
        *((f"replicated: {name}", f"{size / 2**20:.0f} MiB") for name, size in replicated[:3]),
    ]
    if "message" in report:
        return "\n".join(
            [*table((f"{report['config']}, {report['program']}", "DOES NOT FIT"), rows), report["message"]]
        )
    if report["collectives"] is None:
        rows.append(("collectives", "unknown: XLA cannot print the program"))
    rows += [
        *((f"large: {where}", f"{shape}, {held / 2**20:.0f} MiB") for held, shape, where in report["largest"]),
        *(
            (kind, f"{entry['count']:.0f} of {entry['bytes'] / 2**20:.0f} MiB in all")
            for kind, entry in sorted((report["collectives"] or {}).items())
        ),
        *((f"seconds at least, {name}", f"{value:.4f}") for name, value in report["seconds at least"].items()),
        ("runs per second at most", f"{report['runs per second at most']:.3g}"),
        ("seconds of tracing, compiling", f"{report['seconds of tracing']:.0f}, {report['seconds of compiling']:.0f}"),
    ]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    return "\n".join(table((f"{report['config']}, {report['program']}", verdict), rows))


def axes_of(mesh: Mapping[str, int]) -> str:
    """The axes that split something, such as "data=4 tensor=2"."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one chip"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
