"""What is in a folder of images, and the index that saves the next start from listing millions of files.

The index holds the names of the images and the modification time of every folder among them. A folder's time changes
when a name in it is added, removed or changed, so an index is known to be valid after a look at each folder; no file is
looked at. Otherwise everything is listed again. Only names are kept: what is in a file may change.
"""

import functools
import hashlib
import json
import logging
import os
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runtime_jax.files import AnyPath, is_remote, replacing

_LOG = logging.getLogger(__name__)
# Names, in lower case, that systems leave in folders; names that begin with a dot are ignored too.
LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
# Formats whose pixels Pillow does not read, or only with another program, which no unknown file should start.
_UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
INDEX_FOLDER = ".image_index"  # a folder of its own, so that writing the index leaves the times of the others
CACHE = "~/.cache/runtime_jax/image_index"  # has the indices of folders that cannot be written
INDEX_FROM = 10_000  # images from which a folder gets an index
SETTLED = 2.0  # seconds after which another change certainly has another modification time


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of every format that Pillow reads."""
    Image.init()
    read = (Image.OPEN.keys() - _UNREAD) | {"MPO"}  # several JPEGs in one, opened as the first
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in read)


class Listing(NamedTuple):
    """The images of a folder and its sub-folders, in order of their paths, in few bytes each.

    names: uint8, the relative paths one after the other.
    ends: int64 [N], where each of them ends.
    class_folders: int32 [N], the sub-folder that each is in, as a position in `folders`; -1: directly in the folder.
    folders: names of the sub-folders directly in the folder.
    passed_over: how many other files there are, by the reason.
    times: modification time in ns of every folder, by its relative path.
    """

    names: np.ndarray
    ends: np.ndarray
    class_folders: np.ndarray
    folders: list[str]
    passed_over: Counter[str]
    times: dict[str, int]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.ends)

    def path(self, index: int) -> str:
        """The relative path of an image."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())


def list_images(root: AnyPath) -> Listing:
    """The images in a folder, from its index if that is valid; writes an index for `INDEX_FROM` images or more.

    A folder of a bucket has no index: one request lists a thousand names.
    """
    if is_remote(root):
        return scan(root)
    paths = (root / INDEX_FOLDER / "index.safetensors", _cached(root))
    for path in paths:
        if (listing := _read(path)) and _is_valid(listing, root):
            return listing
    started = time.time()
    listing = scan(root)
    # A folder that has just changed may change again at the same time by its clock.
    if listing.count >= INDEX_FROM and max(listing.times.values()) < (started - SETTLED) * 1e9:
        _write(listing, root, paths)
    return listing


def scan(root: AnyPath) -> Listing:
    """Lists a folder and its sub-folders."""
    return _scan_bucket(root) if is_remote(root) else _scan_disk(root)


def _scan_disk(root: Path) -> Listing:
    names, ends, class_folders = bytearray(), array("q"), array("i")
    folders, passed_over, times = [], Counter(), {}

    def visit(folder: str, ancestors: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(os.path.join(root, folder))
        times[folder] = status.st_mtime_ns
        ancestors = (*ancestors, (status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name == INDEX_FOLDER:
                continue
            if entry.name.startswith(".") or entry.name.lower() in LITTER:
                passed_over["hidden"] += 1
            elif entry.is_symlink() and not os.path.exists(entry.path):
                passed_over["broken links"] += 1
            elif entry.is_dir():
                if entry.is_symlink() and (entry.stat().st_dev, entry.stat().st_ino) in ancestors:
                    passed_over["links to a folder that they are in"] += 1
                    continue
                if not folder:
                    folders.append(entry.name)
                visit(os.path.join(folder, entry.name), ancestors)
            elif not entry.is_file():
                passed_over["pipes, sockets or devices"] += 1
            elif suffix in suffixes():
                names.extend(os.fsencode(os.path.join(folder, entry.name)))
                ends.append(len(names))
                class_folders.append(len(folders) - 1 if folder else -1)
            else:
                passed_over[suffix or "without suffix"] += 1

    visit("", ())
    return _listing(names, ends, class_folders, folders, passed_over, times)


def _scan_bucket(root: AnyPath) -> Listing:
    """As of a disk, in a bucket, where a folder exists by the objects below it."""
    from runtime_jax.files import buckets

    names, ends, class_folders = bytearray(), [], []
    folders, passed_over = [], Counter()
    for path in sorted(map(PurePosixPath, buckets.objects(root)), key=lambda path: path.parts):
        suffix, folder = path.suffix.lower(), path.parts[0] if len(path.parts) > 1 else None
        if any(part.startswith(".") or part.lower() in LITTER for part in path.parts):
            passed_over["hidden"] += 1
            continue
        if folder is not None and folder not in folders[-1:]:
            folders.append(folder)
        if suffix in suffixes():
            names.extend(os.fsencode(path))
            ends.append(len(names))
            class_folders.append(-1 if folder is None else len(folders) - 1)
        else:
            passed_over[suffix or "without suffix"] += 1
    return _listing(names, ends, class_folders, folders, passed_over, {})


def _listing(names: bytearray, ends: Sequence[int], class_folders: Sequence[int], *others: Any) -> Listing:
    arrays = np.frombuffer(names, np.uint8), np.array(ends, np.int64), np.array(class_folders, np.int32)
    return Listing(*arrays, *others)


def _cached(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:32]
    return Path(os.path.expanduser(CACHE)) / f"{name}.safetensors"


def _rules() -> str:
    """Fingerprint of what counts as an image: an index made by other rules is not valid."""
    return hashlib.sha256(json.dumps([1, sorted(suffixes()), sorted(LITTER)]).encode()).hexdigest()


def _checksum(listing: Listing) -> int:
    return zlib.crc32(listing.class_folders, zlib.crc32(listing.ends, zlib.crc32(listing.names)))


def _read(path: Path) -> Listing | None:
    """A whole index by today's rules; None if there is none."""
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["listing"])
            arrays = [file.get_tensor(name) for name in ("names", "ends", "class_folders")]
        listing = Listing(*arrays, about["folders"], Counter(about["passed_over"]), about["times"])
        return listing if about["rules"] == _rules() and about["checksum"] == _checksum(listing) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _is_valid(listing: Listing, root: Path) -> bool:
    try:
        return all(os.stat(os.path.join(root, name)).st_mtime_ns == time for name, time in listing.times.items())
    except OSError:
        return False


def _write(listing: Listing, root: Path, paths: tuple[Path, ...]) -> None:
    for path in paths:
        times = dict(listing.times)
        try:
            if not path.parent.exists():
                if not _is_valid(listing, root):
                    return  # changed meanwhile
                path.parent.mkdir(parents=True)
                times[""] = os.stat(root).st_mtime_ns
            about = {"rules": _rules(), "checksum": _checksum(listing), "folders": listing.folders}
            about |= {"passed_over": listing.passed_over, "times": times}
            arrays = {"names": listing.names, "ends": listing.ends, "class_folders": listing.class_folders}
            with replacing(path) as new:
                save_file(arrays, new, {"listing": json.dumps(about)})
        except OSError as error:
            reason = error
            continue
        _LOG.info("%s: index of %d images in %s", root, listing.count, path)
        return
    _LOG.warning("image folder %s: no index was written, so every start lists it anew (%s)", root, reason)
