"""Grids, labels, group outlines and curves, by their pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from runtime_jax import pictures
from runtime_jax.pictures import (
    Points,
    heat_map,
    image_grid,
    loss_curve,
    outline_groups,
    plot_lines,
    read_metrics,
    save_png,
)

GREY = np.full((8, 8, 3), 128, np.uint8)


def solid(height, width, value):
    return np.full((height, width, 3), value, np.uint8)


def test_grid_places_every_picture():
    grid = image_grid([[solid(2, 3, 10), None], [solid(1, 3, 20), solid(2, 3, 30)]], scale=2)
    assert grid.shape == (2 * 12, 2 * 14, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[4:8, 4:10], solid(4, 6, 10))
    np.testing.assert_array_equal(grid[17:19, 4:10], solid(2, 6, 20))  # centred in its cell
    np.testing.assert_array_equal(grid[16:20, 18:24], solid(4, 6, 30))
    assert np.all(grid[:12, 14:] == 255)
    assert np.sum(grid != 255) == 3 * (24 + 12 + 24)


def test_grid_labels_are_drawn_beside_the_pictures():
    rows = [[GREY, GREY], [GREY, GREY]]
    plain = image_grid(rows)
    labelled = image_grid(
        rows, row_labels=["a photograph", "b\nheld out"], column_labels=["original", "K=36"], font_size=14
    )
    assert labelled.shape[0] > plain.shape[0] and labelled.shape[1] > plain.shape[1] + 60
    heading, margin = labelled[:16], labelled[20:, :60]
    for area in (heading, margin):
        assert area.min() < 60  # ink
    other = image_grid(
        rows, row_labels=["a photograph", "b\nheld out"], column_labels=["original", "K=64"], font_size=14
    )
    assert other.shape == labelled.shape and np.any(other != labelled)
    # Labels never cover a picture.
    assert np.sum(np.all(labelled == 128, axis=-1)) >= 4 * 64


def test_captions_are_below_their_pictures_and_broken_at_their_width():
    rows = [[solid(64, 64, 128), solid(32, 64, 128)]]
    plain = image_grid(rows)
    captioned = image_grid(rows, captions=[["dog", "a dog beside a green cat"]])
    assert captioned.shape[1] == plain.shape[1]
    np.testing.assert_array_equal(captioned[: len(plain)], plain)
    text = captioned[len(plain) :]
    left, right = text[:, :72], text[:, 72:]
    assert left.min() < 60 and right.min() < 60
    assert left[20:].min() == 255 and right[20:].min() < 60  # one line, several lines


def test_heat_map_goes_from_black_to_white():
    drawn = heat_map(np.array([[0.0, 1.0, 2.0, 3.0, 9.0]]), maximum=3.0)
    assert drawn[0].tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255], [255, 255, 255]]


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([[None]], {}, "no picture"),
        ([[GREY]], {"row_labels": ["a", "b"]}, "2 row labels for 1 rows"),
        ([[GREY, GREY]], {"column_labels": ["a"]}, "1 column labels for 2 columns"),
        ([[GREY, GREY]], {"captions": [["a"]]}, r"rows of \[1\] captions for \[2\] pictures"),
        ([[GREY.astype(np.float32)]], {}, r"uint8 \[H, W, 3\], got float32"),
        ([[GREY[..., 0]]], {}, r"got uint8 \[8, 8\]"),
    ],
)
def test_bad_grids_are_refused(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        image_grid(rows, **labels)


def changed(picture, base):
    return np.any(picture != base, axis=-1)


def test_outline_is_drawn_between_groups_only():
    # Left half one group, right half four single tokens.
    groups = np.array([0, 0, 1, 2, 0, 0, 3, 4, 0, 0, 5, 6, 0, 0, 7, 8])
    picture = outline_groups(GREY, groups, grid=(4, 4))
    drawn = changed(picture, GREY)
    assert np.all(drawn[:, 3:5]) and not np.any(drawn[:, :3]) and not np.any(drawn[:, 5:])
    assert picture[0, 3].min() > 200 and picture[0, 4].max() < 60
    assert np.all(GREY == 128)  # the input is left alone


def test_outline_without_merges_or_with_one_group_is_the_image():
    np.testing.assert_array_equal(outline_groups(GREY, np.arange(16), grid=(4, 4)), GREY)
    one = outline_groups(GREY, np.zeros(16, int), grid=(4, 4), scale=2)
    np.testing.assert_array_equal(one, solid(16, 16, 128))


def test_outline_on_a_grid_that_is_not_square():
    image = solid(4, 12, 128)
    drawn = changed(outline_groups(image, np.array([0, 0, 1, 0, 0, 1]), grid=(2, 3), scale=2), solid(8, 24, 128))
    assert drawn.shape == (8, 24) and np.all(drawn[:, 15:17]) and np.sum(drawn) == 16


def test_outline_of_another_size_is_refused():
    with pytest.raises(ValueError, match="15 tokens do not tile"):
        outline_groups(GREY, np.arange(15), grid=(4, 4))
    with pytest.raises(ValueError, match="9 tokens do not tile a 3 x 3 grid on a picture of 8 x 8"):
        outline_groups(GREY, np.arange(9), grid=(3, 3))


def test_save_png_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "picture.png"
    save_png(path, GREY)
    np.testing.assert_array_equal(np.array(Image.open(path)), GREY)

    def interrupted(self, target, **kwargs):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, solid(2, 2, 0))
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    monkeypatch.undo()
    np.testing.assert_array_equal(np.array(Image.open(path)), GREY)
    with pytest.raises(ValueError, match="uint8"):
        save_png(path, GREY / 255)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 1 / s} | ({"psnr": 20.0 + s} if s % 10 == 0 else {}) for s in range(1, 201)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_metrics_are_read_by_name(metrics):
    curves = read_metrics(metrics, ["loss", "psnr"])
    assert len(curves["loss"][0]) == 200 and len(curves["psnr"][0]) == 20
    assert (curves["psnr"][0][0], curves["psnr"][1][0]) == (10, 30.0)
    with pytest.raises(ValueError, match="no line has 'los'; there are loss, psnr"):
        read_metrics(metrics, ["los"])


def test_loss_curve_draws_a_picture(metrics, tmp_path):
    loss_curve(metrics, tmp_path / "loss.png", names=("loss", "psnr"), title="tiny")
    both = np.array(Image.open(tmp_path / "loss.png").convert("RGB"))
    loss_curve({"loss": (np.arange(3), np.array([3.0, 2.0, 1.0]))}, tmp_path / "one.png")
    one = np.array(Image.open(tmp_path / "one.png").convert("RGB"))
    assert both.shape[0] == 2 * one.shape[0] and both.shape[1] == one.shape[1]
    blue = (one[..., 2] > 150) & (one[..., 0] < 80)
    rows, columns = np.nonzero(blue)
    assert np.corrcoef(rows, columns)[0, 1] > 0.95  # the values fall: further right is further down


def test_module_does_not_load_matplotlib():
    assert not hasattr(pictures, "matplotlib")


def test_lines_with_intervals_are_drawn(tmp_path):
    lines = {"full": Points([1, 2], [3.0, 4.0], [0.5, np.nan]), "evict": Points([1, 3], [5.0, 2.0], [0.1, 0.2])}
    plot_lines({"distance": lines, "accuracy": lines}, tmp_path / "plot.png", x_label="slots")
    picture = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    assert picture.shape[0] > picture.shape[1] * 0.8 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
