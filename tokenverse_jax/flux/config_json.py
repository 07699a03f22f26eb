"""The JSON configs of diffusers and transformers as our dataclasses."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from runtime_jax.config import ConfigError, build

T = TypeVar("T")


def parse(cls: type[T], fields: Mapping[str, Any], path: str, *, fixed: Mapping[str, Any], unused: Sequence[str]) -> T:
    """Builds `cls` from a config file's fields.

    Args:
      cls: dataclass of the fields that may differ, under the file's names.
      fields: the file's content; ignores other names that start with "_".
      path: the file's name in messages.
      fixed: fields whose value is built in; a file may omit them.
      unused: fields that change no result.

    Raises:
      ConfigError: lists every unsupported value of a fixed field, or every unknown, missing or ill-typed field.
    """
    problems = [
        f"{path}.{name}: got {fields[name]!r}, only {value!r} is supported"
        for name, value in fixed.items()
        if fields.get(name, value) != value
    ]
    if problems:
        raise ConfigError(problems)
    known = {*fixed, *unused}
    return build(cls, {k: v for k, v in fields.items() if k not in known and not k.startswith("_")}, path)
