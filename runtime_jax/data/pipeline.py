"""From sources to batches (shuffle, mix, crop, stack): batch s is a pure function of (config, s)."""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image

from runtime_jax.data.sources import SourceConfig, open_source
from runtime_jax.messages import cut
from runtime_jax.prng import Stream, host_rng

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    image_size: side of the square images in pixels.
    batch_size: examples per step over all hosts.
    sources: mixed in proportion to their weights.
    shuffle, random_crop, flip: True for training; False gives the sources in order and centre crops.
    num_workers: processes that read and decode; 0: threads instead, which suit a few cores.
    """

    image_size: int
    batch_size: int
    sources: tuple[SourceConfig, ...]
    seed: int = 0
    shuffle: bool = True
    random_crop: bool = True
    flip: bool = False
    num_workers: int = 0

    def __post_init__(self):
        for name in ("image_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}, it must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, allowed are 0 to 2**32 - 1")
        if not self.sources:
            raise ValueError("sources is empty: name at least one source")


def num_examples(config: DataConfig) -> int:
    """Examples in one epoch: the sum over the sources (a photograph counts as CROPS_PER_PHOTO crops)."""
    return sum(len(open_source(source)) for source in config.sources)


def make_batches(config: DataConfig, start_step: int, *, process_index: int = 0, process_count: int = 1) -> "Batches":
    """An endless iterator of this host's part of the batches start_step, start_step + 1, ...

    Host h of H gets rows h * B / H to (h + 1) * B / H of the global batch, which is the same for any H; nothing before
    start_step is read. Batches are {"image": uint8 [B/H, S, S, 3], "label": int32 [B/H], "example": int64 [B/H]}, where
    "example" is the example's number in the endless stream (step * B + row): fold it into keys.

    Raises:
        ValueError: a bad config, a missing source, or a batch that the hosts do not divide.
    """
    return read_batches(
        _stream(config),
        _stack,
        config.batch_size,
        start_step,
        process_index=process_index,
        process_count=process_count,
        num_workers=config.num_workers,
    )


def read_batches(
    stream: grain.MapDataset,
    stack: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
    start_step: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> "Batches":
    """`make_batches` for any endless sequence of examples.

    Args:
        stream: element i is an example, a pure function of i.
        stack: examples -> batch.
        batch_size: examples per step over all hosts.
        num_workers: processes that read; 0: threads instead.

    Raises:
        ValueError: a negative step, or a batch that the hosts do not divide.
    """
    if start_step < 0:
        raise ValueError(f"make_batches: start_step is {start_step}, it must not be negative")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"make_batches: process_index is {process_index} of {process_count} processes")
    local_size, rest = divmod(batch_size, process_count)
    if rest:
        raise ValueError(f"data.batch_size is {batch_size}, {process_count} hosts do not divide it")
    # Without drop_remainder, Grain's length of an endless stream of batches of 1 overflows.
    whole = stream.batch(local_size, drop_remainder=True, batch_fn=stack)
    mine = whole[start_step * process_count + process_index :: process_count]
    threads = 0 if num_workers else 2
    batches = mine.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if num_workers:
        # Grain reads an absl flag here, which fails unless absl has parsed the command line.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
        # The workers' batches lie in shared memory, which copies need not give back.
        batches = batches.map(_copy)
    return Batches(iter(batches))


class Batches(Iterator[Batch]):
    """The iterator of `read_batches`; `skipped` counts how often each unreadable file was replaced so far."""

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self._batches = batches
        self.skipped: Counter[str] = Counter()

    def __next__(self) -> Batch:
        batch, before = next(self._batches), len(self.skipped)
        self.skipped.update(batch.pop("skipped", ()))
        # Warns at the first file and whenever their number has doubled, so that a bad disk does not flood the log.
        if len(self.skipped).bit_length() > before.bit_length():
            message = f"{len(self.skipped)} unreadable image file(s) replaced so far: {cut(self.skipped)}"
            warnings.warn(message, stacklevel=2)
        return batch

    def close(self) -> None:
        """Stops the threads or processes behind the iterator, and ends it."""
        self._batches.close()


def _stream(config: DataConfig) -> grain.MapDataset:
    """The endless sequence of examples; element i depends on the config and i alone."""
    parts = []
    for number, source in enumerate(config.sources):
        examples = grain.MapDataset.source(open_source(source))
        part = examples.map(functools.partial(dict, crop_scale=source.scale))  # adds a key to each example
        if config.shuffle:
            part = part.shuffle(int(host_rng(config.seed, Stream.DATA, number).integers(2**32)))
        parts.append(part.repeat())
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [s.weight for s in config.sources])
    return mixed.map_with_index(_Augment(config))


@dataclasses.dataclass(frozen=True)
class _Augment:
    config: DataConfig

    def __call__(self, index: int, example: dict[str, Any]) -> dict[str, Any]:
        rng = host_rng(self.config.seed, Stream.AUGMENT, index)
        size = self.config.image_size
        if self.config.random_crop:
            image = random_crop(example["image"], size, example["crop_scale"], rng)
        else:
            image = center_crop(example["image"], size)
        if self.config.flip and rng.integers(2):
            image = image[:, ::-1]
        return {"image": image, "label": example["label"], "example": index, "skipped": example.get("skipped", ())}


def center_crop(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest centred square of uint8 [H, W, 3], resized to [size, size, 3]."""
    height, width = image.shape[:2]
    side = float(min(height, width))
    return _resize(image, (width - side) / 2, (height - side) / 2, side, size)


def random_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int, scale: tuple[float, float], rng: np.random.Generator
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random square whose side is `scale` times the shorter side (log-uniform), resized to [size, size, 3]."""
    height, width = image.shape[:2]
    side = min(height, width) * float(np.exp(rng.uniform(*np.log(scale))))
    return _resize(image, rng.uniform() * (width - side), rng.uniform() * (height - side), side, size)


def _resize(image: np.ndarray, left: float, top: float, side: float, size: int) -> np.ndarray:
    if side == size and left == int(left) and top == int(top):
        return image[int(top) : int(top) + size, int(left) : int(left) + size]
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box))


def _copy(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: np.array(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


def _stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "image": np.stack([e["image"] for e in examples]),
        "label": np.array([e["label"] for e in examples], np.int32),
        "example": np.array([e["example"] for e in examples], np.int64),
        "skipped": tuple(name for e in examples for name in e["skipped"]),
    }
