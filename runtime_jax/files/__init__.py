"""Files on a disk or in a bucket: their paths, and atomic writes (a reader never sees a half-written file)."""

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

AnyPath = PurePath  # what `path_of` returns: pathlib's Path, or etils' epath.Path, which has the same methods


class WorkdirError(OSError):
    """A folder cannot be written, its disk is full, or another run is writing it."""


class BucketError(OSError):
    """A bucket cannot be read or written."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def path_of(path: str | os.PathLike) -> AnyPath:
    """A path on a disk as pathlib's `Path`; a URL as `epath.Path` (see `buckets`).

    Raises:
        BucketError: a scheme that is not supported, or a URL that went through `pathlib.Path` and lost a slash.
    """
    if isinstance(path, Path):
        if match := re.match(r"(\w\w+):/(?!/)", str(path)):
            raise BucketError(f"{path}: a URL begins with {match[1]}://; pathlib.Path removes a slash, pass the text")
        return path
    if not is_remote(path):
        return Path(path)
    from runtime_jax.files import buckets

    return buckets.path_of(path)


def local(path: str | os.PathLike, patterns: tuple[str, ...] = ("*",)) -> Path:
    """The path itself, or the local copy of an object or folder of a bucket, with the files of `patterns`.

    Raises:
        FileNotFoundError, BucketError: as `buckets.local_copy`; only for a URL.
    """
    path = path_of(path)
    if not is_remote(path):
        return path
    from runtime_jax.files import buckets

    return buckets.local_copy(path, patterns)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file to write; it replaces `path` if the block succeeds. Missing folders are made.

    On a disk the new file is written beside `path` and renamed. A bucket cannot rename, but an object appears there as
    a whole once it is uploaded: the new file is a temporary local one.

    >>> with replacing("runs/notes.txt") as new:
    ...     new.write_text("whole")
    """
    path = path_of(path)
    if is_remote(path):
        from runtime_jax.files import buckets

        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / path.name
            new.touch()
            yield new
            buckets.upload(new, path)
        return
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


def read_bytes(path: AnyPath) -> bytes:
    """The content of a file; FileNotFoundError if there is none, BucketError if its bucket cannot be read."""
    if is_remote(path):
        from runtime_jax.files import buckets

        return buckets.read(path)
    return path.read_bytes()


def is_dir(path: AnyPath) -> bool:
    """Whether there is such a folder; BucketError if its bucket cannot be read."""
    if is_remote(path):
        from runtime_jax.files import buckets

        return buckets.is_dir(path)
    return path.is_dir()


def is_file(path: AnyPath) -> bool:
    """Whether there is such a file; BucketError if its bucket cannot be read."""
    if is_remote(path):
        from runtime_jax.files import buckets

        return buckets.is_file(path)
    return path.is_file()


def size_of(path: AnyPath) -> int:
    """Bytes of a file; 0 if there is none."""
    if is_remote(path):
        from runtime_jax.files import buckets

        return buckets.size_of(path)
    return path.stat().st_size if path.is_file() else 0


def remove_tree(path: AnyPath) -> None:
    """Deletes a folder with all that is in it, if it is there."""
    if is_remote(path):
        path.rmtree(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)
