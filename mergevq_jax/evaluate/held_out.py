"""Held-out scenes and photographs."""

import numpy as np

from mergevq_jax.evaluate.generation import Labelled
from mini_scenes import make_config
from runtime_jax.data import DataConfig, SourceConfig, make_batches, open_source

BATCH_SIZE = 32  # images that are measured at once


def held_out_photographs(size: int, count: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: crops from regions of the two photographs that no training reads."""
    source = SourceConfig(kind="photos", split="held_out", crop_scale=(0.3, 1.0))
    return _read(source, size, count, random_crop=True)["image"]


def held_out_scenes(size: int, count: int, data_dir: str) -> np.ndarray:
    """uint8 [count, size, size, 3]: scenes that no training reads; raises as `read_scenes`."""
    return read_scenes(size, count, data_dir, split="test").images


def read_scenes(size: int, count: int, data_dir: str, *, split: str, single: bool = False) -> Labelled:
    """The first `count` scenes of a split, and their classes.

    Raises:
      ValueError: mini_scenes of this size is not under data_dir, or the split has fewer scenes.
    """
    name = make_config(size, single=single).name
    source = SourceConfig(kind="tfds", name=f"mini_scenes/{name}", split=split, data_dir=data_dir)
    if count > (there := len(open_source(source))):
        raise ValueError(f"{count} images are too many: mini_scenes has {there} scenes in its {split} split")
    batch = _read(source, size, count, random_crop=False)
    return Labelled(batch["image"], batch["label"])


def _read(source: SourceConfig, size: int, count: int, *, random_crop: bool) -> dict[str, np.ndarray]:
    config = DataConfig(
        image_size=size, batch_size=count, sources=(source,), seed=1, shuffle=False, random_crop=random_crop
    )
    return next(make_batches(config, 0))
