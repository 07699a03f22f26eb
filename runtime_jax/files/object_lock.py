"""The lock of a folder in a bucket: an object that names its owner, who writes it again every few seconds.

Only one of several runs can create an object. Taking it over from a dead run is not atomic in a bucket: the new owner
writes its name, waits, and looks whether it is still there.
"""

import contextlib
import functools
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator

from runtime_jax.files import AnyPath, buckets, owner
from runtime_jax.files.owner import Owner

_LOG = logging.getLogger(__name__)
SETTLE = 3.0  # seconds that a run which takes over waits before it looks


@contextlib.contextmanager
def held(path: AnyPath) -> Iterator[None]:
    """Holds the lock at `path` while the block runs.

    Where the last owner ran on another machine and may be alive, it has SILENCE seconds to give a sign of life.

    Raises:
        WorkdirError: another run holds it.
        BucketError: the bucket cannot be read or written.
    """
    me = _acquire(path)
    try:
        with owner.beating(functools.partial(_renew, path, me)):
            yield
    finally:
        with contextlib.suppress(OSError):
            if _same_run(_owner_of(path), me):
                buckets.remove(path)


def _acquire(path: AnyPath) -> Owner:
    # Containers of one machine have process numbers of their own.
    machine = f"{owner.machine()} {os.readlink('/proc/self/ns/pid')}"
    me = owner.me() | {"machine": machine, "run": uuid.uuid4().hex}
    while True:
        try:
            buckets.create(path, _stamped(me))
            return me
        except FileExistsError:
            other = _owner_of(path)
        if _same_run(other, me):  # the upload was repeated because its answer was lost
            return me
        if other is None or not _is_given_back(path, other, machine):
            break
    buckets.write(path, _stamped(me))
    time.sleep(SETTLE)  # of several runs that take over at the same time, the last one to write has it
    if not _same_run(other := _owner_of(path), me):
        raise owner.refusal(path, other)
    return me


def _is_given_back(path: AnyPath, other: Owner, machine: str) -> bool:
    """Whether the other run has removed the lock meanwhile; if not, it is dead. Raises WorkdirError if it lives."""
    if other["machine"] == machine:
        if owner.is_alive(other["process"]):
            raise owner.refusal(path, other)
    elif time.time() - other.get("heard", 0) < 10 * owner.SILENCE:  # clocks may differ: its signs of life decide
        _LOG.warning("%s: waiting up to %g s for a sign of life of %s", path.parent, owner.SILENCE, owner.shown(other))
        end = time.monotonic() + owner.SILENCE
        while time.monotonic() < end:
            time.sleep(owner.BEAT / 5)
            if (now := _owner_of(path)) is None:
                return True
            if now != other:
                raise owner.refusal(path, now)
    _LOG.info("%s: taken over from a run that has not given it back: %s", path.parent, owner.shown(other))
    return False


def _owner_of(path: AnyPath) -> Owner | None:
    try:
        return owner.parsed(buckets.read(path))
    except FileNotFoundError:
        return None


def _same_run(other: Owner | None, me: Owner) -> bool:
    return other is not None and other.get("run") == me["run"]


def _stamped(me: Owner) -> bytes:
    return json.dumps(me | {"heard": time.time()}).encode()


def _renew(path: AnyPath, me: Owner) -> None:
    if _same_run(other := _owner_of(path), me):
        buckets.write(path, _stamped(me))
    else:
        who = "removed the lock" if other is None else f"took it over: {owner.shown(other)}"
        _LOG.error("%s: this run was silent for too long, and another one %s; stop one of them", path.parent, who)
