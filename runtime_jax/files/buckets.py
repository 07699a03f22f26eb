"""Buckets: files under a URL such as gs://bucket/folder, through etils' epath and fsspec.

An object appears when its upload is complete, and it can be replaced as a whole. It cannot be renamed or appended to.
What has to be a file on a disk (memory maps, array_record) is copied: see `local_copy`.
"""

import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from runtime_jax.files import AnyPath, BucketError

_LOG = logging.getLogger(__name__)
CACHE = Path("~/.cache/runtime_jax/buckets")  # local copies
# What epath opens: the library that fsspec needs for it, and how to get it.
SCHEMES = {
    "gs": ("gcsfs", "pip install 'tokenverse-mergevq-jax[gcs]'"),
    "s3": ("s3fs", "pip install s3fs"),
    "az": ("adlfs", "pip install adlfs"),
}
_LOGIN = {
    "gs": "run `gcloud auth application-default login`, or name a service account's key file in "
    "GOOGLE_APPLICATION_CREDENTIALS"
}


def path_of(url: str | os.PathLike) -> epath.Path:
    """The path of a URL; raises BucketError for a scheme that is not supported."""
    scheme = _scheme(url)
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise BucketError(f"{os.fspath(url)}: {scheme}:// is not supported; allowed are {allowed} and local paths")
    _configure()
    return epath.Path(url)


def _scheme(path: str | os.PathLike) -> str:
    return os.fspath(path).partition("://")[0]


@functools.cache
def _configure() -> None:
    """fsspec for everybody, also where TensorFlow is installed, and without listings that outdate between hosts."""
    os.environ.setdefault("EPATH_USE_TF", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs, with a traceback, the errors that it raises
    for protocol in ("gs", "gcs", "s3", "az"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def _system(path: AnyPath) -> fsspec.AbstractFileSystem:
    with explained(path):
        return _systems(_scheme(path))


@functools.cache
def _systems(scheme: str) -> fsspec.AbstractFileSystem:
    _configure()  # also in a process that was given a path and made none
    return fsspec.filesystem(scheme)


@contextlib.contextmanager
def explained(path: AnyPath) -> Iterator[None]:
    """Turns errors of reading or writing below `path` into a BucketError of one line, but for a missing object."""
    scheme = _scheme(path)
    try:
        yield
    except (BucketError, FileNotFoundError, FileExistsError):
        raise
    except ImportError as error:
        library, install = SCHEMES[scheme]
        raise BucketError(f"{path}: {scheme}:// needs {library}: {install} ({error})") from error
    except Exception as error:  # fsspec's libraries, their HTTP clients and their logins have errors of their own
        reason = str(error).strip().replace("\n", " ") or "no message"
        reason = f"{type(error).__name__}: {reason[:300]}"
        if getattr(error, "code", None) in (401, "401") or type(error).__module__.startswith("google.auth"):
            raise BucketError(f"{path}: no valid credentials: {_LOGIN.get(scheme, 'log in')} ({reason})") from error
        if isinstance(error, PermissionError) or "Forbidden" in reason or getattr(error, "code", None) == 403:
            raise BucketError(f"{path}: permission is missing to read and write objects there ({reason})") from error
        raise BucketError(f"{path}: the bucket cannot be reached ({reason})") from error


def check_writable(path: AnyPath) -> None:
    """Writes and deletes an object below `path`; raises BucketError with what to do."""
    probe = path / f".{uuid.uuid4().hex}.probe"
    system = _system(path)
    # Without a login gcsfs goes on as nobody, who may read public buckets.
    nobody = getattr(system, "credentials", None) is not None and system.credentials.credentials is None
    if _scheme(path) == "gs" and nobody and "STORAGE_EMULATOR_HOST" not in os.environ:
        raise BucketError(f"{path}: no credentials found: {_LOGIN['gs']}")
    try:
        with explained(path):
            system.pipe_file(str(probe), b"probe")
            system.rm_file(str(probe))
    except FileNotFoundError as error:
        raise BucketError(f"{path}: no such bucket") from error


def check_checkpoints(path: AnyPath) -> None:
    """Checks that Google's own client, with which Orbax deletes old checkpoints, may describe the bucket of `path`."""
    with explained(path):
        from google.cloud import storage

        storage.Client().get_bucket(str(path).removeprefix("gs://").partition("/")[0])


def is_dir(path: AnyPath) -> bool:
    """Whether there are objects below a path."""
    return _info(path).get("type") == "directory"


def is_file(path: AnyPath) -> bool:
    """Whether there is such an object."""
    return _info(path).get("type") == "file"


def size_of(path: AnyPath) -> int:
    """Bytes of an object; 0 if there is none."""
    return _info(path).get("size") or 0


def _info(path: AnyPath) -> dict[str, Any]:
    """fsspec's description of an object or folder; empty if there is none."""
    try:
        with explained(path):
            return _system(path).info(str(path))
    except FileNotFoundError:
        return {}


def create(path: AnyPath, data: bytes) -> None:
    """Writes an object that is not there yet; FileExistsError if it is, whoever was first."""
    with explained(path):
        _system(path).pipe_file(str(path), data, mode="create")


def read(path: AnyPath) -> bytes:
    """The bytes of an object; FileNotFoundError if there is none."""
    with explained(path):
        return _system(path).cat_file(str(path))


def write(path: AnyPath, data: bytes) -> None:
    """Writes or replaces an object."""
    with explained(path):
        _system(path).pipe_file(str(path), data)


def remove(path: AnyPath) -> None:
    """Deletes an object; FileNotFoundError if there is none."""
    with explained(path):
        _system(path).rm_file(str(path))


def upload(file: Path, path: AnyPath) -> None:
    """Writes or replaces an object by a local file."""
    with explained(path):
        _system(path).put_file(str(file), str(path))


def move(folder: AnyPath, target: AnyPath) -> None:
    """Moves the objects below a folder one by one; after an interruption, a second call moves the rest."""
    system = _system(folder)
    with explained(folder):
        for name in objects(folder):
            system.cp_file(str(folder / name), str(target / name))
            system.rm_file(str(folder / name))


def objects(folder: AnyPath) -> dict[str, dict[str, Any]]:
    """fsspec's description of every object below a folder, by relative name, sorted; of an object itself, by ""."""
    system = _system(folder)
    root = system._strip_protocol(str(folder)).rstrip("/")
    with explained(folder):
        found = system.find(str(folder), detail=True)
    names = {name: info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")}
    return {name.removeprefix(root).lstrip("/"): names[name] for name in sorted(names)}


def local_copy(path: AnyPath, patterns: Sequence[str] = ("*",)) -> Path:
    """A copy on the local disk of an object, or of a folder's objects whose relative names match `patterns`.

    Copies are kept in CACHE for the next time. What has changed in the bucket is copied again.

    Raises:
        FileNotFoundError: no such object or folder, or nothing in it matches.
        BucketError: the bucket cannot be read, or the disk has too little room.
    """
    found = objects(path)
    wanted = {name: info for name, info in found.items() if not name or _matches(name, patterns)}
    if not wanted:
        raise FileNotFoundError(
            f"{path}: no such object or folder" if not found else f"{path}: holds none of {patterns}"
        )
    cache = CACHE.expanduser()
    stored = {name: cache / "objects" / _digest([str(path / name), _version(info)]) for name, info in wanted.items()}
    folder = cache / "folders" / _digest([str(path), {name: file.name for name, file in stored.items()}])
    result = folder if "" not in wanted else folder / path.name
    if folder.is_dir():
        return result
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one host copy once
        if not folder.is_dir():
            missing = {name: file for name, file in stored.items() if not file.is_file()}
            _download(path, missing, sum(wanted[name]["size"] for name in missing))
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                for name, file in stored.items():
                    target = Path(partial) / "folder" / (name or path.name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.link(file, target)
                folder.parent.mkdir(exist_ok=True)
                os.rename(Path(partial) / "folder", folder)
    return result


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _download(path: AnyPath, files: Mapping[str, Path], size: int) -> None:
    """Copies objects below `path` to local files, each of which appears as a whole."""
    if not files:
        return
    cache = CACHE.expanduser()
    (cache / "objects").mkdir(exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < size:
        room = f"{size / 2**20:.1f} MiB are copied to {cache}, where {free / 2**20:.1f} MiB are free"
        raise BucketError(f"{path}: disk full: {room}; or mount the bucket and give the mount point")
    if size > 2**26:
        _LOG.warning("%s: copying %.1f MiB in %d files to %s", path, size / 2**20, len(files), cache)
    with tempfile.TemporaryDirectory(dir=cache) as folder, explained(path):
        partial = [Path(folder) / file.name for file in files.values()]
        _system(path).get([str(path / name) for name in files], [str(file) for file in partial])
        for new, file in zip(partial, files.values(), strict=True):
            os.replace(new, file)


def _version(info: Mapping[str, Any]) -> list[str]:
    """What differs between two versions of an object."""
    return [str(info.get(key)) for key in ("size", "generation", "etag", "ETag", "created", "mtime", "LastModified")]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
