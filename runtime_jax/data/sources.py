"""Where pictures come from: TFDS datasets, folders of images, and scikit-learn's two sample photographs.

Every source is a random-access sequence of examples `{"image": uint8 [H, W, 3], "label": int}`, with "caption" where
the dataset has one, and "skipped" with the unreadable files that the example replaces.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from runtime_jax.data.folder import FolderSource
from runtime_jax.data.picture import decode_image
from runtime_jax.files import is_dir, is_remote, local, path_of

# Pixels (left, top, right, bottom) of the 640 x 427 photographs: what training may see, and what it never sees.
PHOTO_REGIONS = {
    "china.jpg": {"train": (0, 0, 427, 427), "held_out": (427, 0, 640, 427)},
    "flower.jpg": {"train": (0, 0, 360, 427), "held_out": (360, 0, 640, 427)},
}
# Crops of a photograph that count as one epoch.
CROPS_PER_PHOTO = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of pictures.

    kind "tfds": `name` is a prepared TFDS dataset ("mini_scenes/64", "imagenet2012") under `data_dir`, read by `split`.
    kind "folder": `path` holds one sub-folder per class (see `FolderSource`) or images directly (label -1).
    kind "photos": crops of scikit-learn's china.jpg and flower.jpg; `split` is "train" or "held_out" (label -1).
    weight: share of the examples drawn from here, relative to the other sources.
    crop_scale: range of a random crop's side relative to the picture's shorter side, drawn log-uniformly; None is
        (0.25, 1) for photos, which are large and few, and (1, 1) for the other kinds.
    classes: for kind "folder", the names of the labels 0, 1, ..., also of those without images; None: the sub-folders.
    """

    kind: Literal["tfds", "folder", "photos"]
    name: str = ""
    path: str = ""
    split: str = "train"
    data_dir: str = "data"
    weight: float = 1.0
    crop_scale: tuple[float, float] | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.classes is not None and (self.kind != "folder" or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"classes={self.classes}: for kind 'folder' only, and each name once")

    @property
    def scale(self) -> tuple[float, float]:
        """crop_scale, or what None stands for."""
        if self.crop_scale is not None:
            return self.crop_scale
        return (0.25, 1.0) if self.kind == "photos" else (1.0, 1.0)


class MissingDatasetError(ValueError):
    """A TFDS dataset is not prepared; a program may put its own command before the `recipe` that ends the message."""

    def __init__(self, *, name: str, data_dir: str):
        self.name, self.data_dir, self.recipe = name, data_dir, _recipe(name, data_dir)
        absolute = data_dir if is_remote(data_dir) else Path(data_dir).absolute()
        super().__init__(f"dataset {name!r} is not in {str(absolute)!r}; run: {self.recipe}")


@runtime_checkable
class Source(Protocol):
    """A random-access sequence of examples.

    `classes`: names of the labels 0, 1, ...; None if an example may have no label (-1).
    """

    @property
    def classes(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(config: SourceConfig, decode: Callable[[bytes], Any] = decode_image) -> Source:
    """Opens a source and checks that it can be read.

    Args:
        decode: turns an encoded picture into what "image" holds; photos are always arrays.

    Raises:
        MissingDatasetError: the dataset is not there.
        ValueError: unknown kind, missing folder or split, or nothing readable in it.
    """
    low, high = config.scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"source {config.kind}: crop_scale is {config.crop_scale}, allowed are 0 < low <= high <= 1")
    if not (config.weight > 0 and np.isfinite(config.weight)):
        raise ValueError(f"source {config.kind}: weight is {config.weight}, it must be positive and finite")
    if config.kind == "tfds":
        return TfdsSource(config.name, config.split, config.data_dir, decode)
    if config.kind == "folder":
        return FolderSource(config.path, config.classes, decode)
    if config.kind == "photos":
        return PhotoSource(config.split)
    raise ValueError(f"source: kind is {config.kind!r}, allowed are 'tfds', 'folder', 'photos'")


def classes_of(sources: Sequence[SourceConfig]) -> list[tuple[str, list[str] | None]]:
    """(name for messages, classes) of each source; raises as `open_source`."""
    return [(source.name or source.path or source.kind, open_source(source).classes) for source in sources]


def check_same_classes(classes: Sequence[tuple[str, list[str] | None]]) -> None:
    """Raises ValueError if the labels of some sources, as `classes_of` returns them, have different meanings."""
    (first, names), *others = classes
    for where, other in others:
        if other != names:
            raise ValueError(f"{where!r} and {first!r} have classes of other names")


class TfdsSource:
    """A split of a dataset already prepared in a random-access format."""

    def __init__(self, name: str, split: str, data_dir: str, decode: Callable[[bytes], Any] = decode_image):
        import tensorflow_datasets as tfds

        if not name:
            raise ValueError("source tfds: name is empty, it must be a dataset such as 'mini_scenes/64'")
        if is_remote(data_dir) and not is_dir(path_of(data_dir)):
            raise MissingDatasetError(name=name, data_dir=data_dir)
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise MissingDatasetError(name=name, data_dir=data_dir) from error
        parts = [part.split("[")[0] for part in split.split("+")]
        if not set(parts) <= set(builder.info.splits):
            raise ValueError(f"dataset {name!r} in {data_dir!r} has no split {split!r}: {sorted(builder.info.splits)}")
        if is_remote(data_dir):  # array_record reads files of a disk only
            patterns = ("*.json", "*.txt", *(f"*-{part}.*" for part in parts))
            builder = tfds.builder_from_directory(local(builder.data_dir, patterns))
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"dataset {name!r} has no feature 'image', only {sorted(features)}")
        # TFDS would decode masks and attributes too: it parses these features only, and images are decoded here.
        wanted = {key: features[key] for key in ("image", "label", "caption") if key in features}
        label = wanted.get("label")
        self.classes = list(label.names) if isinstance(label, tfds.features.ClassLabel) else None
        self._features = tfds.features.FeaturesDict(wanted)
        self._decode = decode
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            self._records = builder.as_data_source(split=split, deserialize_method=raw)
        except NotImplementedError as error:
            prepared = builder.info.file_format.value
            command = f"tfds convert_format --dataset_version_dir={builder.data_path} --out_file_format=array_record"
            message = f"dataset {name!r} in {data_dir!r} was prepared as {prepared}, which has no random access"
            raise ValueError(f"{message}; run: {command}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
        example = {"image": self._decode(record["image"]), "label": int(record.get("label", -1))}
        if "caption" in record:
            example["caption"] = record["caption"].decode()
        return example


def _recipe(name: str, data_dir: str) -> str:
    if name.split("/")[0] == "mini_scenes":
        return f"mini_scenes.prepare({data_dir!r}, size)"
    return f"tfds build {name} --data_dir={data_dir} --file_format=array_record"


class PhotoSource:
    """A region of each sample photograph, CROPS_PER_PHOTO times over."""

    classes = None

    def __init__(self, split: str):
        if split not in ("train", "held_out"):
            raise ValueError(f"source photos: split is {split!r}, allowed are 'train', 'held_out'")
        self._regions = [photo_region(name, split) for name in PHOTO_REGIONS]

    def __len__(self) -> int:
        return CROPS_PER_PHOTO * len(self._regions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._regions[index % len(self._regions)], "label": -1}


def photo_region(name: str, split: str) -> UInt8[np.ndarray, "H W 3"]:
    """The training or held-out region of a sample photograph, uint8 [H, W, 3].

    Raises:
        ValueError: scikit-learn is not installed.
    """
    # Found without importing scikit-learn, which is slow.
    spec = importlib.util.find_spec("sklearn")
    if spec is None:
        raise ValueError("source photos: scikit-learn, which ships china.jpg and flower.jpg, is not installed")
    photo = decode_image((Path(spec.origin).parent / "datasets" / "images" / name).read_bytes())
    left, top, right, bottom = PHOTO_REGIONS[name][split]
    return photo[top:bottom, left:right]
