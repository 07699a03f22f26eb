"""Output folders: probed before anything expensive starts, and written by one run at a time."""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from runtime_jax.files import AnyPath, WorkdirError, is_remote, owner, path_of

_LOG = logging.getLogger(__name__)
LOCK_NAME = ".lock"
_ROUND = 5.0  # seconds that the other processes wait for process 0 in one operation
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # errors of file systems without locks


def absolute(path: str | os.PathLike) -> AnyPath:
    """The absolute path on a disk, or the path of a URL; raises BucketError for a URL that is not supported."""
    path = path_of(path)
    return path if is_remote(path) else path.absolute()


def check_output(path: str | os.PathLike, min_free_bytes: int = 0, what: str = "a run") -> AnyPath:
    """Checks that a folder can be written, before anything expensive starts; creates nothing.

    Returns the absolute path. Only process 0 writes, so only process 0 checks. Errors say what needs `min_free_bytes`.

    Raises:
        WorkdirError: it is no directory, a file cannot be written in it, or fewer bytes are free.
        BucketError: a bucket cannot be written, or the URL is not supported.
    """
    path = absolute(path)
    if jax.process_index() == 0 and is_remote(path):
        from runtime_jax.files import buckets

        buckets.check_writable(path)
    elif jax.process_index() == 0:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        with _explained(path), tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"probe")
        check_free(there, min_free_bytes, what)
    return path


def output_folder(path: str | os.PathLike, min_free_bytes: int = 0) -> AnyPath:
    """Creates a folder after `check_output`; raises as it does."""
    path = check_output(path, min_free_bytes)
    if jax.process_index() == 0 and not is_remote(path):  # a bucket has no folders, only names with slashes
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


def check_free(path: AnyPath, needed: int, what: str) -> None:
    """Raises WorkdirError where fewer than `needed` bytes are free; a bucket has no end."""
    if is_remote(path):
        return
    free = shutil.disk_usage(path).free
    if free < needed:
        raise WorkdirError(f"{path}: disk full: {what} needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, min_free_bytes: int = 0) -> Iterator[AnyPath]:
    """An `output_folder` that no other run writes while the block runs.

    The lock is the file `.lock` in the folder. The kernel locks it (flock) and unlocks it when the process ends in any
    way. On some file systems (mounted buckets, some network ones) other machines don't see such a lock. So the file
    also says who holds it, and is touched every 10 seconds: a run on another machine that has been silent for a minute
    counts as dead. Process 0 takes the lock for all processes of a run. For buckets see `files.object_lock`.

    Raises:
        WorkdirError: as `output_folder`; or another run is writing there: names its host, process and start.
        BucketError: as `output_folder`.
    """
    made = not is_remote(folder) and not absolute(folder).exists()
    folder = output_folder(folder, min_free_bytes)
    with contextlib.ExitStack() as stack:
        if made and jax.process_index() == 0:
            stack.callback(_remove_empty, folder)
        refusal = _on_process_0(functools.partial(_enter, stack, _held(folder / LOCK_NAME)))
        if refusal is True:
            refusal = WorkdirError(f"{folder}: another run is writing there; process 0 says which")
        if refusal is not None:
            raise refusal
        yield folder


def _enter(stack: contextlib.ExitStack, lock: contextlib.AbstractContextManager) -> OSError | None:
    """Enters the lock, or returns why it is refused."""
    try:
        stack.enter_context(lock)
    except OSError as error:
        return error
    return None


def _on_process_0(task: Callable[[], OSError | None]) -> OSError | bool | None:
    """The task's result on process 0, where it runs; on the others True for an error, else None.

    They wait in rounds, because an operation of all processes has a time limit (with Gloo, 30 s).
    """
    if jax.process_count() == 1:
        return task()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(task) if jax.process_index() == 0 else None
        done = failed = False
        while not done:
            if future is not None:
                done = not wait([future], timeout=_ROUND).not_done
                failed = done and future.result() is not None
            done, failed = multihost_utils.broadcast_one_to_all(np.asarray([done, failed])).tolist()
    return future.result() if future is not None else failed or None


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _held(path: AnyPath) -> Iterator[None]:
    """Holds the lock at `path` while the block runs."""
    if is_remote(path):
        from runtime_jax.files import object_lock

        with object_lock.held(path):
            yield
        return
    file = _acquire(path)
    try:
        with owner.beating(functools.partial(os.utime, path)):
            yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that a run that has just opened it sees that it is gone
        os.close(file)


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
                os.pwrite(file, json.dumps(owner.me()).encode(), 0)
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
        raise owner.refusal(path, _owner(file)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _check_owner(file: int, path: Path, locks: bool) -> None:
    """Raises WorkdirError if the owner of the lock file may be alive."""
    found = _owner(file)
    if found is None:
        return
    if found["machine"] == owner.machine():
        if not locks and owner.is_alive(found["process"]):
            raise owner.refusal(path, found)
    elif (silent := _now(path.parent) - os.fstat(file).st_mtime) < owner.SILENCE:
        heard = f"last heard of {max(silent, 0):.0f} s ago; if it is dead, try again after {owner.SILENCE:.0f} s"
        raise owner.refusal(path, found, f"{heard} of silence")
    _LOG.info("%s: taken over from a run that has not given it back: %s", path.parent, owner.shown(found))


def _owner(file: int) -> owner.Owner | None:
    return owner.parsed(os.pread(file, 2**16, 0))


def _now(folder: Path) -> float:
    """Time by the clock of the file system, which may be another machine's."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        return os.stat(probe.name).st_mtime
