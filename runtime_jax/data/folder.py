"""Folders of images: sub-folders are classes, hidden files are ignored, links are followed."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from runtime_jax.data.picture import decode_image
from runtime_jax.files import AnyPath, BucketError, is_dir, is_remote, path_of, read_bytes
from runtime_jax.messages import cut

_LOG = logging.getLogger(__name__)
# Names, in lower case, that systems leave in folders; names that begin with a dot are ignored too.
LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
# Formats whose pixels Pillow does not read, or only with another program, which no unknown file should start.
_UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of every format that Pillow reads."""
    Image.init()
    read = (Image.OPEN.keys() - _UNREAD) | {"MPO"}  # several JPEGs in one, opened as the first
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in read)


def image_files(root: AnyPath) -> list[PurePath]:
    """The pictures in a folder and its sub-folders, as relative paths in order of their names."""
    return _scan(root).files


class _Found(NamedTuple):
    """The contents of a folder, as relative paths."""

    files: list[PurePath]
    folders: list[str]  # directly in it
    passed_over: Counter[str]  # other files, by the reason


def _scan(root: AnyPath) -> _Found:
    if is_remote(root):
        return _scan_bucket(root)
    found = _Found([], [], Counter())

    def visit(folder: Path, ancestors: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(root / folder)
        ancestors = (*ancestors, (status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            path, suffix = folder / entry.name, os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name.lower() in LITTER:
                found.passed_over["hidden"] += 1
            elif entry.is_symlink() and not os.path.exists(entry.path):
                found.passed_over["broken links"] += 1
            elif entry.is_dir():
                if entry.is_symlink() and (entry.stat().st_dev, entry.stat().st_ino) in ancestors:
                    found.passed_over["links to a folder that they are in"] += 1
                    continue
                if folder == Path():
                    found.folders.append(entry.name)
                visit(path, ancestors)
            elif not entry.is_file():
                found.passed_over["pipes, sockets or devices"] += 1
            elif suffix in suffixes():
                found.files.append(path)
            else:
                found.passed_over[suffix or "without suffix"] += 1

    visit(Path(), ())
    return found


def _scan_bucket(root: AnyPath) -> _Found:
    """The same for a folder of a bucket, where a folder exists by the objects below it."""
    from runtime_jax.files import buckets

    found, folders = _Found([], [], Counter()), set()
    for path in sorted(map(PurePosixPath, buckets.objects(root)), key=lambda path: path.parts):
        suffix = path.suffix.lower()
        if any(part.startswith(".") or part.lower() in LITTER for part in path.parts):
            found.passed_over["hidden"] += 1
            continue
        folders |= set(path.parts[:-1][:1])
        if suffix in suffixes():
            found.files.append(path)
        else:
            found.passed_over[suffix or "without suffix"] += 1
    found.folders.extend(sorted(folders))
    return found


def _natural(names: Sequence[str]) -> list[str]:
    """Sorted names; numerically if all are numbers."""
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


class FolderSource:
    """Images in a folder; an unreadable file is replaced by the next readable one and named in "skipped".

    If all images are in sub-folders, these are the classes, empty ones too, in order of their names, or numerically if
    all are numbers. Files that were passed over are counted in one warning.
    """

    def __init__(self, path: str, classes: Sequence[str] | None = None):
        """Lists the folder and reads one image; `classes` names the labels 0, 1, ... (None: the sub-folders).

        Raises:
            ValueError: no folder, nothing readable in it, or images outside of `classes`.
        """
        root = path_of(os.path.expanduser(path))
        if not path or not is_dir(root):
            raise ValueError(f"image folder {path!r} does not exist or is not a folder")
        found = _scan(root)
        if not found.files:
            passed = f" (passed over: {_counted(found.passed_over)})" if found.passed_over else ""
            raise ValueError(f"image folder {path!r} holds no image that Pillow reads, sub-folders included{passed}")
        self._root, self._files = root, found.files
        outside = [file.name for file in found.files if len(file.parts) == 1]
        names = _natural(found.folders) if classes is None else list(classes)
        if classes is not None and (outside or not set(found.folders) <= set(names)):
            unknown = [*(["(none)"] if outside else []), *sorted(set(found.folders) - set(names))]
            raise ValueError(f"image folder {path!r}: images of classes that are not in `classes`: {cut(unknown)}")
        self.classes = None if outside else names
        self._labels = {name: label for label, name in enumerate(names)}
        empty = sorted(set(names) - {file.parts[0] for file in found.files}) if self.classes else []
        _tell_once(path, _counted(found.passed_over), cut(empty), cut(outside) if len(outside) < len(self) else "")
        self[0]  # raises, before any training, if no file at all can be read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for offset in range(len(self)):
            file = self._files[(index + offset) % len(self)]
            try:
                image = decode_image(read_bytes(self._root / file))
            except BucketError:
                raise  # a bucket that cannot be reached is no reason to train on other images
            except (OSError, ValueError):
                skipped.append(str(self._root / file))
                continue
            label = self._labels[file.parts[0]] if len(file.parts) > 1 else -1
            return {"image": image, "label": label, "skipped": tuple(skipped)}
        raise ValueError(f"image folder {str(self._root)!r}: none of its {len(self)} images can be read")


def _counted(passed_over: Counter[str]) -> str:
    return cut([f"{count} {reason}" for reason, count in passed_over.most_common()])


@functools.cache
def _tell_once(path: str, passed_over: str, empty: str, outside: str) -> None:
    """Warns once per folder and process: a run opens its sources several times."""
    notes = [f"passed over {passed_over}"] * bool(passed_over) + [f"classes without images: {empty}"] * bool(empty)
    notes += [f"no classes, because of images outside of their folders: {outside}"] * bool(outside)
    if notes:
        _LOG.warning("image folder %s: %s", path, "; ".join(notes))
