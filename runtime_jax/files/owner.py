"""Who writes a folder: the run that a lock names, and its signs of life."""

import contextlib
import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime_jax.files import AnyPath, WorkdirError

BEAT = 10.0  # seconds between two signs of life of a run
SILENCE = 60.0  # seconds without a sign of life after which a run on another machine counts as dead
Owner = dict[str, Any]


def me() -> Owner:
    """This run."""
    command = [Path(sys.argv[0]).name, *(word for word in sys.argv[1:2] if not word.startswith("-"))]
    return {
        "command": " ".join(command),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "machine": machine(),
    }


def parsed(data: bytes) -> Owner | None:
    """The owner that a lock names; None if there is none yet, or no longer."""
    try:
        owner = json.loads(data)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= me().keys() else None


def shown(owner: Owner) -> str:
    """The owner in a message."""
    return f"{owner['command']} on host {owner['host']}, process {owner['process']}, since {owner['since']}"


def refusal(lock: AnyPath, owner: Owner | None, more: str = "") -> WorkdirError:
    """The error of a run that finds the lock taken."""
    who = "a run that has just begun" if owner is None else shown(owner)
    return WorkdirError(f"{lock.parent}: another run is writing there: {who}{more and f'; {more}'}")


def machine() -> str:
    """The running system's id: machines may share a host name, and process numbers start again after a boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's process
    return True


@contextlib.contextmanager
def beating(sign: Callable[[], Any]) -> Iterator[None]:
    """Calls `sign` every BEAT seconds while the block runs."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                sign()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # so that no late sign brings back a lock that is removed now
