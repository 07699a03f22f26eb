"""Folders of images: what is a class, what is an image, and what is passed over."""

import dataclasses
import os

import numpy as np
import pytest
from generator_run_tools import MODEL, random_tokenizer
from PIL import Image

from mergevq_jax.generator.data import check_data
from mergevq_jax.tokenizer.run import TrainConfig, check_labels
from runtime_jax.config import build, load
from runtime_jax.data import DataConfig, SourceConfig, image_files, open_source
from runtime_jax.data import folder as folders


def picture(path, color=100, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (color,) * 3).save(path, **options)


def opened(root, **options):
    return open_source(SourceConfig(kind="folder", path=str(root), **options))


def labels(source):
    """The class of every image by its colour."""
    examples = [source[i] for i in range(len(source))]
    return {int(example["image"][0, 0, 0]): source.classes[example["label"]] for example in examples}


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path, caplog):
    for name, color in (("cat/a.png", 10), ("dog/deep/b.png", 20)):
        picture(tmp_path / name, color)
    for litter in (".ipynb_checkpoints/a.png", ".hidden/b.png", "__MACOSX/cat/._a.png", "cat/._a.png", "dog/.x/c.png"):
        picture(tmp_path / litter, 99)
    for litter in ("@eaDir/cat/a.png", "$Recycle.Bin/a.png"):
        picture(tmp_path / litter, 99)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "cat" / "thumbs.db").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    source = opened(tmp_path)
    assert source.classes == ["cat", "dog"] and labels(source) == {10: "cat", 20: "dog"}
    assert caplog.messages == [f"image folder {tmp_path}: passed over 9 hidden, 1 .txt"]
    opened(tmp_path)
    assert len(caplog.messages) == 1  # once in a process


def test_links_are_followed_and_those_that_lead_back_are_not(tmp_path, caplog):
    root = tmp_path / "root"
    picture(tmp_path / "elsewhere" / "a.png", 10)
    picture(root / "real" / "b.png", 20)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "twin").symlink_to(tmp_path / "elsewhere")  # two classes may be of one folder
    (root / "real" / "loop").symlink_to(root)
    (root / "real" / "lost.png").symlink_to(tmp_path / "nothing.png")
    (root / "real" / "own.png").symlink_to("own.png")
    (root / "own").symlink_to("own")
    (root / "real" / "c.png").symlink_to(root / "real" / "b.png")
    source = opened(root)
    assert source.classes == ["linked", "real", "twin"] and len(source) == 4
    assert [source[i]["label"] for i in range(4)] == [0, 1, 1, 2]
    assert "1 links to a folder that they are in" in caplog.text and "3 broken links" in caplog.text


def test_every_suffix_that_pillow_reads_whatever_its_case(tmp_path):
    names = ["a.jfif", "b.JPE", "c.bmp", "d.gif", "e.tif", "f.TIFF", "g.avif", "h.PNG", "i.webp", "j.ppm", "k.tga"]
    for name in names:
        picture(tmp_path / name)
    picture(tmp_path / "l.mpo", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    names.append("l.mpo")
    (tmp_path / "m.eps").touch()
    (tmp_path / "n.mpg").touch()
    assert [str(path) for path in image_files(tmp_path)] == sorted(names)
    source = opened(tmp_path)
    assert all((source[i]["image"] > 90).all() and not source[i]["skipped"] for i in range(len(names)))


def test_a_class_without_images_keeps_its_label(tmp_path, caplog):
    for split, classes in (("train", "abc"), ("test", "ac")):
        for name in classes:
            picture(tmp_path / split / name / "1.png")
    (tmp_path / "test" / "b").mkdir()
    train, test = opened(tmp_path / "train"), opened(tmp_path / "test")
    assert train.classes == test.classes == ["a", "b", "c"]
    assert [test[i]["label"] for i in range(2)] == [0, 2]
    assert caplog.messages == [f"image folder {tmp_path / 'test'}: classes without images: b"]


def test_names_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    for number in range(12):
        picture(tmp_path / "numbers" / str(number) / "1.png", 10 * number)
        picture(tmp_path / "words" / f"c{number}" / "1.png")
    source = opened(tmp_path / "numbers")
    assert source.classes == [str(number) for number in range(12)]
    assert labels(source) == {10 * number: str(number) for number in range(12)}
    picture(tmp_path / "numbers" / "007" / "1.png", 200)
    assert opened(tmp_path / "numbers").classes[6:9] == ["6", "007", "7"]
    assert opened(tmp_path / "words").classes[:3] == ["c0", "c1", "c10"]


def test_a_list_of_classes_fixes_the_labels(tmp_path, caplog):
    picture(tmp_path / "b" / "1.png", 10)
    picture(tmp_path / "a" / "1.png", 20)
    source = opened(tmp_path, classes=("b", "missing", "a"))
    assert source.classes == ["b", "missing", "a"] and labels(source) == {10: "b", 20: "a"}
    assert {source[i]["label"] for i in range(2)} == {0, 2} and "classes without images: missing" in caplog.text
    with pytest.raises(ValueError, match=r"images of classes that are not in `classes`: b$"):
        opened(tmp_path, classes=("a",))
    picture(tmp_path / "outside.png")
    assert opened(tmp_path).classes is None
    assert "no classes, because of images outside of their folders: outside.png" in caplog.text
    with pytest.raises(ValueError, match=r"images of classes that are not in `classes`: \(none\)$"):
        opened(tmp_path, classes=("a", "b"))
    for kind, classes in (("photos", ("a",)), ("folder", ("a", "a"))):
        with pytest.raises(ValueError, match="for kind 'folder' only, and each name once"):
            SourceConfig(kind=kind, classes=classes)


def test_one_folder_under_two_lists_of_classes_is_refused(tmp_path):
    """Label 0 would be a in one source and b in the other."""
    for name in "ab":
        picture(tmp_path / name / "1.png")
    source = SourceConfig(kind="folder", path=str(tmp_path), classes=("a", "b"))
    sources = source, dataclasses.replace(source, classes=("b", "a"))
    with pytest.raises(ValueError, match="have classes of other names"):
        check_data(DataConfig(image_size=8, batch_size=1, sources=sources), MODEL, random_tokenizer(), ())
    tiny = build(TrainConfig, load("configs/mergevq_tiny.py"))
    with pytest.raises(ValueError, match="have classes of other names"):
        check_labels(dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, sources=sources)))


def test_home_is_found(tmp_path, monkeypatch):
    picture(tmp_path / "pictures" / "a" / "1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened("~/pictures").classes == ["a"]


def test_a_folder_without_images_says_what_it_passed_over(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"holds no image that Pillow reads, .* \(passed over: 1 \.txt\)"):
        opened(tmp_path)


def test_files_are_listed_without_looking_at_each(tmp_path, monkeypatch):
    """A million images: one look at each folder, none at a file."""
    for number in range(20):
        picture(tmp_path / str(number % 2) / f"{number}.png")
    looked, stat = [], os.stat
    monkeypatch.setattr(folders.os, "stat", lambda path, **options: looked.append(path) or stat(path, **options))
    assert len(image_files(tmp_path)) == 20 and len(looked) == 3


def test_order_of_images_is_that_of_their_paths(tmp_path):
    names = ["b/z.png", "b/a/y.png", "a/2.png", "a/10.png", "c.png"]
    for name in names:
        picture(tmp_path / name)
    assert image_files(tmp_path) == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert np.all([opened(tmp_path)[0]["label"] == 0])
