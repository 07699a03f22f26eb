"""What a run reports: `metrics.jsonl` (one JSON object a line), TensorBoard, PNG images, progress on the terminal.

Only process 0 writes.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from runtime_jax.files import BucketError, is_remote, path_of, read_bytes, replacing, write_text

_METRICS = "metrics.jsonl"
_UPLOAD_EVERY = 60.0  # seconds between two uploads to a bucket, unless checkpoints are more frequent


class MetricWriter(contextlib.AbstractContextManager):
    """Appends to `workdir/metrics.jsonl`, `workdir/tensorboard/` and `workdir/images/`.

    A run that resumes after step n drops what an earlier attempt wrote about later steps: the file then reads as if the
    run had never been interrupted. Errors of writing are OSErrors that name the file, also when the disk is full.

    Nothing can be appended in a bucket. There the files of this attempt grow on the local disk, and are uploaded as a
    whole: by `sync`, and about once a minute.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0, redo: str | None = None):
        """Opens the files and drops the lines about steps after `start_step`.

        With a prefix `redo`, lines about `start_step` whose names all begin with it are dropped too: they come again.
        """
        self._workdir = path_of(workdir)
        self._file = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # here, because importing it takes half a second

        folder = self._workdir
        if is_remote(self._workdir):
            self._local = tempfile.TemporaryDirectory()
            folder = Path(self._local.name)
            with contextlib.suppress(FileNotFoundError):
                (folder / _METRICS).write_bytes(read_bytes(self._workdir / _METRICS))
        _drop_later(folder / _METRICS, start_step, redo)
        self._file = (folder / _METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._due = time.monotonic() + _UPLOAD_EVERY

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line {"step": step, name: value, ...}, with null for NaN and infinities, which JSON lacks."""
        if self._file is None:
            return
        record = {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
        with _naming(self._file.name):
            self._file.write(json.dumps({"step": step} | record, allow_nan=False) + "\n")
            self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if time.monotonic() > self._due:
            self.sync()

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Writes an image as `images/<name>_<step>.png` and to TensorBoard."""
        if self._file is None:
            return
        from PIL import Image

        path = self._workdir / "images" / f"{name}_{step:08d}.png"
        with _naming(path), replacing(path) as new:
            Image.fromarray(image).save(new)
        self._board.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        """Uploads the lines and events so far, if the workdir is in a bucket."""
        if self._file is None or not is_remote(self._workdir):
            return
        begin = time.monotonic()
        self._board.flush()
        self._upload()
        end = time.monotonic()
        self._due = end + max(_UPLOAD_EVERY, 50 * (end - begin))  # at most 2% of the time

    def _upload(self) -> None:
        from runtime_jax.files import buckets

        folder = Path(self._local.name)
        for file in (folder / _METRICS, *(folder / "tensorboard").iterdir()):
            buckets.upload(file, self._workdir / file.relative_to(folder))

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._board.close()
            with _naming(self._file.name):
                self._file.close()
            self._file = None
            if is_remote(self._workdir):
                self._upload()
                self._local.cleanup()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds the file's name to OSErrors; those of a full disk lack it."""
    try:
        yield
    except BucketError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _drop_later(path: Path, step: int, redo: str | None) -> None:
    """Rewrites the file without the lines that come again and without a last line that was cut short."""
    if not path.exists():
        return

    def comes_again(record: dict[str, Any]) -> bool:
        again = redo is not None and all(name.startswith(redo) for name in record.keys() - {"step"})
        return record["step"] > step or (record["step"] == step and again)

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(path, "".join(line for line in lines if line.endswith("\n") and not comes_again(json.loads(line))))


class IntervalMeans:
    """Means of (sum, count) metrics over the steps since the last line; counts of events are summed, not averaged."""

    _SUMMED = ("nonfinite", "data/skipped")

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Adds the metrics of one step."""
        for key, (total, count) in metrics.items():
            before = self._sums.get(key, (0.0, 0.0))
            self._sums[key] = (before[0] + total, before[1] + count)

    def take(self) -> dict[str, float]:
        """Returns the means, NaN over no examples, and starts an empty interval."""
        sums, self._sums = self._sums, {}
        return {
            key: total if key in self._SUMMED else total / count if count else math.nan
            for key, (total, count) in sums.items()
        }

    def carried(self) -> dict[str, list[float]]:
        """The open interval as JSON-able values: a resumed run then writes the line of an uninterrupted one."""
        return {key: list(pair) for key, pair in self._sums.items()}

    def restore(self, carried: Mapping[str, list[float]]) -> None:
        """Inverse of `carried`."""
        self._sums = {key: (float(total), float(count)) for key, (total, count) in carried.items()}


class Rates(NamedTuple):
    """Seconds per step, the share of time spent waiting for data, and floating-point operations per second."""

    step: float
    data_wait: float
    flops: float


class Stopwatch:
    """Time per step of an interval, from now on; compilation, evaluation, pictures and checkpoints do not count."""

    def __init__(self) -> None:
        self._since: float | None = time.perf_counter()  # None while paused
        self._reset()

    def _reset(self) -> None:
        self._steps, self._flops, self._data_wait, self._elapsed = 0, 0.0, 0.0, 0.0

    def step(self, flops: float) -> None:
        """Counts one step and its floating-point operations."""
        self._steps += 1
        self._flops += flops

    def wait(self, seconds: float) -> None:
        """Counts time in which the device had no data to work on, unless the watch is paused."""
        if self._since is not None:
            self._data_wait += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the watch for the block."""
        self._elapsed += time.perf_counter() - self._since
        self._since = None
        yield
        self._since = time.perf_counter()

    def take(self) -> Rates | None:
        """Returns the interval's rates, None if it had no step, and starts the next interval."""
        now = time.perf_counter()
        elapsed = self._elapsed + (now - self._since if self._since is not None else 0.0)
        rates = Rates(elapsed / self._steps, self._data_wait / elapsed, self._flops / elapsed) if self._steps else None
        self._reset()
        self._since = now if self._since is not None else None
        return rates


class Progress(contextlib.AbstractContextManager):
    """A bar on a terminal, else one line per interval; only on process 0."""

    _SHOWN = ("loss", "lr", "grad_norm")

    def __init__(self, start_step: int, total_steps: int) -> None:
        self._total = total_steps
        self._quiet = jax.process_index() != 0
        self._bar = None
        if sys.stderr.isatty() and not self._quiet:
            self._bar = tqdm(initial=start_step, total=total_steps, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._bar is not None:
            self._bar.write(text)
        elif not self._quiet:
            print(text, flush=True)

    def line(self, step: int, means: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Shows an interval: step, loss, learning rate, gradient norm, speed, data wait, time to go."""
        parts = [f"{key} {means[key]:.4g}" for key in self._SHOWN if key in means]
        if means.get("nonfinite"):
            parts.append(f"skipped {means['nonfinite']:.0f}")
        if means.get("data/skipped"):
            parts.append(f"unreadable images {means['data/skipped']:.0f}")
        if rates:
            parts.append(f"{rates['time/step']:.3g} s/step")
            parts.append(f"{rates['time/examples_per_s_per_chip']:.4g} images/s/chip")
            if "time/mfu" in rates:
                parts.append(f"MFU {rates['time/mfu']:.1%}")
            parts.append(f"data-wait {rates['time/data_wait']:.1%}")
            parts.append(f"ETA {timedelta(seconds=round((self._total - step) * rates['time/step']))}")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
        else:
            self.say("  ".join([f"step {step}/{self._total}", *parts]))

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
