"""What the text of a program says that XLA has optimised: its collectives, and its largest arrays."""

import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices, "  # prefix of the collectives over the data-centre network
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_NOT_ARRAYS = (" parameter(", " tuple(", " get-tuple-element(", " bitcast(", " while(", " constant(", "-done(")


def count_collectives(text: str) -> dict[str, dict[str, float]]:
    """Number and bytes (of the results on one device) of each kind of collective; in a loop, once for every turn.

    The start and the end of a collective, which have one channel, count once. Of a collective between slices, the bytes
    are those that a device sends.
    """
    found: dict[tuple[str, str], tuple[int, float]] = {}  # turns and bytes, by kind and channel
    for line, turns in _executed(text):
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if sent := re.search(r"= \((\w+\[[\d,]*\]).*? send\(.*_xla_megascale_transfer_type=\"(\w+)", line):
            found[BETWEEN_SLICES + sent[2].lower().replace("_", "-"), line] = turns, _size(sent[1])
        elif match:
            channel = re.search(r"channel_id=(\d+)", line)
            key = match[2], channel[1] if channel else line
            size = _size(match[1]) / (2 if match[3] else 1)  # a start's result holds its operand too
            found[key] = max(found.get(key, (0, 0.0)), (turns, size))
    kinds: dict[str, dict[str, float]] = {}
    for (kind, _), (turns, size) in found.items():
        entry = kinds.setdefault(kind, {"count": 0, "bytes": 0.0})
        entry["count"] += turns
        entry["bytes"] += turns * size
    return kinds


def largest_arrays(text: str, count: int = 5) -> list[tuple[int, str, str]]:
    """Bytes, shape and origin of the largest results in memory on one device, one for each origin."""
    found: dict[str, tuple[int, str, str]] = {}
    fused = {name for line in text.splitlines() if " fusion(" in line for name in _calls(line)}
    for name, lines in _computations(text)[0].items():
        for line in lines if name not in fused else ():
            if any(word in line for word in _NOT_ARRAYS) or " = " not in line:
                continue
            origin = re.search(r'op_name="([^"]*)"', line)
            where = _shortened(origin[1]) if origin else "-"
            for kind, dims in _SHAPE.findall(line.split(" = ", 1)[1].split("(%", 1)[0]):
                size = _size(f"{kind}[{dims}]")
                if size > found.get(where, (0,))[0]:
                    found[where] = (size, f"{kind}[{dims}]", where)
    return sorted(found.values(), reverse=True)[:count]


def _shortened(origin: str) -> str:
    """The modules of an operation, without the names of transformations around them."""
    names = [part for part in re.split(r"[/()]", origin) if part]
    dropped = {"jit", "jvp", "transpose", "while", "body", "closed_call", "checkpoint", "rematted_computation", "vmap"}
    return "/".join(part for part in names if part not in dropped and not part.startswith("<"))


def _size(shapes: str) -> float:
    return sum(
        (_BYTES.get(kind) or int(re.sub(r"\D", "", kind) or 32) / 8) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shapes)
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", None
    for line in text.splitlines():
        if line and not line[0].isspace() and (match := _HEAD.match(line)):
            name = match[2]
            entry = name if match[1] else entry
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _executed(text: str) -> Iterator[tuple[str, int]]:
    """Each line of the program, and how often it runs."""
    bodies, entry = _computations(text)
    pending = [(entry, 1)]
    while pending:
        name, turns = pending.pop()
        for line in bodies.get(name, ()):
            yield line, turns
            if loop := _WHILE.search(line):
                pending.append((loop[2], turns * _turns(bodies, loop[1])))
            pending += [(called, turns) for called in _calls(line)]


def _calls(line: str) -> list[str]:
    return [name.strip().lstrip("%") for match in _CALLED.findall(line) for name in match.split(",")]


def _turns(bodies: Mapping[str, list[str]], condition: str) -> int:
    """Turns of a loop that counts up to a constant, such as a scan's; 1 for others."""
    limits = [int(n) for line in bodies.get(condition, ()) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)]
    return max(limits, default=1)
