"""Atomic writes: a reader never sees a half-written file."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file to write; it replaces `path` if the block succeeds. Missing folders are made.

    >>> with replacing("runs/notes.txt") as new:
    ...     new.write_text("whole")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        partial.touch()  # with a new file's mode, which some libraries' files don't have
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, fields: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    write_text(path, json.dumps(fields, indent=2) + "\n")
