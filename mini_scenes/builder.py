"""The TFDS dataset: PNG images and masks, captions and all attributes of each scene, in array_record files."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mini_scenes import vocabulary as words
from mini_scenes.examples import SPLITS, make_examples
from mini_scenes.render import MIN_SIZE
from runtime_jax.files import is_remote
from runtime_jax.workdir import check_output

NAME = "mini_scenes"
# Portraits of another seed, to probe features on. Each has one object: its class is beyond doubt. Sizes, places and
# turns differ, since of objects of one size in the middle even pixels tell the class.
PROBE = "64_probe"
# Starting a worker takes about two seconds, so workers pay off only from a few thousand examples.
PARALLEL_FROM = 2000
MAX_WORKERS = 8
BYTES_PER_PIXEL = 1.5  # on disk, images and masks as PNG: 132 MB for 22,000 examples of 64 x 64 pixels


@dataclasses.dataclass(kw_only=True)
class MiniScenesConfig(tfds.core.BuilderConfig):
    """Image side in pixels, examples per split, the seed of all examples, and whether scenes have a single object.

    A single object is in the middle and as large as fits there; if not `centred`, it is as `scene.portrait` says.
    """

    size: int = 64
    train: int = 20_000
    validation: int = 1_000
    test: int = 1_000
    seed: int = 0
    single: bool = False
    centred: bool = True


def make_config(
    size: int = 64,
    train: int = 20_000,
    validation: int = 1_000,
    test: int = 1_000,
    seed: int = 0,
    single: bool = False,
) -> MiniScenesConfig:
    """A config named after its contents: "64" for the defaults, "64_single" for one object, "64_n100_10_10_s0".

    Raises:
        ValueError: a size below 16 pixels, a negative seed, or a split without examples.
    """
    if size < MIN_SIZE:
        raise ValueError(f"mini_scenes: size is {size}, it must be at least {MIN_SIZE} pixels")
    if seed < 0:
        raise ValueError(f"mini_scenes: seed is {seed}, it must not be negative")
    for split, count in zip(SPLITS, (train, validation, test), strict=True):
        if count < 1:
            raise ValueError(f"mini_scenes: {split} is {count}, every split needs at least one example")
    usual = (train, validation, test, seed) == (20_000, 1_000, 1_000, 0)
    name = f"{size}_single" if single else f"{size}"
    name += "" if usual else f"_n{train}_{validation}_{test}_s{seed}"
    counts = {"train": train, "validation": validation, "test": test}
    return MiniScenesConfig(name=name, size=size, **counts, seed=seed, single=single)


class MiniScenes(tfds.core.GeneratorBasedBuilder):
    """One to three textured objects, or just one, on varied backgrounds; the label is the largest object's class."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (declared like this by TFDS)
        *(make_config(size) for size in (64, 32, 128, 256)),
        make_config(single=True),
        MiniScenesConfig(name="tiny", size=64, train=64, validation=16, test=16),
        MiniScenesConfig(
            name=PROBE, size=64, train=8_000, validation=1, test=4_000, seed=1, single=True, centred=False
        ),
    ]
    # Nothing is downloaded. None skips TFDS's checksum lookup, which needs a package that TFDS does not declare.
    url_infos = None

    def __init__(self, **kwargs: Any):
        super().__init__(**{"file_format": tfds.core.FileFormat.ARRAY_RECORD, **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.size
        color = tfds.features.Tensor(shape=(3,), dtype=np.uint8)
        item = {
            "shape": tfds.features.ClassLabel(names=words.CLASSES),
            "color": tfds.features.ClassLabel(names=tuple(words.COLORS)),
            "rgb": color,
            "texture": tfds.features.ClassLabel(names=words.TEXTURES),
            "size": np.float32,
            "x": np.float32,
            "y": np.float32,
            "rotation": np.float32,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural scenes with ground truth, and captions that mention some of the attributes.",
            # Without shuffling, record i of a split is example i.
            disable_shuffling=True,
            supervised_keys=("image", "label"),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "mask": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=words.CLASSES),
                    "caption": tfds.features.Text(),
                    "full_caption": tfds.features.Text(),
                    "scene": tfds.features.Text(doc="lossless JSON, for Scene.from_json"),
                    "background": tfds.features.ClassLabel(names=tuple(words.BACKGROUNDS)),
                    "light": {"azimuth": np.float32, "elevation": np.float32, "warmth": np.float32},
                    "objects": tfds.features.Sequence(item),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        count = getattr(config, split)
        workers = min(os.cpu_count() or 1, MAX_WORKERS) if count >= PARALLEL_FROM else 0
        yield from enumerate(
            make_examples(config.seed, split, count, config.size, workers, config.single, config.centred)
        )


def prepare_probe(data_dir: str | Path = "data") -> str:
    """Writes the dataset PROBE as `prepare` writes others."""
    return _prepare(data_dir, MiniScenes.builder_configs[PROBE])


def prepare(data_dir: str | Path = "data", size: int = 64, **contents: int | bool) -> str:
    """Writes the dataset under `data_dir` unless it exists, and returns its TFDS name.

    Files get their final name only when complete, so an interrupted call leaves no partial dataset.

    Args:
        data_dir: folder for TFDS datasets.
        size: image side in pixels.
        contents: train, validation, test, seed and single, as for `make_config`.

    Raises:
        ValueError: as `make_config`.
        WorkdirError: `data_dir` cannot be written, or lacks space.
    """
    return _prepare(data_dir, make_config(size, **contents))


def _prepare(data_dir: str | Path, config: MiniScenesConfig) -> str:
    if is_remote(data_dir):
        raise ValueError(f"{data_dir}: TFDS writes array_record files on a disk; copy them to the bucket then")
    known = config.name in MiniScenes.builder_configs
    builder = MiniScenes(data_dir=str(data_dir), config=config.name if known else config)
    if not Path(builder.data_path).exists():
        examples = sum(getattr(config, split) for split in SPLITS)
        check_output(data_dir, int(BYTES_PER_PIXEL * examples * config.size**2), f"mini_scenes/{config.name}")
    # Skip Google's bucket, and skip statistics, which would need TensorFlow.
    options = tfds.download.DownloadConfig(try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(download_config=options)
    return f"{NAME}/{config.name}"
