"""Config files to frozen dataclasses, by one strict function.

A config file is Python: `get_config(arg)` returns an ml_collections ConfigDict (or plain dicts). `load` runs it and
applies `a.b=value` overrides; `build` turns the result into keyword-only dataclasses and reports every unknown, missing
or ill-typed key at once; `to_dict` is the JSON-able inverse.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import runpy
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ml_collections import ConfigDict, FrozenConfigDict

T = TypeVar("T")
WHEEL_FOLDER = "tokenverse_mergevq_configs"  # setup.py puts configs/ there
MOST_UNKNOWN = 3  # unknown keys that are listed where most are unknown


class ConfigError(ValueError):
    """One or more keys of a config are wrong; the message has a line for each, with its dotted path."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def build(
    cls: type[T], mapping: Mapping | ConfigDict | FrozenConfigDict, path: str = "config", what: str | None = None
) -> T:
    """Builds a dataclass from a mapping, checking every key and type.

    Integers become floats where a float is declared and lists become tuples; nothing else is converted. A ValueError of
    a `__post_init__` is reported under the path of its dataclass.

    Args:
        cls: dataclass; its fields may be bool, int, float, str, None, Any, Literal, unions, tuples, dict[str, X] and
            dataclasses.
        mapping: its fields, as a ConfigDict or any mapping.
        path: what the dotted paths in messages start with.
        what: whose config it is, for messages; None: the class's.

    Raises:
        ConfigError: lists every problem: dotted path, value, what is allowed, closest known name; the first three if
            most keys are unknown, as in a config of another class.
    """
    problems: list[str] = []
    result = _convert(cls, mapping, path, problems)
    if problems:
        fields, values = dataclasses.fields(cls), mapping if _is_mapping(mapping) else {}
        unknown = len(_renamed(values, fields).keys() - {field.name for field in fields})
        if unknown > max(MOST_UNKNOWN, len(values) / 2):
            head = f"this is not a config of {what or cls.__name__}: {unknown} of {len(values)} keys are unknown"
            problems = [f"{path}: {head}", *problems[:MOST_UNKNOWN]]
        raise ConfigError(problems)
    return result


def build_known(cls: type[T], fields: Mapping[str, Any], path: str) -> T:
    """As `build`, from another program's file: fields that the dataclass lacks are left out."""
    known = {field.name for field in dataclasses.fields(cls)}
    return build(cls, {name: value for name, value in fields.items() if name in known}, path)


def added(default: Any) -> Any:
    """A dataclass field that older files lack. `to_dict` leaves it out at its default, so that what it gives for an
    old config, and every fingerprint of that, stays the same."""
    return dataclasses.field(default=default, metadata={"added": True})


def renamed(
    old: str,
    default: Any,
    convert: Callable[[Any], Any] = lambda value: value,
    revert: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A dataclass field that older files know as `old`; `build` reads those and converts the value.

    `revert` is the inverse, for fingerprints of before; None for a value that they did not know.
    """
    return dataclasses.field(default=default, metadata={"old": old, "convert": convert, "revert": revert})


def to_dict(value: Any, *, old_names: bool = False) -> Any:
    """The plain dicts, lists and scalars of a config dataclass: `build(type(x), to_dict(x)) == x`.

    `old_names`: `renamed` fields under their first names, for fingerprints.
    """
    plain = functools.partial(to_dict, old_names=old_names)
    if dataclasses.is_dataclass(value):
        fields = {}
        for field in dataclasses.fields(value):
            item, revert = getattr(value, field.name), field.metadata.get("revert")
            if "added" in field.metadata and item == field.default:
                continue
            old = revert(item) if old_names and revert else None
            fields[field.name if old is None else field.metadata["old"]] = plain(item if old is None else old)
        return fields
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def with_new_names(kind: Any, value: Any) -> Any:
    """What `to_dict` gave for a value of this type before fields of its dataclasses were renamed; see `renamed`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        kinds = typing.get_type_hints(kind)
        fields = _renamed(value, dataclasses.fields(kind))
        return {key: with_new_names(kinds.get(key), item) for key, item in fields.items()}
    if origin in (Union, types.UnionType):
        for member in args:
            value = with_new_names(member, value)
    elif origin is tuple and args and isinstance(value, tuple | list):
        return [with_new_names(args[0], item) for item in value]
    elif origin is dict and isinstance(value, Mapping):
        return {key: with_new_names(args[1], item) for key, item in value.items()}
    return value


def load(spec: str, overrides: Iterable[str] = (), *, new_keys: bool = False) -> ConfigDict:
    """Runs a config file, `path.py:arg` or `name:arg`, and applies overrides such as `train.lr=1e-3`.

    Values are Python literals (`3`, `1e-3`, `True`, `None`, `(1, 2)`); anything else is taken as a string. An entry of
    a list or tuple is addressed by its number: `data.sources.0.split=test`.

    Args:
        spec: a file, or the name of one that is shipped, see `shipped`; after a colon the argument of its `get_config`.
        overrides: `dotted.key=value` strings, applied in order.
        new_keys: let overrides set keys that the file leaves to the dataclass's defaults; `build` finds unknown ones.

    Raises:
        ConfigError: no such file or name, no get_config, an argument it does not take, a malformed override, an
            unknown key.
    """
    file, arg = _split_spec(spec)
    get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
        raise ConfigError([f"{file}: defines no get_config function"])
    args = () if arg is None else (arg,)
    try:
        inspect.signature(get_config).bind(*args)
    except TypeError as error:
        hint = f"takes no argument {arg!r}" if args else f"needs an argument, as in '{file.stem}:argument'"
        raise ConfigError([f"{spec}: get_config {hint} ({error})"]) from None
    config = get_config(*args)
    config = config if isinstance(config, ConfigDict) else ConfigDict(config)
    for override in overrides:
        _override(config, override, new_keys)
    return config


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training, in exactly one unit."""

    steps: int | None = None
    examples: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, examples, epochs; got {given or 'none'}")
        if min(given.values()) < 0:
            raise ValueError(f"a duration is not negative; got {given}")

    def to_steps(self, batch_size: int, num_examples: int | None = None) -> int:
        """Steps of `batch_size` examples, rounded up; epochs need the number of examples in the data set.

        Raises:
            ValueError: in epochs, and the number of examples is not known.
        """
        if self.steps is not None:
            return self.steps
        if self.examples is not None:
            return math.ceil(self.examples / batch_size)
        if num_examples is None:
            raise ValueError(f"epochs={self.epochs}: the number of examples is not known, give steps or examples")
        return math.ceil(self.epochs * num_examples / batch_size)


def _closest(name: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """'; did you mean ...?' for the known name closest to `name`, or nothing."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts a name in front of errors, such as the key of a config whose value they come of.

    >>> with naming("evaluation.data"):
    ...     source = open_source(config.evaluation.data.sources[0])
    """
    try:
        yield
    except ValueError as error:
        error.args = (f"{key}: {error}", *error.args[1:])
        raise


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings, and of sequences of mappings, by dotted path; tuples as JSON has them."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    return {path: list(value) if isinstance(value, tuple) else value}


def config_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys whose values differ between two configs as `to_dict` gives them, with a line of text each.

    A key that is not there means None, as before a field of that default was added.
    """
    old, new = _flat(saved), _flat(current)
    return {
        key: f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def _type_name(kind: Any) -> str:
    """A type as people write it: `float`, `tuple[int, ...]`, `'a' | 'b'`, `int | None`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in args)
    if kind in (None, type(None)):
        return "None"
    if args:
        inner = ", ".join("..." if arg is Ellipsis else _type_name(arg) for arg in args)
        return f"{origin.__name__}[{inner}]"
    return getattr(kind, "__name__", str(kind))


def _wrong(value: Any, kind: Any, path: str) -> str:
    known = [arg for arg in typing.get_args(kind) if isinstance(arg, str)]
    hint = _closest(value, known) if isinstance(value, str) else ""
    return f"{path}: got {_shown(value)} ({type(value).__name__}), expected {_type_name(kind)}{hint}"


def _shown(value: Any) -> str:
    """A value on one line, shortened; the repr of a ConfigDict has several."""
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as the declared type `kind`; appends to `problems` and returns None where that fails."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, path, problems)
    if origin in (Union, types.UnionType):
        return _convert_union(kind, value, path, problems)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif origin is tuple:
        if isinstance(value, tuple | list):
            return _convert_tuple(kind, value, path, problems)
    elif origin is dict:
        if _is_mapping(value):
            return {key: _convert(args[1], item, f"{path}.{key}", problems) for key, item in value.items()}
    elif kind is None or kind is type(None):
        if value is None:
            return None
    elif kind in (bool, int, float, str):
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
    else:
        raise TypeError(f"{path}: a config field cannot be of type {_type_name(kind)}")
    problems.append(_wrong(value, kind, path))
    return None


def _convert_dataclass(cls: type[T], value: Any, path: str, problems: list[str]) -> T | None:
    if isinstance(value, cls):
        return value
    if not _is_mapping(value):
        problems.append(_wrong(value, cls, path) + f" with keys {', '.join(f.name for f in dataclasses.fields(cls))}")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = _renamed(value, fields.values())
    now = {field.metadata.get("old"): name for name, field in fields.items()}
    for key in (key for key in values if key not in fields):
        hint = f"; it is now {now[key]!r}" if key in now else _closest(key, fields)
        problems.append(f"{path}.{key}: unknown key (value {_shown(values[key])}){hint}; known: {', '.join(fields)}")
    kwargs = {}
    for name, field in fields.items():
        if name in values:
            kwargs[name] = _convert(hints[name], values[name], f"{path}.{name}", problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{path}.{name}: missing, expected {_type_name(hints[name])}")
    if len(problems) > before:
        return None
    try:
        return cls(**kwargs)
    except ConfigError:
        raise
    except ValueError as error:
        problems.append(f"{path}: {error}")
        return None


def _renamed(mapping: Mapping | ConfigDict | FrozenConfigDict, fields: Iterable[dataclasses.Field]) -> dict[str, Any]:
    values = dict(mapping.items())
    for field in fields:
        if (old := field.metadata.get("old")) in values and field.name not in values:
            with contextlib.suppress(TypeError, ValueError):  # of another type: reported under its old name
                values[field.name] = field.metadata["convert"](values[old])
                del values[old]
    return values


def _convert_tuple(kind: Any, value: Sequence, path: str, problems: list[str]) -> tuple | None:
    args = typing.get_args(kind)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        problems.append(_wrong(value, kind, path) + f": {len(args)} entries, not {len(value)}")
        return None
    return tuple(
        _convert(arg, item, f"{path}.{i}", problems) for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


def _convert_union(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The first member that takes the value unchanged, else the first that takes it; reports the nearest's problems."""
    attempts = []
    for member in typing.get_args(kind):
        found: list[str] = []
        attempts.append((_convert(member, value, path, found), found, member))
    fitting = [result for result, found, _ in attempts if not found]
    if fitting:
        return next((result for result in fitting if type(result) is type(value)), fitting[0])
    structured = [found for _, found, member in attempts if _is_structured(member, value)]
    problems.extend(min(structured, key=len) if structured else [_wrong(value, kind, path)])
    return None


def _is_structured(member: Any, value: Any) -> bool:
    """Whether the value has the outer form of this member of a union, so that its problems are the ones to report."""
    if _is_mapping(value):
        return dataclasses.is_dataclass(member) or typing.get_origin(member) is dict
    return isinstance(value, tuple | list) and typing.get_origin(member) is tuple


def shipped() -> dict[str, Path]:
    """The config files of this library by name: configs/ of a checkout, which the wheel has under another name."""
    above = Path(__file__).parents[1]
    folder = above / WHEEL_FOLDER
    return {path.stem: path for path in sorted((folder if folder.is_dir() else above / "configs").glob("*.py"))}


def _split_spec(spec: str) -> tuple[Path, str | None]:
    """File and argument of `path.py:arg`, or of `name:arg`."""
    path, colon, arg = spec.partition(".py:")
    if colon:
        file = Path(path + ".py")
    elif "/" in spec or spec.endswith(".py") or Path(spec).is_file():
        file = Path(spec)
    else:
        name, colon, arg = spec.partition(":")
        if name not in shipped():
            there = f"by name there are {', '.join(shipped())}; a file of your own needs its path, as in {name}.py"
            raise ConfigError([f"{spec}: no config is named {name!r}{_closest(name, shipped())}; {there}"])
        file = shipped()[name]
    if not file.is_file():
        others = {other.name: str(other) for other in sorted(file.parent.glob("*.py"))}
        known = f"; there: {', '.join(others.values())}" if others else ""
        # Names alone: a common folder makes every path similar.
        hint = f"; by name: {file.stem}" if file.stem in shipped() else _closest(file.name, others, cutoff=0.75)
        raise ConfigError([f"{spec}: no such config file {str(file)!r}{hint}{known}"])
    return file, arg if colon else None


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _override(config: ConfigDict, override: str, new_keys: bool) -> None:
    """Applies `dotted.key=value` to the config in place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError([f"override {override!r}: expected dotted.key=value"])
    with config.unlocked(), config.ignore_type():  # types are for `build` to judge
        _set(config, keys, _parse_value(text), (), new_keys)


def _set(node: Any, keys: Sequence[str], value: Any, above: tuple[str, ...], new_keys: bool) -> Any:
    """`node` with the entry at `keys` set: mappings in place, lists and tuples as changed copies."""
    key, *rest = keys
    path = ".".join((*above, key))
    if isinstance(node, list | tuple):
        if not (key.isdecimal() and int(key) < len(node)):
            raise ConfigError([f"override {path}: expected an index in 0..{len(node) - 1}, got {key!r}"])
        index = int(key)
        entry = _set(node[index], rest, value, (*above, key), new_keys) if rest else value
        return type(node)([*node[:index], entry, *node[index + 1 :]])
    if not _is_mapping(node):
        raise ConfigError([f"override {path}: {'.'.join(above)} is {node!r}, which has no keys"])
    if key not in node and not new_keys:
        raise ConfigError([f"override {path}: unknown key{_closest(key, node)}; known: {', '.join(node)}"])
    if not rest:
        node[key] = value
    else:
        below = node[key] if node.get(key) is not None else ConfigDict()
        changed = _set(below, rest, value, (*above, key), new_keys)
        if changed is not node.get(key):
            node[key] = changed
    return node
