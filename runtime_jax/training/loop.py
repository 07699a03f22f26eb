"""The train loop: steps, metrics, checkpoints, previews, evaluation, and a clean end whatever happens.

The host stays one step behind the device: it dispatches step s + 1 and then reads the metrics of step s. So the device
never waits for the host, and yet every step's count of skipped updates is seen.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from runtime_jax.config import Duration
from runtime_jax.training.checkpoint import Checkpointer
from runtime_jax.training.logging import IntervalMeans, MetricWriter, Progress, Stopwatch
from runtime_jax.workdir import output_folder

Batch = Mapping[str, Any]
Metrics = Mapping[str, tuple[Any, Any]]
_EVAL = "eval/"  # begins the names of what `evaluate` gives


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run is and what it does on the way; an interval of 0 means never (checkpoints: only at the end)."""

    duration: Duration
    log_every: int = 50
    checkpoint_every: int = 1000
    eval_every: int = 0
    preview_every: int = 0
    keep_checkpoints: int = 3
    max_nonfinite: int = 10
    min_free_bytes: int = 2**28

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.keep_checkpoints < 1 or self.max_nonfinite < 1:
            raise ValueError("log_every, keep_checkpoints and max_nonfinite are at least 1")
        if min(self.checkpoint_every, self.eval_every, self.preview_every, self.min_free_bytes) < 0:
            raise ValueError("checkpoint_every, eval_every, preview_every and min_free_bytes are not negative")


class Result(NamedTuple):
    """The state at the end, the steps it has seen, and the signal that ended the run early, if one did."""

    state: Any
    step: int
    stopped_by: str | None


def run(
    *,
    config: LoopConfig,
    workdir: str | Path,
    resolved_config: Mapping[str, Any],
    state: Any,
    start_step: int,
    total_steps: int,
    train_step: Callable[[Any, Any, int], tuple[Any, Metrics]],
    batches: Callable[[int], Iterator[Batch]],
    shard: Callable[[Batch], Any],
    preview: Callable[[Any, int], Mapping[str, np.ndarray] | None] | None = None,
    evaluate: Callable[[Any, int], Mapping[str, float] | None] | None = None,
    variant: Callable[[int], Hashable] = lambda step: None,
    flops_per_step: float | Callable[[int], float] | None = None,
    peak_flops: float | None = None,
) -> Result:
    """Trains from `start_step` to `total_steps`, writing checkpoints, metrics and pictures below `workdir`.

    A run that is killed and started again (with `initial_state`) writes the same metrics, bit for bit, as
    one that was not, but for those named `time/...`. SIGTERM and SIGINT end it after the current step, with a
    checkpoint; a second signal ends it at once.

    Args:
        config: intervals and limits.
        workdir: directory of the run.
        resolved_config: saved in every checkpoint, JSON-able.
        state: from `initial_state`; donated to `train_step`.
        start_step: number of steps that `state` has seen.
        total_steps: number of steps at the end, `config.duration.to_steps(...)`.
        train_step: (state, batch, step) -> (state, metrics), jitted; `step` counts from 0. Metrics are (sum, count)
            pairs of device scalars, averaged over the logging interval as sum / count; the sum of "nonfinite" is 1
            where the update was skipped, and is logged as the number of such steps.
        batches: start step -> iterator of host batches, batch s a pure function of s; its leading dimension is this
            process's share of the batch. The iterator's `close()`, if it has one, is called when the run ends, however
            it ends. If it has a mapping `skipped`, how often each unreadable file was replaced so far, the growth in an
            interval is logged as `data/skipped` where it is not 0 (on process 0, of its own share).
        shard: host batch -> device batch.
        preview: (state, step) -> images [H, W, 3] uint8 by name; called every `preview_every` steps and at the end.
        evaluate: (state, step) -> numbers by name, logged as `eval/<name>`; every `eval_every` steps and at the end. A
            FloatingPointError of it, or of `preview`, is told and does not end the run.
        variant: step -> key of the program that `train_step` runs. The first step of each key compiles and is left out
            of the reported times.
        flops_per_step: floating-point operations of a step over all devices, for the MFU; a function of the step where
            its variants differ.
        peak_flops: peak operations per second of one device.

    Returns:
        The state, its step, and the name of the signal that ended the run early, or None.

    Raises:
        FloatingPointError: `max_nonfinite` updates in a row were skipped; names the steps.
        WorkdirError: the workdir cannot be written or the disk is full (found out before compiling, if possible).
    """
    path = output_folder(workdir, config.min_free_bytes)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(start_step, total_steps))
        if start_step >= total_steps:
            progress.say(f"nothing to do: the state has seen {start_step} of {total_steps} steps")
            return Result(state, start_step, None)
        checkpointer = stack.enter_context(Checkpointer(path, keep=config.keep_checkpoints))
        carried = checkpointer.loop(start_step) if start_step in checkpointer.steps() else {}
        # Where a signal left the evaluation of this step for later, an attempt since then may have made it already.
        look = bool(carried) and not carried["looked"]
        writer = stack.enter_context(MetricWriter(path, start_step, redo=_EVAL if look else None))
        stream = batches(start_step)
        if hasattr(stream, "close"):
            stack.callback(stream.close)
        this = _Run(
            config=config,
            resolved_config=resolved_config,
            total_steps=total_steps,
            train_step=train_step,
            preview=preview,
            evaluate=evaluate,
            flops=flops_per_step if callable(flops_per_step) else lambda step: flops_per_step or 0.0,
            peak_flops=peak_flops,
            stream=stream,
            shard=shard,
            checkpointer=checkpointer,
            writer=writer,
            progress=progress,
            stop=stack.enter_context(_Stop()),
        )
        if carried:
            this.resume(carried)
        if look:
            this.look(state, start_step)
        return this.train(state, start_step, variant)


@dataclass
class _Pending:
    """A step that was dispatched and whose metrics were not read yet; `number` counts from 1.

    `skipped`: unreadable files that were replaced in this run's batches up to this step's.
    """

    number: int
    metrics: Metrics
    examples: int
    skipped: int

    def finished(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.metrics) if isinstance(leaf, jax.Array))


@dataclass(kw_only=True)
class _Run:
    """One call of `run`: its parts, and what is carried from step to step besides the state."""

    config: LoopConfig
    resolved_config: Mapping[str, Any]
    total_steps: int
    train_step: Callable[[Any, Any, int], tuple[Any, Metrics]]
    preview: Callable[[Any, int], Mapping[str, np.ndarray] | None] | None
    evaluate: Callable[[Any, int], Mapping[str, float] | None] | None
    flops: Callable[[int], float]
    peak_flops: float | None
    stream: Iterator[Batch]
    shard: Callable[[Batch], Any]
    checkpointer: Checkpointer
    writer: MetricWriter
    progress: Progress
    stop: "_Stop"

    def __post_init__(self) -> None:
        self.means = IntervalMeans()
        self.watch = Stopwatch()
        self.skipped_in_a_row = 0
        self.skipped_files = 0
        self.pending: _Pending | None = None

    def resume(self, carried: Mapping[str, Any]) -> None:
        """Takes up the interval that was open when this run's own checkpoint was saved."""
        self.means.restore(carried["means"])
        self.skipped_in_a_row = carried["skipped_in_a_row"]

    def train(self, state: Any, start_step: int, variant: Callable[[int], Hashable]) -> Result:
        """The steps; `state` is donated at each."""
        compiled: set[Hashable] = set()
        self.watch.start()
        for step in range(start_step, self.total_steps):
            key, number = variant(step), step + 1
            if key in compiled:
                state = self.dispatch(state, self.next_batch(), step)
            else:
                compiled.add(key)
                self.settle()
                with self.watch.paused():
                    state = self.dispatch(state, self.next_batch(), step)
                    self.settle(timed=False)
            stopping = number < self.total_steps and self.stop.requested(number)
            looking = self.due(number, self.config.eval_every) or self.due(number, self.config.preview_every)
            if stopping or looking or self.due(number, self.config.checkpoint_every) or number == self.total_steps:
                self.settle()
                with self.watch.paused():
                    if looking and not stopping:  # a signal leaves little time: after the restart is soon enough
                        self.look(state, number)
                    if stopping or self.due(number, self.config.checkpoint_every) or number == self.total_steps:
                        self.save(state, number, looked=not (looking and stopping))
            if stopping:
                return self.stopped(state, number)
        return Result(state, self.total_steps, None)

    def due(self, number: int, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is done after this step."""
        return every > 0 and (number % every == 0 or number == self.total_steps)

    def next_batch(self) -> Any:
        """The next batch, on its way to the devices; data wait where these had run out of work by the end of it."""
        begin = time.perf_counter()
        batch = next(self.stream, None)
        if batch is None:
            raise ValueError("batches: the iterator ended before the last step; it must go on without end")
        batch = self.shard(batch)
        if self.pending is None or self.pending.finished():
            self.watch.wait(time.perf_counter() - begin)
        return batch

    def dispatch(self, state: Any, batch: Any, step: int) -> Any:
        """Starts a step, and while it runs settles the one before."""
        state, metrics = self.train_step(state, batch, step)
        before, self.pending = self.pending, None
        if before is not None:
            self.account(before, timed=True)
        skipped = sum(getattr(self.stream, "skipped", {}).values())
        self.pending = _Pending(step + 1, metrics, jax.tree.leaves(batch)[0].shape[0], skipped)
        return state

    def settle(self, timed: bool = True) -> None:
        """Waits for the step in flight, if there is one, and accounts for it."""
        if self.pending is not None:
            before, self.pending = self.pending, None
            self.account(before, timed)

    def account(self, done: _Pending, timed: bool) -> None:
        """Reads a step's metrics: the non-finite policy, the interval's means, the log line."""
        metrics = {key: (float(total), float(n)) for key, (total, n) in jax.device_get(dict(done.metrics)).items()}
        if done.skipped > self.skipped_files:
            metrics["data/skipped"] = (float(done.skipped - self.skipped_files), 1.0)
            self.skipped_files = done.skipped
        if timed:
            self.watch.step(self.flops(done.number - 1))
        self.means.add(metrics)
        self.progress.advance()
        skipped = metrics.get("nonfinite", (0.0, 1.0))[0] > 0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        failing = self.skipped_in_a_row >= self.config.max_nonfinite
        if failing or done.number % self.config.log_every == 0 or done.number == self.total_steps:
            self.log(done)
        if failing:
            self.checkpointer.wait()
            raise FloatingPointError(
                f"step {done.number}: loss or gradient not finite in {self.skipped_in_a_row} updates in a row, all "
                f"skipped; the newest checkpoint is of step {self.checkpointer.latest()}"
            )

    def log(self, done: _Pending) -> None:
        """Writes the means and rates of the interval that ends with this step, and opens the next."""
        means, seconds = self.means.take(), self.watch.take()
        rates = {}
        if seconds is not None:
            rates = {"time/step": seconds.step, "time/data_wait": seconds.data_wait}
            rates["time/examples_per_s_per_chip"] = done.examples / seconds.step / jax.device_count()
            if seconds.flops and self.peak_flops:
                rates["time/mfu"] = seconds.flops / (self.peak_flops * jax.device_count())
        self.writer.scalars(done.number, means | rates)
        self.progress.line(done.number, means, rates)

    def look(self, state: Any, number: int) -> None:
        """Evaluates and draws what is due after this step."""
        if self.evaluate is not None and self.due(number, self.config.eval_every):
            found = self.looked(lambda: self.evaluate(state, number), number, "evaluation")
            numbers = {f"{_EVAL}{key}": float(value) for key, value in found.items()}
            if numbers:
                self.writer.scalars(number, numbers)
                self.progress.say(
                    "  ".join([f"step {number}", *(f"{key} {value:.4g}" for key, value in numbers.items())])
                )
        if self.preview is not None and self.due(number, self.config.preview_every):
            for name, image in self.looked(lambda: self.preview(state, number), number, "preview").items():
                self.writer.images(number, name, image)

    def looked(self, look: Callable[[], Mapping[str, Any] | None], number: int, what: str) -> Mapping[str, Any]:
        """What an evaluation or a preview gives; it does not end the run where its values are not finite."""
        try:
            return look() or {}
        except FloatingPointError as error:
            self.progress.say(f"step {number}: no {what}: {error}")
            return {}

    def save(self, state: Any, number: int, looked: bool) -> None:
        """Starts to write a checkpoint; the lines about the steps up to it are on disk by now."""
        carried = {"means": self.means.carried(), "skipped_in_a_row": self.skipped_in_a_row, "looked": looked}
        self.checkpointer.save(number, state, self.resolved_config, carried)

    def stopped(self, state: Any, number: int) -> Result:
        self.checkpointer.wait()
        self.progress.say(f"{self.stop.name}: stopped after step {number}, saved {self.checkpointer.path(number)}")
        return Result(state, number, self.stop.name)


class _Stop(contextlib.AbstractContextManager):
    """Turns the first SIGTERM or SIGINT into a request to stop; the second acts as it did before."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        # With several processes JAX's own handler makes them agree on the step. Only the main thread may set handlers.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def requested(self, number: int) -> bool:
        """Whether to stop after this step; the same answer on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(number):
            self.name = "SIGTERM"
        return self.name is not None

    def __exit__(self, *exc_info: object) -> None:
        self._restore()
