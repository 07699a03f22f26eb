"""Output folders: probed before anything expensive starts, and written by one run at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_LOG = logging.getLogger(__name__)
LOCK_NAME = ".lock"
BEAT = 10.0  # seconds between two signs of life of a run
SILENCE = 60.0  # seconds without a sign of life after which a run on another machine counts as dead
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # errors of file systems without locks


class WorkdirError(OSError):
    """A folder cannot be written, its disk is full, or another run is writing it."""


def local_path(path: str | os.PathLike) -> Path:
    """Absolute path; refuses a URL, which would silently become a local folder of that name."""
    if "://" in str(path):
        raise WorkdirError(f"{path}: not a path of a file system; mount the bucket and give the mount point")
    return Path(path).absolute()


def check_output(path: str | os.PathLike, min_free_bytes: int = 0, what: str = "a run") -> Path:
    """Checks that a folder can be written, before anything expensive starts; creates nothing.

    Returns the absolute path. Only process 0 writes, so only process 0 checks. Errors say what needs `min_free_bytes`.

    Raises:
        WorkdirError: it is a URL or no directory, a file cannot be written in it, or fewer bytes are free.
    """
    path = local_path(path)
    if jax.process_index() == 0:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        with _explained(path), tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"probe")
        check_free(there, min_free_bytes, what)
    return path


def output_folder(path: str | os.PathLike, min_free_bytes: int = 0) -> Path:
    """Creates a folder after `check_output`; raises as it does."""
    path = check_output(path, min_free_bytes)
    if jax.process_index() == 0:
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an OSError into one that names the folder `path`."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error.strerror} ({error.filename})") from error


def check_free(path: Path, needed: int, what: str) -> None:
    """Raises WorkdirError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise WorkdirError(f"{path}: disk full: {what} needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, min_free_bytes: int = 0) -> Iterator[Path]:
    """An `output_folder` that no other run writes while the block runs.

    The lock is the file `.lock` in the folder. The kernel locks it (flock) and unlocks it when the process ends in any
    way. On some file systems (mounted buckets, some network ones) other machines don't see such a lock. So the file
    also says who holds it, and is touched every 10 seconds: a run on another machine that has been silent for a minute
    counts as dead. Process 0 takes the lock for all processes of a run.

    Raises:
        WorkdirError: as `output_folder`; or another run is writing there: names its host, process and start.
    """
    made = not local_path(folder).exists()
    folder = output_folder(folder, min_free_bytes)
    path, file, refusal = folder / LOCK_NAME, None, None
    if jax.process_index() == 0:
        try:
            file = _acquire(path)
        except WorkdirError as error:
            refusal = error
    if jax.process_count() > 1:
        refused = multihost_utils.broadcast_one_to_all(np.asarray(refusal is not None))
        if refused and refusal is None:
            refusal = WorkdirError(f"{folder}: another run is writing there; process 0 says which")
    if refusal is not None:
        raise refusal
    if file is None:
        yield folder
        return
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), name="lock", daemon=True).start()
    try:
        yield folder
    finally:
        ended.set()
        path.unlink(missing_ok=True)  # while it is locked, so that a run that has just opened it sees that it is gone
        os.close(file)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing was written


def _acquire(path: Path) -> int:
    """The open lock file, locked and with this run as its owner."""
    while True:
        with _explained(path.parent):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locks = _flock(file, path)
            if _is_at(file, path):
                _check_owner(file, path, locks)
                os.truncate(file, 0)
                os.pwrite(file, json.dumps(_me()).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the previous run removed the file after it was opened here


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _flock(file: int, path: Path) -> bool:
    """Locks the file; False if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(path, _owner(file)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _check_owner(file: int, path: Path, locks: bool) -> None:
    """Raises WorkdirError if the owner of the lock file may be alive."""
    owner = _owner(file)
    if owner is None:
        return
    if owner["machine"] == _machine():
        if not locks and _is_alive(owner["process"]):
            raise _refusal(path, owner)
    elif (silent := _now(path.parent) - os.fstat(file).st_mtime) < SILENCE:
        heard = f"last heard of {max(silent, 0):.0f} s ago; if it is dead, try again after {SILENCE:.0f} s of silence"
        raise _refusal(path, owner, heard)
    _LOG.info("%s: taken over from a run that has not given it back: %s", path.parent, _shown(owner))


def _refusal(path: Path, owner: dict[str, Any] | None, more: str = "") -> WorkdirError:
    who = "a run that has just begun" if owner is None else _shown(owner)
    return WorkdirError(f"{path.parent}: another run is writing there: {who}{more and f'; {more}'}")


def _shown(owner: dict[str, Any]) -> str:
    return f"{owner['command']} on host {owner['host']}, process {owner['process']}, since {owner['since']}"


def _me() -> dict[str, Any]:
    command = [Path(sys.argv[0]).name, *(word for word in sys.argv[1:2] if not word.startswith("-"))]
    return {
        "command": " ".join(command),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "machine": _machine(),
    }


def _owner(file: int) -> dict[str, Any] | None:
    """The owner in the lock file; None if there is none yet, or no longer."""
    try:
        owner = json.loads(os.pread(file, 2**16, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= _me().keys() else None


def _machine() -> str:
    """The running system's id: machines may share a host name, and process numbers start again after a boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's process
    return True


def _now(folder: Path) -> float:
    """Time by the clock of the file system, which may be another machine's."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        return os.stat(probe.name).st_mtime


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
