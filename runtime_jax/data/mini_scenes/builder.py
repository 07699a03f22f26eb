"""The TFDS dataset: array_record files of PNG images and masks, captions and every attribute of the scene."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from runtime_jax.data.mini_scenes import vocabulary as words
from runtime_jax.data.mini_scenes.captions import caption, full_caption
from runtime_jax.data.mini_scenes.render import MIN_SIZE, render_scene
from runtime_jax.data.mini_scenes.scene import Scene, SceneObject, sample_scene

SPLITS = ("train", "validation", "test")
NAME = "mini_scenes"


@dataclasses.dataclass(kw_only=True)
class MiniScenesConfig(tfds.core.BuilderConfig):
    """Image side in pixels, examples per split, and the seed that every example is drawn from."""

    size: int = 64
    train: int = 20_000
    validation: int = 1_000
    test: int = 1_000
    seed: int = 0


def make_config(size: int = 64, train: int = 20_000, validation: int = 1_000, test: int = 1_000, seed: int = 0):
    """A config whose name tells its contents: "64" for the default counts and seed, else "64_n100_10_10_s0".

    Raises:
        ValueError: a size below 16 pixels, a negative seed or a split without examples.
    """
    if size < MIN_SIZE:
        raise ValueError(f"mini_scenes: size is {size}, it must be at least {MIN_SIZE} pixels")
    if seed < 0:
        raise ValueError(f"mini_scenes: seed is {seed}, it must not be negative")
    for split, count in zip(SPLITS, (train, validation, test), strict=True):
        if count < 1:
            raise ValueError(f"mini_scenes: {split} is {count}, every split needs at least one example")
    usual = (train, validation, test, seed) == (20_000, 1_000, 1_000, 0)
    name = f"{size}" if usual else f"{size}_n{train}_{validation}_{test}_s{seed}"
    return MiniScenesConfig(name=name, size=size, train=train, validation=validation, test=test, seed=seed)


def example_scene(seed: int, split: str, index: int) -> tuple[Scene, str]:
    """Scene and caption number `index` of a split: a pure function of (seed, split, index)."""
    scene_rng, caption_rng = (np.random.default_rng([seed, SPLITS.index(split), index, part]) for part in (0, 1))
    scene = sample_scene(scene_rng)
    return scene, caption(scene, caption_rng)


class MiniScenes(tfds.core.GeneratorBasedBuilder):
    """One to three textured objects on varied backgrounds; the label is the class of the largest object."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (TFDS declares it so)
        *(make_config(size) for size in (64, 32, 128, 256)),
        MiniScenesConfig(name="tiny", size=64, train=64, validation=16, test=16),
    ]
    # Nothing is downloaded; TFDS's own look-up of checksums needs a package that it does not declare.
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
            description="Procedural scenes with captions that name attributes some of the time, and ground truth.",
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
                    "scene": tfds.features.Text(doc="JSON, exact: Scene.from_json gives the scene back"),
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
        for index in range(getattr(config, split)):
            yield index, _make_example(config.seed, split, index, config.size)


def _make_example(seed: int, split: str, index: int, size: int) -> dict[str, Any]:
    scene, text = example_scene(seed, split, index)
    image, mask = render_scene(scene, size)
    return {
        "image": _png(image),
        "mask": _png(mask),
        "label": scene.label,
        "caption": text,
        "full_caption": full_caption(scene),
        "scene": scene.to_json(),
        "background": scene.background.kind,
        "light": dataclasses.asdict(scene.light),
        "objects": [_attributes(item) for item in scene.objects],
    }


def _attributes(item: SceneObject) -> dict[str, Any]:
    fields = dataclasses.asdict(item)
    del fields["accent"]
    return {**fields, "rgb": np.array(item.rgb, np.uint8)}


def _png(image: np.ndarray) -> bytes:
    """Encoded here, so that TFDS never asks TensorFlow to do it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def prepare(
    data_dir: str | Path = "data",
    size: int = 64,
    *,
    train: int = 20_000,
    validation: int = 1_000,
    test: int = 1_000,
    seed: int = 0,
) -> str:
    """Writes the dataset under `data_dir` unless it is there, and gives the TFDS name to read it by.

    The files appear under their final name only when complete, so an interrupted call leaves nothing half-made behind.

    Raises:
        ValueError: as `make_config`.
    """
    builder = MiniScenes(data_dir=str(data_dir), config=make_config(size, train, validation, test, seed))
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
        )
    )
    return f"{NAME}/{builder.builder_config.name}"
