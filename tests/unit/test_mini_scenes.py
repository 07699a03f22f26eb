"""mini_scenes: determinism, ground truth that agrees with the pixels, captions, and the TFDS dataset on disk."""

import dataclasses
import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mini_scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    POSES,
    TEXTURES,
    Background,
    Light,
    Scene,
    SceneObject,
    accent_of,
    alone,
    as_drawing,
    caption,
    example_scene,
    full_caption,
    in_a_row,
    make_config,
    prepare,
    render_scene,
    sample_color,
    sample_scene,
)
from mini_scenes.captions import object_caption, place_caption
from mini_scenes.examples import make_examples
from mini_scenes.judge import parse_caption
from mini_scenes.style import SHADED, Style
from mini_scenes.vocabulary import MENTION_RATES, SYMMETRY

COUNTS = {"train": 40, "validation": 5, "test": 5}
PLAIN_WALL = Background(kind="wall", horizon=0.5, tone=0.5, seed=3)
ABOVE = Light(azimuth=90.0, elevation=50.0, warmth=0.0)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [example_scene(0, "train", i)[0] for i in range(250)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("data"))
    assert prepare(data_dir, 64, **COUNTS, seed=7) == "mini_scenes/64_n40_5_5_s7"
    return data_dir


def one_object(shape: str = "circle", **changes) -> Scene:
    item = SceneObject(
        shape=shape,
        color="red",
        rgb=(214, 30, 30),
        texture="plain",
        accent=accent_of((214, 30, 30)),
        size=0.3,
        x=0.5,
        y=0.5,
        rotation=0.0,
    )
    return Scene(objects=(dataclasses.replace(item, **changes),), light=ABOVE, background=PLAIN_WALL)


def test_example_is_a_function_of_seed_split_and_index():
    scene, text = example_scene(3, "train", 11)
    assert example_scene(3, "train", 11) == (scene, text)
    others = [example_scene(4, "train", 11), example_scene(3, "test", 11), example_scene(3, "train", 12)]
    assert all(other[0] != scene for other in others)
    first, second = render_scene(scene, 32), render_scene(scene, 32)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.mask, second.mask)


def test_json_gives_the_scene_back(scenes):
    assert all(Scene.from_json(scene.to_json()) == scene for scene in scenes[:50])


def test_variety(scenes):
    objects = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in objects} == set(CLASSES)
    assert {item.color for item in objects} == set(COLORS)
    assert {item.texture for item in objects} == set(TEXTURES)
    assert {scene.background.kind for scene in scenes} == set(BACKGROUNDS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    assert {item.pose for item in objects} == {*POSES, None}
    assert {item.size_name for item in objects} == {"small", "medium", "big"}
    assert {scene.light.direction_name for scene in scenes} == {"left", "right", "above"}
    assert {scene.light.warmth_name for scene in scenes} == {"warm", "cool", "neutral"}


def test_the_first_object_is_the_largest_and_gives_the_label(scenes):
    for scene in scenes:
        assert scene.objects[0].size == max(item.size for item in scene.objects)
        assert CLASSES[scene.label] == scene.objects[0].shape
        assert len({item.shape for item in scene.objects}) == len(scene.objects)
        assert len({item.color for item in scene.objects}) == len(scene.objects)


def test_masks_agree_with_the_objects(scenes):
    for scene in scenes[:120]:
        mask = render_scene(scene, 64).mask
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        for number, item in enumerate(scene.objects, 1):
            y, x = (np.nonzero(mask == number)[axis] / 64 for axis in (0, 1))
            # The bounding circle holds the object, which fills at least a fifth of it.
            assert np.hypot(x + 0.5 / 64 - item.x, y + 0.5 / 64 - item.y).max() < 1.06 * item.size + 1 / 64
            assert len(x) / 64**2 > 0.2 * np.pi * item.size**2 * 0.8


def test_objects_hide_little_of_each_other(scenes):
    for scene in scenes[:60]:
        together = render_scene(scene, 64).mask
        for number, item in enumerate(scene.objects, 1):
            alone = render_scene(dataclasses.replace(scene, objects=(item,)), 64).mask
            assert (together == number).sum() > 0.8 * alone.sum()


def test_alone(scenes):
    for number, scene in enumerate(scenes[:40]):
        found = alone(scene, np.random.default_rng([1, number]))
        (item,), main = found.objects, scene.objects[0]
        assert found.label == scene.label and (item.shape, item.rgb, item.texture) == (
            main.shape,
            main.rgb,
            main.texture,
        )
        assert item.x == 0.5 and item.y + item.size < 0.95 and item.size > 0.3


def test_in_a_row(scenes):
    upright, total = 0, 0
    for number, scene in enumerate(scenes):
        row = in_a_row(scene, np.random.default_rng([1, number]))
        assert row.label == scene.label
        assert dataclasses.replace(row.background, horizon=scene.background.horizon) == scene.background
        same = ("warmth", "direction_name", "warmth_name")
        assert all(getattr(row.light, name) == getattr(scene.light, name) for name in same)
        assert row == in_a_row(scene, np.random.default_rng([1, number]))
        kept = scene.objects[:2]
        before, after = ([item.shape for item in sorted(s, key=lambda item: item.x)] for s in (kept, row.objects))
        assert before == after
        for old, new in zip(kept, row.objects, strict=True):
            assert (old.color, old.rgb, old.texture, old.accent) == (new.color, new.rgb, new.texture, new.accent)
            assert new.rotation == 0 or (
                new.rotation in (-48, 48, -180) and SYMMETRY[new.shape] == 1 and new.pose == old.pose
            )
            assert new.size == row.objects[0].size and max(abs(new.x - 0.5), abs(new.y - 0.5)) + new.size < 0.5
        for left, right in itertools.combinations(sorted(row.objects, key=lambda item: item.x), 2):
            assert right.x - left.x > left.size + right.size
        turned = [item for item in row.objects if SYMMETRY[item.shape] == 1]
        upright, total = upright + sum(item.pose == "upright" for item in turned), total + len(turned)
    assert 0.5 < upright / total < 0.75


def test_every_class_has_an_outline_of_its_own():
    masks = {shape: render_scene(one_object(shape, size=0.4), 64).mask > 0 for shape in CLASSES}
    for a in CLASSES:
        for b in CLASSES:
            overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
            assert overlap == 1 if a == b else overlap < 0.9, (a, b, overlap)


@pytest.mark.parametrize("shape", CLASSES)
def test_symmetry_table(shape):
    turn = 360 / SYMMETRY[shape] if SYMMETRY[shape] else 77.0
    upright = render_scene(one_object(shape, size=0.4), 128).mask
    turned = render_scene(one_object(shape, size=0.4, rotation=turn), 128).mask
    assert (upright != turned).mean() < 0.003
    if SYMMETRY[shape]:
        between = render_scene(one_object(shape, size=0.4, rotation=turn / 2), 128).mask
        assert (upright != between).mean() > 0.008


def test_one_changed_attribute_changes_only_that_object(scenes):
    scene = next(s for s in scenes if len(s.objects) == 3)
    rgb = sample_color(np.random.default_rng(0), "teal")
    before = render_scene(scene, 64)
    after = render_scene(scene.with_object(1, color="teal", rgb=rgb, accent=accent_of(rgb), texture="plain"), 64)
    assert np.array_equal(before.mask, after.mask)
    changed = (before.image != after.image).any(-1)
    near = np.pad(before.mask == 2, 1)
    near = near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:] | near[1:-1, 1:-1]
    assert changed[before.mask == 2].mean() > 0.9 and not changed[~near].any()


@pytest.mark.parametrize("name", COLORS)
def test_colors_are_seen_as_stored(name):
    rgb = sample_color(np.random.default_rng(1), name)
    image, mask = render_scene(one_object(rgb=rgb), 64)
    seen = image[mask == 1].astype(float).mean(0)
    cosine = seen @ rgb / np.linalg.norm(seen) / np.linalg.norm(rgb)
    assert cosine > 0.98
    assert 0.75 < seen.sum() / sum(rgb) < 1.25


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_are_strong_on_the_smallest_object(texture):
    image, mask = render_scene(one_object(texture=texture, size=0.14), 64)
    plain, _ = render_scene(one_object(size=0.14), 64)
    difference = np.abs(image.astype(int) - plain)[mask == 1].max(-1)
    # A third to two thirds of the surface carries the second colour.
    assert 0.2 < (difference > 40).mean() < 0.75 if texture != "plain" else not difference.any()


def test_light_falls_from_where_it_says():
    def brightness(azimuth: float) -> np.ndarray:
        scene = dataclasses.replace(one_object(), light=dataclasses.replace(ABOVE, azimuth=azimuth))
        return render_scene(scene, 64).image.astype(float).mean(-1)

    right, left = brightness(20.0), brightness(160.0)
    assert right[:, 40:].mean() > left[:, 40:].mean() + 5 and left[:, :24].mean() > right[:, :24].mean() + 5


def test_the_same_picture_at_every_size(scenes):
    for scene in scenes[:12]:
        small = render_scene(scene, 32).image.astype(float)
        large = render_scene(scene, 128).image.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(small - large).mean() < 6


def test_captions_name_attributes_some_of_the_time():
    rng = np.random.default_rng(5)
    drawn = [sample_scene(rng) for _ in range(1000)]
    pairs = [(scene, caption(scene, rng)) for scene in drawn if len(scene.objects) == 1]
    assert len(pairs) > 250
    named = {
        "color": [scene.objects[0].color in text.split() for scene, text in pairs],
        "texture": [scene.objects[0].texture in text.replace("plain wall", "") for scene, text in pairs],
        "background": [BACKGROUNDS[scene.background.kind] in text for scene, text in pairs],
        "size": [s.objects[0].size_name in t.split() for s, t in pairs if s.objects[0].size_name != "medium"],
        "pose": [scene.objects[0].pose in text for scene, text in pairs if scene.objects[0].pose],
        "warmth": [scene.light.warmth_name in text for scene, text in pairs if scene.light.warmth_name != "neutral"],
        "direction": ["lit from" in text for _, text in pairs],
    }
    for attribute, hits in named.items():
        assert abs(np.mean(hits) - MENTION_RATES[attribute]) < 4 * np.sqrt(0.25 / len(hits)), attribute
    assert all(scene.objects[0].shape in text for scene, text in pairs)
    assert len({text.split()[0] for _, text in pairs}) > 5


def test_captions_never_name_what_is_not_there(scenes):
    for number, scene in enumerate(scenes):
        text = caption(scene, np.random.default_rng(number)).replace("a plain wall", "").replace(",", "").split()
        for attribute, vocabulary in (("shape", CLASSES), ("color", COLORS), ("texture", TEXTURES)):
            there = [getattr(item, attribute) for item in scene.objects]
            assert all(text.count(word) <= there.count(word) for word in vocabulary)
        assert sum(text.count(shape) for shape in CLASSES) == len(scene.objects)


def test_relations_are_true(scenes):
    told = 0
    for number, scene in enumerate(scenes):
        text = caption(scene, np.random.default_rng(number))
        for side in ("left", "right"):
            if f" to the {side} of " in text:
                before, after = text.split(f" to the {side} of ")
                (first,) = (item for item in scene.objects if f" {item.shape}" in before)
                (second,) = (item for item in scene.objects if f" {item.shape}" in after)
                assert (first.x < second.x) == (side == "left")
                told += 1
    assert told > 10


def test_full_caption_names_everything(scenes):
    for scene in scenes[:100]:
        text = full_caption(scene)
        for item in scene.objects:
            assert f"{item.color} {item.texture} {item.shape}" in text
            assert item.pose is None or f"{item.shape} {item.pose}" in text
        assert BACKGROUNDS[scene.background.kind] in text and "lit from" in text


def test_dataset_on_disk(dataset):
    builder = tfds.core.read_only_builder.builder_from_files("mini_scenes/64_n40_5_5_s7", data_dir=dataset)
    for split, count in COUNTS.items():
        records = builder.as_data_source(split=split)
        assert len(records) == count
        for index in (0, count - 1):
            record, (scene, text) = records[index], example_scene(7, split, index)
            image, mask = render_scene(scene, 64)
            assert np.array_equal(record["image"], image) and np.array_equal(record["mask"][..., 0], mask)
            assert record["caption"].decode() == text and record["full_caption"].decode() == full_caption(scene)
            assert Scene.from_json(record["scene"].decode()) == scene and record["label"] == scene.label
            assert np.array_equal(record["objects"]["rgb"], [item.rgb for item in scene.objects])
            assert [CLASSES[i] for i in record["objects"]["shape"]] == [item.shape for item in scene.objects]


def test_prepare_is_done_once(dataset, monkeypatch):
    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr("mini_scenes.builder.make_examples", refuse)
    prepare(dataset, 64, **COUNTS, seed=7)


def test_an_interrupted_build_leaves_no_dataset(tmp_path, monkeypatch):
    def stop(*_):
        yield from make_examples(0, "train", 2, 32, 0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mini_scenes.builder.make_examples", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, 32, train=3, validation=1, test=1)
    assert not list(tmp_path.rglob("dataset_info.json"))
    prepare(tmp_path, 32, train=3, validation=1, test=1)


def test_workers_make_the_same_examples():
    alone = list(make_examples(1, "test", 5, 32, 0, single=True))
    shared = list(make_examples(1, "test", 5, 32, 2, single=True))
    assert all(len(Scene.from_json(e["scene"]).objects) == 1 for e in alone)
    assert [e["image"] for e in alone] == [e["image"] for e in shared]
    assert [e["caption"] for e in alone] == [e["caption"] for e in shared]


def test_a_single_object_is_in_the_middle_or_near_it():
    for index in range(20):
        first = example_scene(1, "test", index)[0].objects[0]
        scene = example_scene(1, "test", index, single=True, centred=False)[0]
        (near,) = scene.objects
        (middle,) = example_scene(1, "test", index, single=True)[0].objects
        assert middle.x == 0.5 and 0 < abs(near.x - 0.5) <= 0.1 and 0 < abs(near.y - 0.5) <= 0.1
        assert scene.background.kind == "wall" and 0.25 <= near.size <= 0.4
        assert dataclasses.replace(first, size=near.size, x=near.x, y=near.y) == near


def test_a_dead_worker_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="worker ended early with exit code 1"):
        list(make_examples(1, "test", 5, 32, 2))


def test_tensorflow_is_never_imported(tmp_path):
    program = f"""
import sys
from runtime_jax.data import DataConfig, SourceConfig, make_batches
from mini_scenes import prepare
name = prepare({str(tmp_path)!r}, 32, train=4, validation=1, test=1)
source = SourceConfig(kind="tfds", name=name, data_dir={str(tmp_path)!r})
batches = make_batches(DataConfig(image_size=32, batch_size=2, sources=(source,)), 0)
assert next(batches)["image"].shape == (2, 32, 32, 3)
batches.close()
assert not {{"tensorflow", "torch"}} & set(sys.modules), "TensorFlow or torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, "size is 8"),
        ({"train": 0}, "train is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_config(**arguments)


def test_too_small_a_picture():
    with pytest.raises(ValueError, match="at least 16"):
        render_scene(one_object(), 8)


def drawings(scenes: list[Scene]) -> list[Scene]:
    return [
        as_drawing(in_a_row(scene, np.random.default_rng(i)), np.random.default_rng(i))
        for i, scene in enumerate(scenes)
    ]


def test_a_drawing_is_called_one_and_keeps_what_captions_say(scenes):
    for i, (scene, drawn) in enumerate(zip(scenes[:60], drawings(scenes[:60]), strict=True)):
        text = full_caption(drawn)
        assert drawn.style != SHADED and "a drawing of" in text and "a drawing of" not in full_caption(scene)
        wanted = parse_caption(text)
        assert [item.shape for item in wanted.objects] == [
            item.shape for item in sorted(drawn.objects, key=lambda o: o.x)
        ]
        assert {item.color for item in wanted.objects} == {item.color for item in drawn.objects}
        assert (wanted.direction is None) == (not drawn.style.shading)
        assert "a drawing of" in caption(drawn, np.random.default_rng(i))
        assert Scene.from_json(drawn.to_json()) == drawn
        assert "style" not in scene.to_json()  # files of earlier versions stay as they are


def test_a_style_draws_outlines_even_colours_and_backgrounds_of_one_or_two_colours():
    shaded = one_object("square")
    image, mask = render_scene(shaded, 64)
    even, _ = render_scene(dataclasses.replace(shaded, style=Style(shading=False, plain=True)), 64)
    assert len(np.unique(even[mask == 1][20:-20], axis=0)) < len(np.unique(image[mask == 1][20:-20], axis=0))
    assert len(np.unique(even[:8].reshape(-1, 3), axis=0)) == 1  # a wall of one colour
    lined, covered = render_scene(dataclasses.replace(shaded, style=Style(outline=0.15)), 64)
    assert (covered[mask == 1] == 1).all() and covered.sum() > mask.sum()
    rim = (covered == 1) & (mask == 0)
    assert lined[rim].mean() < 0.6 * image[rim].mean()
    grass = dataclasses.replace(shaded, background=Background(kind="grass", horizon=0.5, tone=0.5, seed=3))
    ground, _ = render_scene(dataclasses.replace(grass, style=Style(shading=False, plain=True)), 64)
    assert len(np.unique(ground[:, 0], axis=0)) == 2


def test_parts_of_a_scene_have_captions_of_their_own(scenes):
    everything, nothing = (dict.fromkeys(MENTION_RATES, rate) for rate in (1.0, 0.0))
    for i, scene in enumerate(scenes[:40]):
        rng, item = np.random.default_rng(i), scene.objects[0]
        assert object_caption(item, rng, nothing) in (f"a {item.shape}", f"an {item.shape}")
        (wanted,) = parse_caption(object_caption(item, rng, everything)).objects
        assert (wanted.shape, wanted.color, wanted.texture) == (item.shape, item.color, item.texture)
        place = BACKGROUNDS[scene.background.kind]
        assert place_caption(scene, rng, nothing) == place
        assert place_caption(scene, rng, everything).startswith(f"{place} ") and "lit from" in place_caption(
            scene, rng, everything
        )
