"""Weights of other programs as a table: one rule a line, read in both directions.

A rule pairs a state-dict name with a path in the parameter tree, both as templates. `{i}` stands for a number, any
other `{name}` for one path component; `[i]` at the end of a target component, for a position on its leading axis:

    Rule("blocks.{i}.norm1.weight", "blocks_{i}/norm1/scale")          # one module a block
    Rule("blocks.{i}.attn.qkv.weight", "blocks[i]/attn/qkv/kernel", LINEAR)   # blocks stacked by nn.scan
    *joined(("to_q.weight", "to_k.weight", "to_v.weight"), "qkv/kernel", LINEAR)   # three source tensors in one
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runtime_jax.files import local, replacing
from runtime_jax.messages import cut
from runtime_jax.weights.published import recognized, unreadable, unwrapped


class WeightError(ValueError):
    """A state dict does not fit the table or the model; the message lists every mismatch."""


@dataclass(frozen=True)
class Transform:
    """A change of layout from source to target, and its inverse."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


IDENTITY = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Transform(  # [out, in, h, w] <-> [h, w, in, out]; a depthwise kernel [C, 1, h, w] <-> [h, w, 1, C] as well
    lambda x: np.transpose(x, (2, 3, 1, 0)), lambda x: np.transpose(x, (3, 2, 0, 1))
)
POINTWISE = Transform(  # [out, in, 1, 1], a 1x1 convolution <-> [in, out], a linear layer
    lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[:, :, None, None]
)

_PLACEHOLDER = re.compile(r"\{(\w+)\}|\[(\w+)\]")


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression; a placeholder that occurs twice must match the same text."""
    seen: set[str] = set()
    parts, end = [], 0
    for match in _PLACEHOLDER.finditer(template):
        name = match[1] or match[2]
        parts.append(re.escape(template[end : match.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{r'[0-9]+' if len(name) == 1 else r'[^./]+'})")
        seen.add(name)
        end = match.end()
    return re.compile("".join([*parts, re.escape(template[end:])]))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


@dataclass(frozen=True)
class Part:
    """One of several pieces that lie side by side along the last axis of an array, in the ratio of `shares`."""

    index: int
    shares: tuple[int, ...]

    def of(self, size: int) -> slice:
        """The slice of this piece on an axis of `size`."""
        if size % sum(self.shares):
            raise ValueError(f"{size} cannot be cut in the ratio {':'.join(map(str, self.shares))}")
        unit = size // sum(self.shares)
        return slice(unit * sum(self.shares[: self.index]), unit * sum(self.shares[: self.index + 1]))


@dataclass(frozen=True)
class Rule:
    """One line of a table: source name, target path ('/'-joined), change of layout.

    Placeholders of one letter match numbers, longer ones match a path component. A rule with a `part` fills only that
    part of the target; see `joined`.
    """

    source: str
    target: str
    transform: Transform = IDENTITY
    part: Part | None = None
    _source_pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _target_pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _stacked: str | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        stacked = re.search(r"\[(\w+)\]", self.target)
        object.__setattr__(self, "_source_pattern", _pattern(self.source))
        object.__setattr__(self, "_target_pattern", _pattern(re.sub(r"\[\w+\]", "", self.target)))
        object.__setattr__(self, "_stacked", stacked[1] if stacked else None)

    def to_target(self, name: str) -> tuple[str, int | None] | None:
        """Target path and position on the leading axis (None: not stacked) of a source name; None: no match."""
        match = self._source_pattern.fullmatch(name)
        if match is None:
            return None
        path = re.sub(r"\[\w+\]", "", _fill(self.target, match.groupdict()))
        return path, int(match[self._stacked]) if self._stacked else None

    def to_source(self, path: str, position: int | None) -> str | None:
        """The source name of a target path and position; None: no match."""
        match = self._target_pattern.fullmatch(path)
        if match is None or (position is None) != (self._stacked is None):
            return None
        values = match.groupdict() | ({} if position is None else {self._stacked: str(position)})
        return _fill(self.source, values)

    def is_stacked(self, path: str) -> bool:
        """Whether this rule fills `path` position by position on the leading axis."""
        return self._stacked is not None and self._target_pattern.fullmatch(path) is not None


def layer(source: str, target: str, kernel: Transform = LINEAR) -> tuple[Rule, ...]:
    """Weight and bias of a linear layer or convolution."""
    return Rule(f"{source}.weight", f"{target}/kernel", kernel), Rule(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """Weight and bias of a normalisation."""
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def prefixed(table: Sequence[Rule], source: str, target: str) -> tuple[Rule, ...]:
    """The same table one level down: `source` before every name, `target` before every path."""
    return tuple(replace(rule, source=source + rule.source, target=target + rule.target) for rule in table)


def joined(
    sources: Sequence[str], target: str, transform: Transform = IDENTITY, shares: Sequence[int] = ()
) -> tuple[Rule, ...]:
    """Rules for source tensors that lie side by side along the target's last axis, of equal size or in these ratios."""
    shares = tuple(shares) or (1,) * len(sources)
    return tuple(Rule(source, target, transform, Part(i, shares)) for i, source in enumerate(sources))


_Slot = tuple[int | None, Part | None]  # position on the leading axis, part of the last; None: all of it


def import_weights(
    table: Sequence[Rule], source: Mapping[str, np.ndarray], shapes: Any, *, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Fills a parameter tree from a state dict.

    If no name fits, a wrapper's prefix is removed from the names first (`published.unwrapped`).

    Args:
      table: rules; every source name must match exactly one, or a regular expression of `ignore`.
      source: state dict; arrays are taken as they are (no cast).
      shapes: nested dict of arrays or ShapeDtypeStructs: the tree to fill (as from `jax.eval_shape`).
      ignore: regular expressions (full match) of source names that are left out on purpose.

    Raises:
      WeightError: lists names without a rule, leaves not filled or filled twice, and shapes that differ; or says what
        the state dict is, if it is something else.
    """
    source = unwrapped(source, functools.partial(fits, table))
    expected = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    ignored = [re.compile(pattern) for pattern in ignore]
    found: dict[str, set[_Slot]] = {}
    leaves: dict[str, np.ndarray] = {}
    errors = []
    for name, array in source.items():
        if any(pattern.fullmatch(name) for pattern in ignored):
            continue
        matches = [(rule, hit) for rule in table if (hit := rule.to_target(name)) is not None]
        if len(matches) != 1:
            errors.append(f"{name} {tuple(array.shape)}: {'no rule' if not matches else 'several rules'} for this name")
            continue
        rule, (path, position) = matches[0]
        if path not in expected:
            errors.append(f"{name} {tuple(array.shape)}: the model has no parameter {path}")
            continue
        slots = found.setdefault(path, set())
        if any(_overlap((position, rule.part), slot) for slot in slots):
            errors.append(f"{name}: {path} is filled twice")
        slots.add((position, rule.part))
        try:
            value = rule.transform.forward(np.asarray(array))
            wanted = _slot_shape(expected[path], position, rule.part)
        except (ValueError, IndexError) as error:
            errors.append(f"{name} {tuple(array.shape)}: cannot become {path} {expected[path]} ({error})")
            continue
        if value.shape != wanted:
            errors.append(f"{name}: shape {value.shape} after conversion, but {path} has {wanted}")
        elif value.dtype != leaves.get(path, value).dtype:
            errors.append(f"{name}: {value.dtype}, but the rest of {path} is {leaves[path].dtype}")
        elif position is None and rule.part is None:
            leaves[path] = value
        elif position is None or position < expected[path][0]:
            if path not in leaves:
                leaves[path] = np.empty(expected[path], value.dtype)
            leaves[path][_region(expected[path], position, rule.part)] = value
    errors += _missing(table, expected, found)
    if errors:
        raise WeightError(_misfit(source, fits_any=bool(found), errors=errors))
    return traverse_util.unflatten_dict(leaves, sep="/")


def fits(table: Sequence[Rule], name: str) -> bool:
    """Whether one of the rules takes a source name."""
    return any(rule.to_target(name) is not None for rule in table)


def _misfit(source: Mapping[str, np.ndarray], fits_any: bool, errors: Sequence[str]) -> str:
    """The errors, or only what the state dict is if nothing of it fits."""
    what = recognized(source, changed_only=fits_any)
    if what and not fits_any:
        return f"the weights do not fit the model: they are {what}"
    return f"the weights do not fit the model{f' (they are {what})' if what else ''}:\n  " + cut(errors, "\n  ")


def _overlap(one: _Slot, other: _Slot) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _region(shape: tuple[int, ...], position: int | None, part: Part | None) -> tuple[Any, ...]:
    """The index of a slot in a parameter of this shape."""
    index = () if position is None else (position,)
    return index if part is None else (*index, ..., part.of(shape[-1]))


def _slot_shape(shape: tuple[int, ...], position: int | None, part: Part | None) -> tuple[int, ...]:
    shape = shape if position is None else shape[1:]
    if part is None:
        return shape
    piece = part.of(shape[-1])
    return (*shape[:-1], piece.stop - piece.start)


def _missing(
    table: Sequence[Rule], expected: Mapping[str, tuple[int, ...]], found: Mapping[str, set[_Slot]]
) -> list[str]:
    errors = []
    for path, shape in expected.items():
        slots = found.get(path, set())
        positions = {position for position, _ in slots}
        if not slots:
            errors.append(f"{path} {shape}: not among the weights")
        elif None not in positions and positions != set(range(shape[0])):
            errors.append(f"{path}: positions {sorted(positions)} are there, but 0 to {shape[0] - 1} are needed")
        for position in sorted(positions, key=str):
            parts = {part for other, part in slots if other == position}
            if None not in parts:
                names = [rule.to_source(path, position) for rule in table if rule.part not in {None, *parts}]
                errors += [f"{path}: its part {name} is not among the weights" for name in names if name is not None]
    return errors


def export_weights(table: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """The inverse of `import_weights`: a nested parameter dict as a state dict, bit-equal.

    Raises:
      WeightError: a parameter that no rule covers, or several that are not its parts.
    """
    result: dict[str, np.ndarray] = {}
    errors = []
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        rules = [rule for rule in table if rule._target_pattern.fullmatch(path)]
        if not _cover([rule.part for rule in rules]):
            errors.append(f"{path}: {'several rules' if rules else 'no rule'} for this parameter")
            continue
        array = np.asarray(jax.device_get(leaf))
        for rule in rules:
            for position in range(len(array)) if rule.is_stacked(path) else [None]:
                value = rule.transform.inverse(array[_region(array.shape, position, rule.part)])
                result[rule.to_source(path, position)] = np.asarray(value, order="C")
    if errors:
        raise WeightError("the parameters cannot be exported:\n  " + cut(errors, "\n  "))
    return result


def _cover(parts: Sequence[Part | None]) -> bool:
    """Whether these parts make up a whole parameter, each once."""
    if not parts or None in parts:
        return list(parts) == [None]
    return list(parts) == [Part(index, parts[0].shares) for index in range(len(parts[0].shares))]


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
      WeightError: the file is missing or is not a safetensors file.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[safe_open]:
    """A safetensors file whose header is valid and covers the file exactly; raises as `read_safetensors`."""
    try:
        path = local(path)
    except FileNotFoundError as error:
        raise WeightError(f"{path}: no such file") from error
    if not os.path.isfile(path):
        raise WeightError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        what = unreadable(Path(path))
        reason = f", but {what}" if what else f" ({error})"
        raise WeightError(f"{path}: not a readable safetensors file{reason}") from error


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes one file atomically. Equal contents give equal bytes."""
    ordered = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with replacing(path) as new:
        save_file(ordered, new, metadata=dict(metadata))
        if len(metadata) > 1:
            _sort_metadata(new)


def _sort_metadata(path: Path) -> None:
    """Sorts the entries of a file's metadata, which the library writes in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))  # as long as it was, the tensors stay where they are
