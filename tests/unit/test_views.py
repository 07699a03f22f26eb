"""Views of a picture: which part they show, what decides it, and configs that do not fit."""

import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest
from PIL import Image

from runtime_jax.config import build, to_dict
from runtime_jax.data import DataConfig, ResizedCropConfig, SourceConfig, ViewConfig, make_batches
from runtime_jax.data import views as views_lib
from runtime_jax.data.views import take_view

PHOTOS = SourceConfig(kind="photos")
RESIZED = ViewConfig(name="view", image_size=24, resized_crop=ResizedCropConfig())
FURTHER = (RESIZED, ViewConfig(name="other", image_size=16, flip=True))


def config(**changes) -> DataConfig:
    return DataConfig(**{"image_size": 32, "batch_size": 8, "sources": (PHOTOS,), "seed": 3, "flip": True, **changes})


def take(cfg, start, count, **hosts):
    batches = make_batches(cfg, start, **hosts)
    drawn = list(itertools.islice(batches, count))
    batches.close()
    return drawn


def ramp(height=90, width=160):
    """An image whose pixels say where they are, in red the column and in green the row."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)


def test_random_parts_have_the_areas_and_shapes_of_the_config():
    rng, limits = np.random.default_rng(0), ResizedCropConfig(area=(0.1, 0.6), ratio=(0.5, 2.0))
    boxes = [views_lib._random_part(160, 90, limits, rng) for _ in range(2000)]
    for box in boxes:
        assert 0 <= box.left <= 160 - box.width and 0 <= box.top <= 90 - box.height
    areas = np.array([box.width * box.height / (160 * 90) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.09 < areas.min() < 0.13 and 0.55 < areas.max() < 0.62
    assert 0.45 < ratios.min() < 0.6 and 1.8 < ratios.max() < 2.2
    assert 0.5 < np.mean(ratios > 1) < 0.7  # even in the logarithm, but the tallest parts do not fit


def test_a_part_that_cannot_fit_is_the_largest_centred_one():
    """All of a picture twice as wide as the config allows is asked for."""
    box = views_lib._random_part(
        200, 50, ResizedCropConfig(area=(1.0, 1.0), ratio=(1.0, 2.0)), np.random.default_rng(0)
    )
    assert box == (50, 0, 100, 50)


def test_a_view_shows_its_part_of_the_picture():
    rng = np.random.default_rng(1)
    box = views_lib._random_part(160, 90, RESIZED.resized_crop, np.random.default_rng(1))
    shown = take_view(ramp(), RESIZED, rng).astype(float)
    columns = box.left + (np.arange(24) + 0.5) * box.width / 24 - 0.5
    rows = box.top + (np.arange(24) + 0.5) * box.height / 24 - 0.5
    inner = slice(2, -2)
    assert np.abs(shown[..., 0] - columns)[:, inner].max() < 1 and np.abs(shown[..., 1].T - rows)[:, inner].max() < 1


def test_an_image_of_pillow_and_its_pixels_give_the_same_view():
    for view in (
        RESIZED,
        *FURTHER,
        ViewConfig(name="v", image_size=90),
        ViewConfig(name="v", image_size=90, flip=True),
    ):
        for seed in range(4):
            pixels, image = (
                take_view(picture, view, np.random.default_rng(seed)) for picture in (ramp(), Image.fromarray(ramp()))
            )
            assert np.array_equal(pixels, image) and pixels.shape == view.shape


def test_half_of_the_views_are_mirrored():
    view = ViewConfig(name="v", image_size=30, random_crop=False, flip=True)
    plain = take_view(ramp(), dataclasses.replace(view, flip=False), np.random.default_rng(0))
    drawn = [take_view(ramp(), view, np.random.default_rng(seed)) for seed in range(100)]
    mirrored = [np.array_equal(image, plain[:, ::-1]) for image in drawn]
    assert 30 < sum(mirrored) < 70
    assert all(
        np.array_equal(image, plain) for image, is_mirrored in zip(drawn, mirrored, strict=True) if not is_mirrored
    )


@pytest.mark.parametrize("changes", [{}, {"resized_crop": ResizedCropConfig(area=(0.3, 1.0)), "views": FURTHER}])
def test_views_are_a_function_of_the_example(changes):
    """For any start, number of hosts, and workers."""
    cfg = config(**changes)
    whole = take(cfg, 0, 4)
    later = take(cfg, 2, 2)
    halves = [take(cfg, 2, 2, process_index=i, process_count=2) for i in range(2)]
    worked = take(dataclasses.replace(cfg, num_workers=1), 2, 2)
    for step in range(2):
        joined = {name: np.concatenate([half[step][name] for half in halves]) for name in whole[0]}
        for other in (later[step], joined, worked[step]):
            assert whole[2 + step].keys() == other.keys()
            assert all(np.array_equal(whole[2 + step][name], other[name]) for name in other)


def test_further_views_differ_and_leave_the_image_as_it_is():
    (plain,), (more,) = take(config(), 0, 1), take(config(views=FURTHER), 0, 1)
    assert {name: more[name].shape for name in ("view", "other")} == {"view": (8, 24, 24, 3), "other": (8, 16, 16, 3)}
    assert all(np.array_equal(plain[name], more[name]) for name in plain)
    twins = tuple(ViewConfig(name=name, image_size=32, flip=True) for name in "ab")
    (batch,) = take(config(views=twins), 0, 1)
    assert len({batch[name].tobytes() for name in ("image", "a", "b")}) == 3


def test_a_config_without_the_new_fields_is_saved_as_before():
    assert to_dict(config()).keys() == {
        *("image_size", "batch_size", "sources", "seed", "shuffle", "random_crop", "flip", "num_workers")
    }
    full = config(views=FURTHER, resize="simd")
    assert build(DataConfig, to_dict(full)) == full


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": (RESIZED, RESIZED)}, "views are named .*: each name once"),
        ({"views": (dataclasses.replace(RESIZED, name="label"),)}, "none of image, label, example, skipped"),
        (
            {"resized_crop": {"area": [0.0, 1.0]}},
            r"resized_crop.*area is \(0.0, 1.0\), allowed are 0 < low <= high <= 1",
        ),
        ({"resized_crop": {"ratio": [2.0, 1.0]}}, r"ratio is \(2.0, 1.0\), allowed are 0 < low <= high"),
        ({"resized_crop": {}, "random_crop": False}, "resized_crop is set, but random_crop is False"),
        ({"resized_crop": {}, "sources": [{"kind": "photos", "crop_scale": [0.5, 1.0]}]}, "and so is crop_scale"),
        ({"views": [{"name": "v", "image_size": 0}]}, "image_size is 0"),
        ({"resize": "lanczos"}, "'pillow', 'simd'|pillow.*simd"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        build(DataConfig, to_dict(config()) | {name: to_dict(value) for name, value in changes.items()})


def test_a_resizer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"resize='simd' needs cykooz-resizer; run: pip install '.*\[simd\]'"):
        make_batches(config(resize="simd"), 0)


def test_both_resizers_round_the_same_result():
    """Where nothing is clipped between their two passes, which they do in another order."""
    pytest.importorskip("cykooz_resizer")
    picture = np.random.default_rng(0).integers(80, 176, (90, 160, 3), np.uint8)
    for view in (RESIZED, *FURTHER, dataclasses.replace(RESIZED, image_size=200)):
        for seed in range(8):
            pillow, simd = (
                take_view(picture, view, np.random.default_rng(seed), resizer=resizer).astype(int)
                for resizer in ("pillow", "simd")
            )
            error = np.abs(pillow - simd)
            assert 0 < error.max() <= 3 and error.mean() < 0.4
