"""Folders of images: sub-folders are classes, hidden files are ignored, links are followed."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from runtime_jax.data.listing import list_images, scan
from runtime_jax.data.picture import decode_image
from runtime_jax.files import AnyPath, BucketError, is_dir, path_of, read_bytes
from runtime_jax.messages import cut

_LOG = logging.getLogger(__name__)


def image_files(root: AnyPath) -> list[PurePath]:
    """The pictures in a folder and its sub-folders, as relative paths in order of their names."""
    found = scan(root)
    return [PurePath(found.path(index)) for index in range(found.count)]


def _natural(names: Sequence[str]) -> list[str]:
    """Sorted names; numerically if all are numbers."""
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


class FolderSource:
    """Images in a folder; an unreadable file is replaced by the next readable one and named in "skipped".

    If all images are in sub-folders, these are the classes, empty ones too, in order of their names, or numerically if
    all are numbers. Files that were passed over are counted in one warning.
    """

    def __init__(self, path: str, classes: Sequence[str] | None = None, decode: Callable[[bytes], Any] = decode_image):
        """Lists the folder, or reads its index, and reads one image.

        Args:
            classes: the names of the labels 0, 1, ...; None: the sub-folders.
            decode: turns a file's bytes into what "image" holds.

        Raises:
            ValueError: no folder, nothing readable in it, or images outside of `classes`.
        """
        root = path_of(os.path.expanduser(path))
        if not path or not is_dir(root):
            raise ValueError(f"image folder {path!r} does not exist or is not a folder")
        found = list_images(root)
        if not found.count:
            passed = f" (passed over: {_counted(found.passed_over)})" if found.passed_over else ""
            raise ValueError(f"image folder {path!r} holds no image that Pillow reads, sub-folders included{passed}")
        self._root, self._found, self._decode = str(root), found, decode
        outside = np.flatnonzero(found.class_folders < 0).tolist()
        names = _natural(found.folders) if classes is None else list(classes)
        if classes is not None and (outside or not set(found.folders) <= set(names)):
            unknown = [*(["(none)"] if outside else []), *sorted(set(found.folders) - set(names))]
            raise ValueError(f"image folder {path!r}: images of classes that are not in `classes`: {cut(unknown)}")
        self.classes = None if outside else names
        numbers = {name: label for label, name in enumerate(names)}
        self._labels = [*(numbers[name] for name in found.folders), -1]  # -1 is also the position of the last
        filled = {found.folders[number] for number in np.unique(found.class_folders) if number >= 0}
        empty = sorted(set(names) - filled) if self.classes else []
        strays = [found.path(index) for index in outside] if len(outside) < len(self) else []
        _tell_once(path, _counted(found.passed_over), cut(empty), cut(strays))
        self[0]  # raises, before any training, if no file at all can be read

    def __len__(self) -> int:
        return self._found.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            file = os.path.join(self._root, self._found.path(number))
            try:
                image = self._decode(read_bytes(path_of(file)))
            except BucketError:
                raise  # a bucket that cannot be reached is no reason to train on other images
            except (OSError, ValueError):
                skipped.append(file)
                continue
            label = self._labels[self._found.class_folders[number]]
            return {"image": image, "label": label, "skipped": tuple(skipped)}
        raise ValueError(f"image folder {self._root!r}: none of its {len(self)} images can be read")


def _counted(passed_over: Counter[str]) -> str:
    return cut([f"{count} {reason}" for reason, count in passed_over.most_common()])


@functools.cache
def _tell_once(path: str, passed_over: str, empty: str, outside: str) -> None:
    """Warns once per folder and process: a run opens its sources several times."""
    notes = [f"passed over {passed_over}"] * bool(passed_over) + [f"classes without images: {empty}"] * bool(empty)
    notes += [f"no classes, because of images outside of their folders: {outside}"] * bool(outside)
    if notes:
        _LOG.warning("image folder %s: %s", path, "; ".join(notes))
