"""The measures of generation: classes that a judge sees, the table of a comparison."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from mergevq_jax.commands import compare as comparison
from mergevq_jax.commands.compare import Curve, Row, cache_bytes, compare, read_samples, render, trade_off
from mergevq_jax.evaluate.frechet import Moments
from mergevq_jax.evaluate.generation import Labelled, Quality, main_classes, measure
from mergevq_jax.pretrained import TOKENIZERS
from mergevq_jax.tokenizer.model import Tokenizer
from mini_scenes import CLASSES, example_scene, render_scene
from mini_scenes.judge import Judge, Seen
from runtime_jax.estimate import Estimate

COUNT, SIZE = 6, 32
SCENES = [example_scene(0, "test", index)[0] for index in range(COUNT)]
IMAGES = np.stack([render_scene(scene, SIZE).image for scene in SCENES])
LABELS = np.asarray([scene.label for scene in SCENES])


class KnowingJudge(Judge):
    """Knows the true scenes by their pixels and sees nothing in other images; its features are mean colours."""

    def __init__(self):
        pass

    def look(self, images):
        truth = {image.tobytes(): scene for image, scene in zip(IMAGES, SCENES, strict=True)}
        nothing = dataclasses.replace(SCENES[0], objects=())
        return [Seen(truth.get(image.tobytes(), nothing), (), ()) for image in images]

    def features(self, images):
        return images.reshape(len(images), -1, 3).mean(axis=1) / 255


# The judge.


def test_images_of_the_wanted_class():
    judge, reference = KnowingJudge(), Moments.of(KnowingJudge().features(IMAGES))
    np.testing.assert_array_equal(main_classes(judge, IMAGES), LABELS)
    quality = measure(judge, [Labelled(IMAGES, LABELS)], reference)
    assert quality.accuracy.mean == 1 and quality.accuracy.count == COUNT
    assert abs(quality.frechet.mean) < 1e-12 and quality.frechet.half_width is None
    blank = Labelled(IMAGES // 2, LABELS)  # nothing to be seen in them
    wrong = Labelled(IMAGES, (LABELS + 1) % len(CLASSES))
    quality = measure(judge, [Labelled(IMAGES, LABELS), blank, wrong], reference)
    assert quality.accuracy.mean == pytest.approx(1 / 3)
    assert quality.frechet.count == 3 and quality.frechet.half_width > quality.frechet.mean > 0


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "no sets"),
        ([Labelled(IMAGES[1:], LABELS[1:])], "5 images, 5 labels, 6 real images: numbers must be equal"),
        ([Labelled(IMAGES, LABELS + len(CLASSES))], "classes are 0 to 11"),
    ],
    ids=["none", "another number", "labels"],
)
def test_sets_that_cannot_be_judged(sets, message):
    judge = KnowingJudge()
    with pytest.raises(ValueError, match=message):
        measure(judge, sets, Moments.of(judge.features(IMAGES)))


# The comparison.

PROTOCOL = {
    "fingerprint": "00ff",
    "seed": 0,
    "device": "cpu",
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "num": COUNT,
    "keep": 4,
    "steps": 16,
    "batch_size": 2,
    "slots": 10,
    "compute": {"dtype": "bfloat16"},
    "sampling": {"cfg_scale": [1.0, 2.0], "policy": "full"},
    "generator": {"kind": "merge", "architecture": {"num_layers": 3, "dim": 8}, "classes": list(CLASSES)},
    "measured": {"seconds_per_image": 0.25},
}


def folder(path, images=IMAGES, labels=LABELS, **changes):
    path.mkdir()
    np.savez(path / "samples.npz", images, labels)
    (path / "protocol.json").write_text(json.dumps(PROTOCOL | changes))
    return path


def test_a_protocol_of_an_older_version_has_another_name_for_k(tmp_path):
    path = folder(tmp_path / "old")
    old = {("merge_number" if name == "keep" else name): value for name, value in PROTOCOL.items()}
    (path / "protocol.json").write_text(json.dumps(old))
    assert read_samples(path).protocol["keep"] == PROTOCOL["keep"]


def test_a_protocol_says_what_an_image_costs():
    assert cache_bytes(PROTOCOL) == 2 * 3 * 2 * 10 * 8 * 2
    assert cache_bytes(PROTOCOL | {"sampling": {"cfg_scale": 1.0}}) == 2 * 3 * 10 * 8 * 2


def test_a_table_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "read_scenes", lambda *_, **__: Labelled(IMAGES, LABELS))
    # What a set was drawn in batches of says nothing about its images.
    folders = [folder(tmp_path / "a"), folder(tmp_path / "b", IMAGES[::-1], seed=1, batch_size=3)]
    compare([("ours", folders)], out=tmp_path / "out", data_dir="", judge=KnowingJudge())
    head, _, real, ours, *_, note = (tmp_path / "out" / "compare.md").read_text().splitlines()
    assert "as many test scenes of mini_scenes/32, of several objects (--single: of one); intervals" in note
    assert head.count("|") == ours.count("|") == 7
    assert real.startswith("| held-out scenes | 1 | 100.0 ± 0.0 |") and "| 0.000 |" in real
    assert ours.startswith("| ours | 2 | ") and ours.endswith("| 2 | 0.250 |")
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000


def test_reconstructions_are_of_the_scenes(tmp_path, monkeypatch):
    """With where the groups start, all kept tokens are put back as they were; other sizes have no source recovery."""
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS["tiny"])
    scenes = np.random.default_rng(0).integers(0, 256, (COUNT, 64, 64, 3), np.uint8)
    whole, rebuilt = (np.asarray(way(scenes)) for way in comparison._reconstructions(tokenizer, (256,), 64).values())
    np.testing.assert_array_equal(whole, rebuilt)
    assert list(comparison._reconstructions(tokenizer, (64,), 32)) == ["reconstructed, K = 64"]

    monkeypatch.setattr(comparison, "read_scenes", lambda *_, **__: Labelled(scenes, LABELS))
    rows = [("ours", [folder(tmp_path / "a", scenes)])]
    compare(rows, out=tmp_path / "out", data_dir="", judge=KnowingJudge(), tokenizer="tiny", keeps=(144,))
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| reconstructed, K = 144 | 1 |" in table and "| from codes and starts, K = 144 | 1 |" in table


def test_quality_against_slots():
    def row(slots, name="full", right=0.5, digest="f257"):
        curve = name and Curve(name, digest)
        return Row(f"{slots}", Quality(Estimate(right, 0.1, 9), Estimate(2 * right, None, 1)), 1, curve, slots)

    rows = [row(30, right=0.75), row(10), row(10, "evict-oldest"), row(20, None), row(None, None)]
    accuracy, distance = trade_off(rows).values()
    assert list(accuracy) == list(distance) == ["full"]  # the other policy has one number of slots only
    assert accuracy["full"] == ([10, 30], (50, 75), (10, 10)) and distance["full"].y == (1.0, 1.5)
    assert np.isnan(distance["full"].half_widths).all()
    assert trade_off(rows[1:]) == {}
    others = [row(10, digest="9ddf"), row(20, digest="9ddf")]
    assert list(trade_off(rows + others)["right class, %"]) == ["full, settings 9ddf", "full, settings f257"]


def test_what_is_not_known_is_left_empty():
    quality = Quality(Estimate(0.5, 0.1, 9), Estimate(1.25, None, 1))
    assert "| real | 1 | 50.0 ± 10.0 | 1.250 |  |  |" in render([Row("real", quality, 1)], 9, "mini_scenes/64_single")


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"nothing: no such folder$"):
        read_samples(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a folder of mergevq sample"):
        read_samples(tmp_path)
    with pytest.raises(ValueError, match=r"bad: images uint8 \(6, 32, 32, 3\) with labels \(5,\)"):
        read_samples(folder(tmp_path / "bad", labels=LABELS[1:]))
    rows = [("a", [folder(tmp_path / "a")]), ("b", [folder(tmp_path / "b", IMAGES[:4], LABELS[:4])])]
    there = f"a {tmp_path}/a: 6 of 32 x 32 pixels, b {tmp_path}/b: 4 of 32 x 32 pixels"
    with pytest.raises(ValueError, match=f"equal numbers of images of one size are needed, there are {there}$"):
        compare(rows, out=tmp_path, data_dir="", judge=KnowingJudge())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measured": {}}, "ours: its protocol has no seconds_per_image; draw the samples again"),
        ({"slots": 11, "keep": 9}, "ours: its folders differ in keep, slots, not in the seed alone"),
        ({"fingerprint": "01"}, "ours: its folders differ in fingerprint"),
        ({"seed": 0}, r"ours: seeds \[0, 0\]: every folder needs its own"),
    ],
)
def test_a_rows_folders_differ_in_the_seed_alone(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(comparison, "read_scenes", lambda *_, **__: Labelled(IMAGES, LABELS))
    folders = [folder(tmp_path / "a"), folder(tmp_path / "b", **{"seed": 1} | changes)]
    with pytest.raises(ValueError, match=message):
        compare([("ours", folders)], out=tmp_path / "out", data_dir="", judge=KnowingJudge())


def test_rows_that_cannot_be_told_apart_or_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "read_scenes", lambda *_, **__: Labelled(IMAGES, LABELS))
    run = functools.partial(compare, out=tmp_path / "out", data_dir="", judge=KnowingJudge())
    one = [folder(tmp_path / "a")]
    with pytest.raises(ValueError, match="rows ours, ours: every name once"):
        run([("ours", one), ("ours", one)])
    with pytest.raises(ValueError, match="rows held-out scenes: these names are those of real scenes"):
        run([("held-out scenes", one)])
    with pytest.raises(ValueError, match="old: its protocol has no fingerprint"):
        old = folder(tmp_path / "old")
        (old / "protocol.json").write_text(json.dumps({k: v for k, v in PROTOCOL.items() if k != "fingerprint"}))
        run([("old", [old])])
    other = PROTOCOL["generator"] | {"classes": ["cat", "dog"]}
    with pytest.raises(ValueError, match=r"its generator's classes are \['cat', 'dog'\], not"):
        run([("ours", [folder(tmp_path / "b", generator=other)])])


def test_lines_join_rows_that_differ_in_slots_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "read_scenes", lambda *_, **__: Labelled(IMAGES, LABELS))
    drawn: list[dict] = []
    monkeypatch.setattr(comparison, "plot_lines", lambda panels, path, x_label: drawn.append(panels))
    changes = {
        "a": {"slots": 5},
        "b": {},
        "plain": {"generator": PROTOCOL["generator"] | {"kind": "plain"}, "slots": 20, "fingerprint": "01"},
        "other K": {"keep": 9, "slots": 7},
        "hotter": {"sampling": PROTOCOL["sampling"] | {"temperature": 2.0}, "slots": 8},
    }
    rows = [(name, [folder(tmp_path / name, **change)]) for name, change in changes.items()]
    compare(rows, out=tmp_path / "out", data_dir="", judge=KnowingJudge())
    ((name, points),) = drawn[0]["right class, %"].items()
    assert name == "full, K = 4" and list(points.x) == [5, 10]
