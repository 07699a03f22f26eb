"""Held-out scenes and photographs."""

from mergevq_jax.evaluate.generation import Labelled
from mergevq_jax.evaluate.images import Images, SourceImages
from mini_scenes import make_config
from runtime_jax.data import DataConfig, SourceConfig, make_batches, open_source

BATCH_SIZE = 32  # images that are measured at once


def held_out(size: int, count: int, data_dir: str) -> dict[str, Images]:
    """Images that no training reads: `count` scenes, and a quarter as many crops of two photographs.

    Raises:
      ValueError: as `read_scenes`.
    """
    scenes = SourceConfig(kind="tfds", name=f"mini_scenes/{make_config(size).name}", split="test", data_dir=data_dir)
    photographs = SourceConfig(kind="photos", split="held_out", crop_scale=(0.3, 1.0))
    return {
        "scenes": SourceImages(scenes, size, count, first=True),
        "photographs": SourceImages(photographs, size, max(2, count // 4), first=True),
    }


def read_scenes(size: int, count: int, data_dir: str, *, split: str, single: bool = False) -> Labelled:
    """The first `count` scenes of a split, and their classes.

    Raises:
      ValueError: mini_scenes of this size is not under data_dir, or the split has fewer scenes.
    """
    name = make_config(size, single=single).name
    source = SourceConfig(kind="tfds", name=f"mini_scenes/{name}", split=split, data_dir=data_dir)
    if count > (there := len(open_source(source))):
        raise ValueError(f"{count} images are too many: mini_scenes has {there} scenes in its {split} split")
    config = DataConfig(image_size=size, batch_size=count, sources=(source,), shuffle=False, random_crop=False)
    batch = next(make_batches(config, 0))
    return Labelled(batch["image"], batch["label"])
