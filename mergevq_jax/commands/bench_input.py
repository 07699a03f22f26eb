"""`mergevq bench-input`: images per second that a core reads, beside decoding alone, and the cores that a run needs."""

import contextlib
import dataclasses
import io
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from mergevq_jax.generator.data import TokensConfig
from runtime_jax.data import DataConfig, SourceConfig, batch_sequence, open_source, picture_sequence
from runtime_jax.data.picture import JPEG

ROUND = 64  # images that are read in turn by either side
MOST_ROUNDS = 200
SYNTHETIC = 64  # different pictures
NAMES = 4096  # of the synthetic pictures: grain takes long to shuffle fewer


class Rates(NamedTuple):
    """Images per second of one core's time, of each round."""

    decoding: np.ndarray  # by Pillow alone, from bytes in memory to an array
    pipeline: np.ndarray  # from the source to a batch
    kinds: list[str]  # formats and sizes of the first round's pictures

    @property
    def share(self) -> float:
        """Of the pipeline in decoding alone: the median of the rounds' ratios."""
        return float(np.median(self.pipeline / self.decoding))


def bench_input(
    config: DataConfig | TokensConfig | None,
    source: SourceConfig | None = None,
    *,
    synthetic: bool = False,
    seconds: float = 20.0,
    steps_per_second: float | None = None,
    hosts: int = 1,
) -> str:
    """Measures the input pipeline of a training on one core; returns a report.

    Args:
      config: the training's data; None: random 256 px crops in batches of 256.
      source: read instead of the config's sources; None: those, or synthetic JPEGs if there is no config.
      synthetic: read synthetic JPEGs.
      seconds: how long to measure.
      steps_per_second: rate of the run that is to be fed; None: not asked.
      hosts: on which the run's batches are read.

    Raises:
      ValueError: data that are codes, or photographs, which are decoded once; an impossible number; as `make_batches`.
    """
    if seconds <= 0 or hosts < 1 or (steps_per_second is not None and steps_per_second <= 0):
        raise ValueError(f"--seconds {seconds}, --steps-per-second {steps_per_second}, --hosts {hosts}: more than 0")
    if isinstance(config, TokensConfig):
        raise ValueError("the config's data are codes: there are no images to decode")
    if synthetic and source:
        raise ValueError("give either --synthetic or a source")
    with contextlib.ExitStack() as stack:
        if synthetic or (config is None and source is None):
            source = stack.enter_context(synthetic_source())
        if config is None:
            config = DataConfig(image_size=256, batch_size=256, sources=(source,))
        elif source:
            config = dataclasses.replace(config, sources=(source,))
        rates = measure(config, seconds)
    decoding, pipeline = (float(np.median(values)) for values in (rates.decoding, rates.pipeline))
    low, high = np.quantile(rates.pipeline / rates.decoding, [0.25, 0.75])
    jpeg = f"Pillow {PIL.__version__} with libjpeg-turbo {features.version('libjpeg_turbo')}"
    views = ", ".join(f"{view.name} {view.image_size} px" for view in (config.main_view(), *config.views))
    lines = [
        f"pictures        {', '.join(rates.kinds)}",
        f"decoding alone  {decoding:.0f} images/s per core ({jpeg})",
        f"input pipeline  {pipeline:.0f} images/s per core, {rates.share:.2f} of decoding alone",
        f"                ({views}; resize={config.resize!r})",
        f"                (medians of {len(rates.decoding)} rounds, half of them from {low:.2f} to {high:.2f})",
    ]
    if steps_per_second is not None:
        wanted = config.batch_size * steps_per_second / hosts
        cores, have = wanted / pipeline, os.cpu_count() or 1
        workers = max(1, config.num_workers)
        enough = "feed" if min(workers, have) >= cores else "do not feed"
        lines += [
            f"training        {wanted:.0f} images/s per host take {cores:.2f} cores",
            f"                ({config.batch_size} images x {steps_per_second:g} steps/s / {hosts} hosts)",
            f"                {workers} workers on the {have} cores of this machine {enough} it",
        ]
    return "\n".join(lines)


def measure(config: DataConfig, seconds: float) -> Rates:
    """Reads and decodes the same pictures in turns, in this process; counts processor time, so not waiting for disks.

    Raises:
      ValueError: as `bench_input`.
    """
    if any(source.kind == "photos" for source in config.sources):
        raise ValueError("source photos: its pictures are decoded once, so there is no decoding to compare with")
    config = dataclasses.replace(config, batch_size=ROUND, num_workers=0)
    encoded = [open_source(source, bytes) for source in config.sources]
    batches, pictures = batch_sequence(config), picture_sequence(config, encoded).batch(ROUND, batch_fn=list)
    decoding, pipeline, kinds = [], [], []
    stop = time.monotonic() + seconds
    for step in range(MOST_ROUNDS):
        files = [encoded[picture.source][int(picture.index)]["image"] for picture in pictures[step]]
        kinds = kinds or _kinds(files)
        decoding.append(ROUND / _processor_time(lambda files=files: [_decode(file) for file in files]))
        pipeline.append(ROUND / _processor_time(lambda step=step: batches[step]))
        if step and time.monotonic() > stop:
            break
    return Rates(np.array(decoding[1:]), np.array(pipeline[1:]), kinds)  # the first round warms up


def _processor_time(call) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def _decode(file: bytes) -> np.ndarray:
    # Without its other formats, of which Pillow would ask each.
    formats = ["JPEG"] if file.startswith(JPEG) else None
    return np.asarray(Image.open(io.BytesIO(file), formats=formats))


def _kinds(files: Sequence[bytes]) -> list[str]:
    images = [Image.open(io.BytesIO(file)) for file in files]
    kinds = {f"{image.format} {image.width} x {image.height}": None for image in images}
    size = sum(map(len, files)) / len(files) / 1000
    return [*list(kinds)[:3], *(["..."] if len(kinds) > 3 else []), f"{size:.0f} kB on average"]


@contextlib.contextmanager
def synthetic_source(width: int = 500, height: int = 375) -> Iterator[SourceConfig]:
    """A temporary folder of JPEGs with the sizes, in pixels and bytes, of ImageNet's."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(NAMES):
            path = Path(folder, f"{number:04d}.jpg")
            if number >= SYNTHETIC:
                os.link(Path(folder, f"{number % SYNTHETIC:04d}.jpg"), path)
                continue
            coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
            pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            noise = rng.normal(0, 6, pixels.shape)
            Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        yield SourceConfig(kind="folder", path=folder)
