"""The train loop: steps, metrics, checkpoints, previews, evaluation, and a clean end whatever happens.

The host stays one step behind the device: it dispatches step s + 1 and then reads the metrics of step s. So the device
never waits for the host, which still sees the metrics of every step.
"""

import contextlib
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from runtime_jax.config import Duration
from runtime_jax.sharding import shard_batch
from runtime_jax.training.checkpoint import Checkpointer
from runtime_jax.training.logging import IntervalMeans, MetricWriter, Progress, Stopwatch
from runtime_jax.training.program import Program
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import output_folder

Batch = Mapping[str, Any]
Metrics = Mapping[str, tuple[Any, Any]]
_EVAL = "eval/"  # prefix of the names that `evaluate` returns


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length and intervals of a run; an interval of 0 means never (checkpoints: only at the end)."""

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


@dataclass
class _Pending:
    """A dispatched step, number 1, 2, ..., whose metrics have not been read; `skipped` files were replaced so far."""

    number: int
    metrics: Metrics
    examples: int
    skipped: int

    def finished(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.metrics) if isinstance(leaf, jax.Array))


@dataclass(kw_only=True)
class Loop:
    """One run up to step `total_steps` (call `run` once); it writes checkpoints, metrics and pictures below `workdir`.

    A run that is killed and started again (with `initial_state`) writes the same metrics, bit for bit, as an
    uninterrupted one, except for those named `time/...`. SIGTERM and SIGINT end it after the current step, with a
    checkpoint; a second signal ends it at once.

    Attributes:
        resolved_config: JSON-able; saved in every checkpoint.
        program: its metrics are (sum, count) pairs of device scalars, logged as sum / count over the interval; the sum
            of "nonfinite" is 1 if the update was skipped, and is logged as the number of such steps.
        batches: start step -> iterator of host batches, batch s a pure function of s; its leading dimension is this
            process's share of the batch. However the run ends, it calls the iterator's `close()`, if there is one. If
            the iterator has a mapping `skipped` from unreadable files to how often they were replaced so far, the
            interval's growth is logged as `data/skipped` where it is not 0 (on process 0, of its own share).
        preview: (state, step) -> images [H, W, 3] uint8 by name; every `preview_every` steps and at the end.
        evaluate: (state, step) -> numbers by name, logged as `eval/<name>`; every `eval_every` steps and at the end. If
            it or `preview` raises a FloatingPointError, the run reports that and goes on.
        variant: step -> variant of the program. The first step of each variant compiles and is left out of the reported
            times.
        peak_flops: peak operations per second of one device; None: no MFU.
    """

    config: LoopConfig
    workdir: str | os.PathLike
    resolved_config: Mapping[str, Any]
    total_steps: int
    program: Program
    batches: Callable[[int], Iterator[Batch]]
    preview: Callable[[Any, int], Mapping[str, np.ndarray] | None] | None = None
    evaluate: Callable[[Any, int], Mapping[str, float] | None] | None = None
    variant: Callable[[int], Hashable] = lambda step: None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        self.means = IntervalMeans()
        self.skipped_in_a_row = 0
        self.skipped_files = 0
        self.pending: _Pending | None = None

    def run(self, state: Any, start_step: int) -> Result:
        """Trains a state of `initial_state`, which has seen `start_step` steps; each step donates it.

        Raises:
            FloatingPointError: `max_nonfinite` updates in a row were skipped; names the steps.
            WorkdirError: the workdir cannot be written or the disk is full (raised before compiling, if possible).
        """
        path = output_folder(self.workdir, self.config.min_free_bytes)
        with contextlib.ExitStack() as stack:
            self.progress = stack.enter_context(Progress(start_step, self.total_steps))
            if start_step >= self.total_steps:
                self.progress.say(f"nothing to do: the state has seen {start_step} of {self.total_steps} steps")
                return Result(state, start_step, None)
            self.checkpointer = stack.enter_context(Checkpointer(path, keep=self.config.keep_checkpoints))
            carried = self.checkpointer.loop(start_step) if start_step in self.checkpointer.steps() else {}
            # A signal may have left the evaluation of this step for later; a later attempt may have made it already.
            look = bool(carried) and not carried["looked"]
            self.writer = stack.enter_context(MetricWriter(path, start_step, redo=_EVAL if look else None))
            self.stream = self.batches(start_step)
            if hasattr(self.stream, "close"):
                stack.callback(self.stream.close)
            self.stop = stack.enter_context(Stop(by_step=True))
            if carried:  # the interval that was open when this run's own checkpoint was saved
                self.means.restore(carried["means"])
                self.skipped_in_a_row = carried["skipped_in_a_row"]
            if look:
                self.look(state, start_step)
            return self.train(state, start_step)

    def train(self, state: Any, start_step: int) -> Result:
        """The steps, and what is due after each."""
        compiled: set[Hashable] = set()
        self.watch = Stopwatch()
        for step in range(start_step, self.total_steps):
            key, number = self.variant(step), step + 1
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
            saving = stopping or self.due(number, self.config.checkpoint_every) or number == self.total_steps
            if looking or saving:
                self.settle()
                with self.watch.paused():
                    if looking and not stopping:  # a signal leaves little time; the restarted run looks
                        self.look(state, number)
                    if saving:
                        self.save(state, number, looked=not (looking and stopping))
            if stopping:
                self.checkpointer.wait()
                saved = self.checkpointer.path(number)
                self.progress.say(f"{self.stop.name}: stopped after step {number}, saved {saved}")
                return Result(state, number, self.stop.name)
        return Result(state, self.total_steps, None)

    def due(self, number: int, every: int) -> bool:
        """Whether this step ends an interval of `every` steps, or the run; never if `every` is 0."""
        return every > 0 and (number % every == 0 or number == self.total_steps)

    def next_batch(self) -> Any:
        """The next batch, on its way to the devices; counts as data wait if they have run out of work meanwhile."""
        begin = time.perf_counter()
        batch = next(self.stream, None)
        if batch is None:
            raise ValueError("batches: the iterator ended before the last step; it must go on without end")
        batch = shard_batch(batch, self.program.mesh)
        if self.pending is None or self.pending.finished():
            self.watch.wait(time.perf_counter() - begin)
        return batch

    def dispatch(self, state: Any, batch: Any, step: int) -> Any:
        """Starts a step, and settles the previous one while it runs."""
        state, metrics = self.program.step(state, batch, self.variant(step))
        self.settle()
        skipped = sum(getattr(self.stream, "skipped", {}).values())
        self.pending = _Pending(step + 1, metrics, jax.tree.leaves(batch)[0].shape[0], skipped)
        return state

    def settle(self, timed: bool = True) -> None:
        """Waits for the step in flight, if any, and accounts for it."""
        done, self.pending = self.pending, None
        if done is not None:
            self.account(done, timed)

    def account(self, done: _Pending, timed: bool) -> None:
        """Reads a step's metrics: the non-finite policy, the interval's means, the log line."""
        metrics = {key: (float(total), float(n)) for key, (total, n) in jax.device_get(dict(done.metrics)).items()}
        if done.skipped > self.skipped_files:
            metrics["data/skipped"] = (float(done.skipped - self.skipped_files), 1.0)
            self.skipped_files = done.skipped
        if timed:
            self.watch.step(self.program.flops(self.variant(done.number - 1)))
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
            found = self.looked("evaluation", self.evaluate, state, number)
            numbers = {f"{_EVAL}{key}": float(value) for key, value in found.items()}
            if numbers:
                self.writer.scalars(number, numbers)
                shown = (f"{key} {value:.4g}" for key, value in numbers.items())
                self.progress.say("  ".join([f"step {number}", *shown]))
        if self.preview is not None and self.due(number, self.config.preview_every):
            for name, image in self.looked("preview", self.preview, state, number).items():
                self.writer.images(number, name, image)

    def looked(self, what: str, look: Callable[[Any, int], Any], state: Any, number: int) -> Mapping[str, Any]:
        """What an evaluation or a preview returns; values that are not finite don't end the run."""
        try:
            return look(state, number) or {}
        except FloatingPointError as error:
            self.progress.say(f"step {number}: no {what}: {error}")
            return {}

    def save(self, state: Any, number: int, looked: bool) -> None:
        """Starts to write a checkpoint; the metrics of the steps up to it are already there."""
        self.writer.sync()
        carried = {"means": self.means.carried(), "skipped_in_a_row": self.skipped_in_a_row, "looked": looked}
        self.checkpointer.save(number, state, self.resolved_config, carried)
