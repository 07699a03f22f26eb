"""From sources to batches (shuffle, mix, crop, stack): batch s is a pure function of (config, s)."""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from runtime_jax.config import added
from runtime_jax.data.picture import open_image
from runtime_jax.data.sources import Source, SourceConfig, open_source
from runtime_jax.data.views import ResizedCropConfig, Resizer, ViewConfig, check_resizer, take_view
from runtime_jax.messages import cut
from runtime_jax.prng import Stream, host_rng

Batch = dict[str, np.ndarray]
_KEYS = ("image", "label", "example", "skipped")  # of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    image_size: side of the square images in pixels.
    batch_size: examples per step over all hosts.
    sources: mixed in proportion to their weights.
    shuffle, random_crop, flip: True for training; False gives the sources in order and centre crops.
    num_workers: processes that read and decode; 0: threads instead, which suit a few cores.
    resized_crop: random parts of any shape in place of random squares; sources must not set `crop_scale` then.
    views: further views of each picture, each under its own name in the batch.
    resize: "simd" takes a sixth of the time of "pillow", and rounds differently: photos by 0.25 of 255 on average.
    """

    image_size: int
    batch_size: int
    sources: tuple[SourceConfig, ...]
    seed: int = 0
    shuffle: bool = True
    random_crop: bool = True
    flip: bool = False
    num_workers: int = 0
    resized_crop: ResizedCropConfig | None = added(None)
    views: tuple[ViewConfig, ...] = added(())
    resize: Resizer = added("pillow")

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
        names = [view.name for view in self.views]
        if len({*names, *_KEYS}) < len(names) + len(_KEYS):
            raise ValueError(f"views are named {names}: each name once, and none of {', '.join(_KEYS)}")
        if self.resized_crop and any(source.crop_scale for source in self.sources):
            raise ValueError("resized_crop is set, and so is crop_scale of a source: only one of them applies")
        self.main_view()

    def main_view(self) -> ViewConfig:
        """The view that is "image" in a batch; raises ValueError if its fields do not fit together."""
        return ViewConfig(
            name="image",
            image_size=self.image_size,
            random_crop=self.random_crop,
            resized_crop=self.resized_crop,
            flip=self.flip,
        )


def num_examples(config: DataConfig) -> int:
    """Examples in one epoch: the sum over the sources (a photograph counts as CROPS_PER_PHOTO crops)."""
    return sum(len(open_source(source)) for source in config.sources)


def make_batches(config: DataConfig, start_step: int, *, process_index: int = 0, process_count: int = 1) -> "Batches":
    """An endless iterator of this host's part of the batches start_step, start_step + 1, ...

    Host h of H gets rows h * B / H to (h + 1) * B / H of the global batch, which is the same for any H; nothing before
    start_step is read. Batches are {"image": uint8 [B/H, S, S, 3], "label": int32 [B/H], "example": int64 [B/H]}, where
    "example" is the example's number in the endless stream (step * B + row): fold it into keys. Each of config.views
    adds its name: uint8 [B/H, S', S', 3].

    Raises:
        ValueError: a bad config, a missing source, or a batch that the hosts do not divide.
    """
    load = _Load(config)
    return read_batches(
        picture_sequence(config, load.sources),
        load,
        config.batch_size,
        start_step,
        process_index=process_index,
        process_count=process_count,
        num_workers=config.num_workers,
    )


def read_batches(
    stream: grain.MapDataset,
    stack: Callable[[list[Any]], dict[str, Any]],
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


def batch_sequence(config: DataConfig) -> grain.MapDataset:
    """All batches as an endless sequence, whose element i is read when it is asked for; raises as `make_batches`."""
    load = _Load(config)
    return picture_sequence(config, load.sources).batch(config.batch_size, batch_fn=load)


def picture_sequence(config: DataConfig, sources: Sequence[Source]) -> grain.MapDataset:
    """The endless sequence of `Picture` of a config's opened sources; element i depends on the config and i alone."""
    parts = []
    for number, source in enumerate(sources):
        part = grain.MapDataset.range(len(source))
        if config.shuffle:
            part = part.shuffle(int(host_rng(config.seed, Stream.DATA, number).integers(2**32)))
        parts.append(part.repeat().map(functools.partial(Picture, number)))
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [s.weight for s in config.sources])
    return mixed.map_with_index(lambda example, picture: picture._replace(example=example))


class Picture(NamedTuple):
    """The picture that an example shows."""

    source: int  # the source's number
    index: int  # the picture's in its source
    example: int = -1  # the example's in the endless stream


class _Load:
    """Reads the pictures of a batch."""

    def __init__(self, config: DataConfig):
        check_resizer(config.resize)
        self._config = config
        self.sources = [open_source(source, open_image) for source in config.sources]
        self._views = (config.main_view(), *config.views)

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        batch = {view.name: np.empty((len(pictures), *view.shape), np.uint8) for view in self._views}
        labels, skipped = [], []
        # Made together, before pictures fill the caches: one at a time, a generator takes seven times as long.
        generators = [self._generators(picture.example) for picture in pictures]
        for row, picture in enumerate(pictures):
            example = self.sources[picture.source][int(picture.index)]
            labels.append(example["label"])
            skipped.extend(example.get("skipped", ()))
            options = {"crop_scale": self._config.sources[picture.source].scale, "resizer": self._config.resize}
            for view, rng in zip(self._views, generators[row], strict=True):
                batch[view.name][row] = take_view(example["image"], view, rng, **options)
        numbers = np.array([picture.example for picture in pictures], np.int64)
        return batch | {"label": np.array(labels, np.int32), "example": numbers, "skipped": tuple(skipped)}

    def _generators(self, example: int) -> list[np.random.Generator]:
        """One for each view; that of "image" does not depend on the others."""
        counters = ([number] if number else [] for number in range(len(self._views)))
        return [host_rng(self._config.seed, Stream.AUGMENT, example, *counter) for counter in counters]


def _copy(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: np.array(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}
