"""Long measurements in parts: files that a stopped run keeps, and that several processes share.

A part has a fixed range of images, whatever the batches and the processes, and holds arrays with a row for each image.
So what is computed from all parts is bit-equal after a kill and on any number of processes.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped
from tqdm import tqdm

from mergevq_jax.evaluate.frechet import Moments
from runtime_jax.files import AnyPath, replacing
from runtime_jax.sharding import Axis, partition_spec
from runtime_jax.training.stop import Stop, StoppedError

SMALLEST, LARGEST = 32, 1024  # images in a part
THREADS = min(8, os.cpu_count() or 1)
Rows = dict[str, Shaped[np.ndarray, "n ..."]]


class Task(NamedTuple):
    """A measurement of images 0 to count - 1.

    read: rows -> what `start` and `finish` need of them; some batches are read ahead, on threads.
    start: (rows, what was read) -> device arrays, of which one batch is computed ahead.
    finish: (what was read, the same arrays on the host) -> arrays by name, a row for each image; on threads.
    check: (rows of a part, its arrays) raises an error for results that must not be kept.
    """

    name: str  # folder of its parts
    label: str  # of the progress bar
    count: int
    batch_size: int  # see `fitting`
    read: Callable[[range], Any]
    start: Callable[[range, Any], Any]
    finish: Callable[[Any, Any], Rows]
    check: Callable[[range, Rows], None]


def part_size(count: int) -> int:
    """Images in a part of `count` images: a power of two, so that batches fill it."""
    return min(LARGEST, max(SMALLEST, 1 << (count // 64).bit_length()))


def fitting(batch_size: int, count: int) -> int:
    """The size of batches that are not much larger than what there is to fill them."""
    return min(batch_size, part_size(count), count)


def measure(task: Task, folder: AnyPath, stop: Stop) -> None:
    """Measures the parts that are not in `folder`; process i of n those with the numbers i, i + n, ...

    Reading, the devices' work and the host's overlap. Call it in a block of `stop.parts`.

    Raises:
      StoppedError: by a signal; complete parts are kept.
    """
    parts = _paths(task, folder)
    mine = [number for number in range(len(parts)) if number % jax.process_count() == jax.process_index()]
    missing = [number for number in mine if not parts[number][1].exists()]
    images = sum(len(parts[number][0]) for number in mine)
    left = sum(len(parts[number][0]) for number in missing)
    batches = [(number, rows) for number in missing for rows in _batches(parts[number][0], task.batch_size)]
    quiet = True if jax.process_index() > 0 else None
    with (
        tqdm(desc=task.label, total=images, initial=images - left, unit="image", disable=quiet) as bar,
        _threads() as readers,
        _threads() as finishers,
    ):
        computing: deque[tuple[int, range, Any, Any]] = deque()
        finishing: deque[tuple[int, range, Future[Rows]]] = deque()
        collected: list[Rows] = []

        def fetch(ahead: int) -> None:
            """Waits until the devices have at most so many batches to compute."""
            while len(computing) > ahead:
                number, rows, read, arrays = computing.popleft()
                future = finishers.submit(task.finish, read, jax.device_get(arrays))
                finishing.append((number, rows, future))

        def settle(most: int) -> None:
            """Waits until at most so many batches are being finished, and writes the parts that are complete."""
            while len(finishing) > most or (finishing and finishing[0][2].done()):
                number, rows, future = finishing.popleft()
                collected.append(future.result())
                bar.update(len(rows))
                whole, path = parts[number]
                if rows.stop == whole.stop:
                    arrays = {name: np.concatenate([batch[name] for batch in collected]) for name in collected[0]}
                    collected.clear()
                    task.check(whole, arrays)
                    with replacing(path) as new:
                        np.savez(new, **arrays)

        for (number, rows), read in zip(
            batches, _ahead(readers, task.read, [rows for _, rows in batches]), strict=True
        ):
            try:
                stop.check()
            except StoppedError:
                settle(0)
                raise
            computing.append((number, rows, read, task.start(rows, read)))
            fetch(1)
            settle(THREADS)
        fetch(0)
        settle(0)


class Measured:
    """The arrays of all images of a task, from its parts."""

    def __init__(self, task: Task, folder: AnyPath):
        self.count = task.count
        self._paths = [path for _, path in _paths(task, folder)]
        with self._paths[0].open("rb") as file, np.load(file) as arrays:
            self.names = frozenset(arrays.files)

    def parts(self, name: str) -> Iterator[Shaped[np.ndarray, "n ..."]]:
        """An array, part by part."""
        for path in self._paths:
            with path.open("rb") as file, np.load(file) as arrays:
                yield arrays[name]

    def column(self, name: str) -> Shaped[np.ndarray, "N ..."]:
        """An array of all images."""
        return np.concatenate(list(self.parts(name)))

    def some(self, name: str, most: int) -> Shaped[np.ndarray, "n ..."]:
        """An array of `most` evenly spaced images, or of all."""
        chosen = np.arange(min(most, self.count)) * self.count // min(most, self.count)
        rows, start = [], 0
        for part in self.parts(name):
            first, last = np.searchsorted(chosen, [start, start + len(part)])
            rows.append(part[chosen[first:last] - start])
            start += len(part)
        return np.concatenate(rows)

    def width(self, name: str) -> int:
        """Of features."""
        return next(self.parts(name)).shape[1]

    def moments(self, name: str) -> Moments:
        """Of features; no two parts are in memory at once."""
        moments = None
        for features in self.parts(name):
            moments = (Moments.zeros(features.shape[1]) if moments is None else moments).update(features)
        return moments


def _paths(task: Task, folder: AnyPath) -> list[tuple[range, AnyPath]]:
    size = part_size(task.count)
    starts = range(0, task.count, size)
    return [
        (range(start, min(start + size, task.count)), folder / task.name / f"{number:06d}.npz")
        for number, start in enumerate(starts)
    ]


def _batches(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads; when the block fails, what they have not begun is dropped."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, read: Callable[[range], Any], batches: Sequence[range]) -> Iterator[Any]:
    """What `read` returns for each batch, in order, a few batches ahead."""
    coming: deque[Future] = deque()
    for rows in batches:
        coming.append(pool.submit(read, rows))
        if len(coming) > THREADS:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def padded(batch: Shaped[np.ndarray, "n ..."], size: int) -> Shaped[np.ndarray, "{size} ..."]:
    """A batch filled up with copies of its last row, so that one compiled program serves all batches."""
    return np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


def split_over(mesh: Mesh, batch: Shaped[np.ndarray, "B ..."]) -> Shaped[Array, "B ..."]:
    """A batch on this process's devices, split over as many of the mesh's batch axes as divide it."""
    spec = partition_spec(batch.shape, (Axis.BATCH, *(None,) * (batch.ndim - 1)), mesh.shape)
    return jax.device_put(batch, NamedSharding(mesh, spec))
