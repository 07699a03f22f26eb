"""Finite sequences of images of one size, read some at a time: datasets, folders and ADM's npz files.

Axes: N images of a file, n images that are read, H W image.
"""

import struct
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from runtime_jax.data import (
    DataConfig,
    SourceConfig,
    batch_sequence,
    decode_image,
    image_files,
    image_size,
    open_source,
)
from runtime_jax.files import AnyPath, is_remote, local, read_bytes

CENTRE = "largest centred square, resized by Pillow (bicubic, antialiased)"
RANDOM = "random squares, resized by Pillow (bicubic, antialiased)"
AS_THEY_ARE = "none"
Batch = UInt8[np.ndarray, "n H W 3"]
_LOCAL_HEADER = 30  # bytes before the name in a zip file's member


@runtime_checkable
class Images(Protocol):
    """Images of one size in a fixed order, which threads may read."""

    name: str  # where they come from
    crop: str  # how they were made from pictures
    shape: tuple[int, int]  # height and width

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> Batch: ...


class SourceImages:
    """Images of a source: centre crops, or the random crops that the source's `crop_scale` describes."""

    def __init__(self, source: SourceConfig, size: int, count: int | None = None, *, first: bool = False):
        """Opens the source.

        Args:
          count: of images; None: all.
          first: take the first ones; else they are evenly spaced, because folders are sorted by class.

        Raises:
          ValueError: no such source, or it has fewer images.
        """
        there = len(open_source(source))
        self.name = {"tfds": f"{source.name}, {source.split}", "folder": source.path}.get(source.kind, source.kind)
        self._chosen = chosen(self.name, count, there)
        if first:
            self._chosen = np.arange(len(self._chosen))
        random = source.crop_scale is not None
        self.crop, self.shape = RANDOM if random else CENTRE, (size, size)
        config = DataConfig(image_size=size, batch_size=1, sources=(source,), seed=1, shuffle=False, random_crop=random)
        self._pictures = batch_sequence(config)

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, rows: Sequence[int]) -> Batch:
        """Raises ValueError for a picture that cannot be read; none takes its place."""
        return self.labelled(rows)[0]

    def labelled(self, rows: Sequence[int]) -> tuple[Batch, Int[np.ndarray, "n"]]:
        """Images and their labels; raises as `read`."""
        examples = [self._pictures[int(self._chosen[row])] for row in rows]
        if broken := [file for example in examples for file in example["skipped"]]:
            raise ValueError(f"{broken[0]}: not a readable image")
        images, labels = (np.concatenate([example[name] for example in examples]) for name in ("image", "label"))
        return images, labels


class FolderImages:
    """Pictures of one size in a folder and its sub-folders, in order of their names, as they are."""

    crop = AS_THEY_ARE

    def __init__(self, folder: AnyPath, count: int | None = None):
        """`count`: of evenly spaced ones; None: all. Raises ValueError where pictures differ in size."""
        files = [folder / file for file in image_files(folder)]
        self.name, self._files = str(folder), [files[index] for index in chosen(str(folder), count, len(files))]
        self.shape = decode_image(read_bytes(self._files[0])).shape[:2]
        for file in [] if is_remote(folder) else self._files:
            self._check(file, image_size(file))

    def _check(self, file: AnyPath, shape: tuple[int, int]) -> None:
        if shape != self.shape:
            raise ValueError(
                f"{file} has {shape[1]} x {shape[0]} pixels, {self._files[0].name} has {self.shape[1]} x "
                f"{self.shape[0]}: samples have one size"
            )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: Sequence[int]) -> Batch:
        """Raises ValueError for a picture that cannot be read, or has another size."""
        images = []
        for row in rows:
            try:
                images.append(decode_image(read_bytes(self._files[row])))
            except ValueError as error:
                raise ValueError(f"{self._files[row]}: {error}") from error
            self._check(self._files[row], images[-1].shape[:2])
        return np.stack(images)


class ArrayImages:
    """The images in an npz file of ADM's layout, arr_0 uint8 [N, H, W, 3], without reading the file as a whole."""

    crop = AS_THEY_ARE

    def __init__(self, path: AnyPath, count: int | None = None):
        """`count`: of evenly spaced ones; None: all. Raises ValueError for another file, or too few images."""
        array, self._unpacked = _mapped(path)
        if array.ndim != 4 or array.dtype != np.uint8 or array.shape[-1] != 3:
            raise ValueError(f"{path}: arr_0 is {array.dtype} {list(array.shape)}, but uint8 [N, H, W, 3] is needed")
        self.name, self.shape, self._array = str(path), array.shape[1:3], array
        self._chosen = chosen(str(path), count, len(array))

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, rows: Sequence[int]) -> Batch:
        """Copies of these images."""
        return np.asarray(self._array[self._chosen[list(rows)]])


def _mapped(path: AnyPath) -> tuple[np.ndarray, tempfile.TemporaryDirectory | None]:
    """arr_0 of an npz file, mapped into memory; a compressed one is first unpacked into a temporary folder."""
    try:
        file = local(path)
        with zipfile.ZipFile(file) as members:
            member = members.getinfo("arr_0.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                folder = tempfile.TemporaryDirectory()
                return np.load(members.extract(member, folder.name), mmap_mode="r"), folder
        with open(file, "rb") as data:
            data.seek(member.header_offset)
            name, extra = struct.unpack("<26x2H", data.read(_LOCAL_HEADER))
            data.seek(member.header_offset + _LOCAL_HEADER + name + extra)
            version = np.lib.format.read_magic(data)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(data)
            return np.memmap(file, dtype, "r", data.tell(), shape), None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path}: not an npz file with images arr_0 ({error})") from error


def chosen(name: str, count: int | None, there: int) -> Int[np.ndarray, "count"]:
    """Numbers of `count` evenly spaced images, or of all.

    Raises:
      ValueError: fewer than two, of which there is no covariance, or more than there are.
    """
    count = there if count is None else count
    if not 2 <= count <= there:
        raise ValueError(f"{name}: {count} of {there} images are wanted; at least 2 are needed, for a covariance")
    return np.arange(count) * there // count
