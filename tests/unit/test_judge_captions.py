"""What captions ask for, and whether true scenes have it; without any network."""

import dataclasses

import numpy as np
import pytest

from mini_scenes import Scene, caption, example_scene, full_caption, sample_scene
from mini_scenes.judge import Wanted, WantedObject, accuracies, compare, parse_caption


def scenes(count: int) -> list[Scene]:
    return [sample_scene(np.random.default_rng(seed)) for seed in range(count)]


def test_every_caption_is_understood_and_true_of_its_scene():
    for seed, scene in enumerate(scenes(300)):
        text = caption(scene, np.random.default_rng(seed))
        verdict = compare(parse_caption(text), scene)
        assert verdict.score == 1, (text, verdict)
        assert sorted(verdict.places) == list(range(len(scene.objects)))


def test_a_full_caption_asks_for_everything():
    for scene in scenes(100):
        wanted = parse_caption(full_caption(scene))
        for want, item in zip(wanted.objects, sorted(scene.objects, key=lambda item: item.x), strict=True):
            size = None if item.size_name == "medium" else item.size_name
            assert want == WantedObject(
                shape=item.shape, color=item.color, texture=item.texture, size=size, pose=item.pose
            )
        assert wanted.background == scene.background.kind
        assert wanted.direction == scene.light.direction_name
        assert (wanted.warmth or "neutral") == scene.light.warmth_name


def test_sides_give_the_order():
    right = parse_caption("a star to the right of a small heart upside down, in warm light")
    assert right == Wanted(
        objects=(WantedObject(shape="heart", size="small", pose="upside down"), WantedObject(shape="star")),
        ordered=True,
        warmth="warm",
    )
    assert not parse_caption("a star and a heart").ordered


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red dog on the grass", "dog"),
        ("a star beside a heart", "beside"),
        ("the sunset", "the sunset"),
        ("on the beach", "no objects"),
        ("a star at sunset on the beach", "two backgrounds"),
        ("a star to the left of a heart to the right of a drop", "two"),
    ],
)
def test_a_caption_that_is_not_understood_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_caption(text)


def two_objects() -> Scene:
    return next(scene for scene in scenes(100) if len(scene.objects) == 2)


def kinds_missed(wanted: Wanted, scene: Scene) -> list[str]:
    return [kind for kind, there in compare(wanted, scene).items if not there]


def test_each_kind_of_item_is_missed_where_it_is_not_there():
    scene = two_objects()
    wanted = dataclasses.replace(parse_caption(full_caption(scene)), ordered=True)
    left = min(range(2), key=lambda i: scene.objects[i].x)
    item = scene.objects[left]
    assert kinds_missed(wanted, scene) == []
    assert kinds_missed(wanted, scene.with_object(left, color="none")) == ["color"]
    assert kinds_missed(wanted, scene.with_object(left, texture="none")) == ["texture"]
    assert kinds_missed(wanted, scene.with_object(left, x=scene.objects[1 - left].x + 0.1)) == ["arrangement"]
    # What belongs to an object that is not there is not there.
    gone = kinds_missed(wanted, dataclasses.replace(scene, objects=(scene.objects[1 - left],)))
    assert gone[:2] == ["count", "class"] and {"color", "texture", "arrangement"} <= set(gone)
    other_class = next(shape for shape in ("circle", "ring", "square") if shape not in {o.shape for o in scene.objects})
    assert "class" in kinds_missed(wanted, scene.with_object(left, shape=other_class))
    assert "count" in kinds_missed(wanted, dataclasses.replace(scene, objects=(*scene.objects, item)))
    light = dataclasses.replace(scene.light, azimuth=10.0 if scene.light.direction_name == "above" else 90.0)
    assert kinds_missed(wanted, dataclasses.replace(scene, light=light)) == ["direction"]
    place = dataclasses.replace(scene.background, kind="other")
    assert kinds_missed(wanted, dataclasses.replace(scene, background=place)) == ["background"]


def test_attributes_on_the_wrong_object_are_missed():
    scene = two_objects()
    wanted = parse_caption(full_caption(scene))
    first, second = scene.objects
    swapped = scene.with_object(0, color=second.color).with_object(1, color=first.color)
    assert kinds_missed(wanted, swapped) == ["color", "color"]


def test_objects_of_one_class_are_assigned_by_their_attributes():
    scene = two_objects()
    first, second = scene.objects
    same = scene.with_object(1, shape=first.shape, rotation=first.rotation)
    text = f"a {second.color} {first.shape} and a {first.color} {first.shape}"
    verdict = compare(parse_caption(text), same)
    assert verdict.score == 1 and verdict.places == (1, 0)


def test_an_empty_scene_has_nothing():
    scene = dataclasses.replace(two_objects(), objects=())
    verdict = compare(parse_caption("a red star and a heart"), scene)
    assert verdict.score == 0 and verdict.places == (None, None)


def test_accuracies_count_items_over_images():
    scene, _ = example_scene(0, "test", 0)
    empty = dataclasses.replace(scene, objects=())
    wanted = parse_caption(f"a {scene.objects[0].shape}")
    shares = accuracies([compare(wanted, scene), compare(wanted, empty)])
    assert shares["class"].mean == 0.5 and shares["class"].count == 2
    assert set(shares) == {"count", "class", "all"}


def test_objects_alike_are_assigned_in_the_order_of_the_caption():
    scene = two_objects()
    first = scene.objects[0]
    same = scene.with_object(1, shape=first.shape, rotation=first.rotation)
    same = same.with_object(0, x=0.7).with_object(1, x=0.3)
    text = f"a {first.shape} to the left of a {first.shape}"
    assert compare(parse_caption(text), same).places == (1, 0)
    assert compare(parse_caption(text), same.with_object(0, x=0.1)).places == (0, 1)
