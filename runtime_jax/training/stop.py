"""A clean end at SIGTERM or SIGINT: a training stops after a step, other long work between two of its parts."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np

from runtime_jax import hosts


class StoppedError(Exception):
    """A signal ended the work early; the text says what comes of it."""

    def __init__(self, name: str, outcome: str):
        """`name`: of the signal, such as "SIGTERM"."""
        super().__init__(f"stopped by {name}{outcome}")
        self.name = name

    @property
    def status(self) -> int:
        """The exit status, as a shell gives it."""
        return 128 + signal.Signals[self.name]


class Stop(contextlib.AbstractContextManager):
    """Turns the first SIGTERM or SIGINT into a request to stop; a later one has its usual effect.

    Within a second it has none: launchers and clusters may both send the same signal.

    >>> with Stop() as stop, stop.parts("; the same command goes on from there"):
    ...     for part in mine:
    ...         stop.check()
    ...         work(part)
    """

    def __init__(self, *, by_step: bool = False) -> None:
        """`by_step`: all processes count the same steps and must stop after the same one."""
        self.name: str | None = None
        self._by_step = by_step
        self._outcome = ""
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # JAX's own handler makes processes agree on a step. Only the main thread may set handlers.
        agreed = self._by_step and _process_count() > 1
        if not agreed and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._at > 1.0:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
        self._before = {}

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every process."""
        if _process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return self.name is not None

    def check(self) -> None:
        """Raises StoppedError if a signal has come to this process."""
        if self.name is not None:
            raise StoppedError(self.name, self._outcome)

    @contextlib.contextmanager
    def parts(self, outcome: str) -> Iterator[None]:
        """A block in which each process does its own parts of the work; after it all wait for each other.

        Args:
          outcome: of being stopped, for the error's text.

        Raises:
          StoppedError: on all processes, where one of them raised it in the block.
        """
        self._outcome, number = outcome, 0
        try:
            yield
        except StoppedError as stopped:
            number = signal.Signals[stopped.name]
        if number := hosts.gather(np.asarray(number)).max():
            raise StoppedError(signal.Signals(number).name, outcome)

    def __exit__(self, *exc_info: object) -> None:
        self._restore()


def _process_count() -> int:
    import jax

    return jax.process_count()
