"""The index of a folder of images: when it is used, when it is not, and where it is."""

import itertools
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from runtime_jax.data import SourceConfig, listing, open_source
from runtime_jax.data.listing import INDEX_FOLDER, list_images, scan

LONG_AGO = itertools.count(1_700_000_000)  # modification times


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Five images in three folders that have not changed for long; three images make a folder large."""
    monkeypatch.setattr(listing, "INDEX_FROM", 3)
    monkeypatch.setattr(listing, "CACHE", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    for name in ("a/1.png", "a/2.png", "b/deep/3.png", "b/4.png", "b/é 5.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(root / name)
    (root / "b" / "notes.txt").touch()
    settle(root)
    return root


def settle(root):
    time = next(LONG_AGO)
    for folder, _, _ in os.walk(root):
        if INDEX_FOLDER not in folder:
            os.utime(folder, (time, time))


@pytest.fixture
def scans(monkeypatch):
    """The folders that were listed."""
    scanned = []
    monkeypatch.setattr(listing, "scan", lambda root: scanned.append(root) or scan(root))
    return scanned


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def paths(found):
    return [found.path(index) for index in range(found.count)]


def test_the_second_start_lists_nothing(root, scans):
    first = list_images(root)
    assert paths(first) == ["a/1.png", "a/2.png", "b/4.png", "b/deep/3.png", "b/é 5.png"]
    assert first.class_folders.tolist() == [0, 0, 1, 1, 1] and first.passed_over == {".txt": 1}
    assert (root / INDEX_FOLDER / "index.safetensors").is_file()
    second = list_images(root)
    assert len(scans) == 1 and same(first._replace(times=second.times), second)
    source = open_source(SourceConfig(kind="folder", path=str(root)))
    assert len(scans) == 1 and source.classes == ["a", "b"]
    assert [source[index]["label"] for index in range(5)] == [0, 0, 1, 1, 1]


def test_every_change_of_names_is_noticed(root, scans):
    def added():
        Image.new("RGB", (6, 4)).save(root / "b" / "deep" / "6.png")

    def removed():
        (root / "a" / "1.png").unlink()

    def renamed():
        (root / "b" / "4.png").rename(root / "b" / "7.png")

    def moved():
        shutil.move(root / "b" / "deep", root / "c")

    def outside():
        Image.new("RGB", (6, 4)).save(root / "8.png")

    def gone():
        shutil.rmtree(root / "a")

    for number, change in enumerate((added, removed, renamed, moved, outside, gone)):
        list_images(root)
        change()
        assert same(list_images(root)[:3], scan(root)[:3])
        assert len(scans) == 2 * number + 2
        settle(root)


def test_a_folder_that_has_just_changed_gets_no_index(root, scans):
    """Its next change might have the same time."""
    os.utime(root / "b")
    list_images(root)
    assert not (root / INDEX_FOLDER).exists()
    settle(root)
    list_images(root)
    list_images(root)
    assert len(scans) == 2


def test_a_small_folder_gets_no_index(root, monkeypatch):
    monkeypatch.setattr(listing, "INDEX_FROM", 6)
    list_images(root)
    assert not (root / INDEX_FOLDER).exists()


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(root, scans, tmp_path, monkeypatch, caplog):
    def refuse(path, **options):
        if INDEX_FOLDER in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        os.makedirs(path, exist_ok=True)

    monkeypatch.setattr(listing.Path, "mkdir", refuse)
    first, second = list_images(root), list_images(root)
    assert len(scans) == 1 and same(first, second) and len(list((tmp_path / "cache").iterdir())) == 1
    (root / "a" / "1.png").unlink()
    assert list_images(root).count == 4 and len(scans) == 2
    assert not caplog.messages
    settle(root)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(listing, "CACHE", "/proc/no such folder")
    list_images(root)
    assert "no index was written, so every start lists it anew" in caplog.text


@pytest.mark.parametrize("damage", ["half", "other bytes", "other rules", "empty"])
def test_an_index_that_is_damaged_or_of_other_rules_is_not_used(root, scans, damage, monkeypatch):
    whole = list_images(root)
    index = root / INDEX_FOLDER / "index.safetensors"
    data = index.read_bytes()
    if damage == "other rules":
        monkeypatch.setattr(listing, "LITTER", {"a"})
        assert [path[0] for path in paths(list_images(root))] == ["b"] * 3
    else:
        broken = {"half": data[: len(data) // 2], "other bytes": data[:-3] + b"xyz", "empty": b""}[damage]
        index.write_bytes(broken)
        assert same(list_images(root)[:3], whole[:3])
    assert len(scans) == 2


def test_an_index_moves_with_a_copy_that_keeps_times(root, scans, tmp_path):
    list_images(root)
    copy = shutil.copytree(root, tmp_path / "copy")  # as cp -a and rsync -a
    list_images(copy)
    assert len(scans) == 1


def test_a_listing_is_small_for_worker_processes():
    """About the bytes of the names, 8 for where each ends and 4 for its class."""
    names = np.frombuffer(b"n01440764/n01440764_10026.JPEG" * 1000, np.uint8)
    ends, folders = np.arange(30, 30001, 30), np.zeros(1000, np.int32)
    assert len(pickle.dumps(listing.Listing(names, ends, folders, ["n01440764"], {}, {}))) < 1000 * 43
