"""Pictures that people look at: labelled image grids, heat maps, merged groups drawn on an image, loss curves."""

import colorsys
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from runtime_jax.files import replacing

Picture = UInt8[np.ndarray, "height width 3"]
Drawing = UInt8[np.ndarray, "new_height new_width 3"]

BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes a uint8 [H, W, 3] picture; a reader sees the old file or the whole new one."""
    with replacing(path) as new:
        Image.fromarray(_checked(image)).save(new, format="PNG")


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    return np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)


def image_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    scale: int = 1,
    padding: int = 4,
    font_size: int = 14,
) -> Drawing:
    """Lays out pictures in rows, with labels to the left and above and captions below each.

    Args:
      rows: uint8 [H, W, 3] pictures of any sizes; None leaves a cell empty. A cell is as large as the largest picture.
      row_labels, column_labels: one text for each row or column, or none at all; "\\n" breaks a line.
      captions: rows of texts as in `rows`, or none; long ones are broken at the width of a cell.
      scale: whole-number enlargement without smoothing, so that pixels stay visible.
      padding: pixels around each cell.
      font_size: of the labels and captions, in pixels.

    Raises:
      ValueError: nothing to draw, a picture of another type, or another number of labels or captions than rows,
        columns or pictures.
    """
    cells = [[None if image is None else _enlarge(_checked(image), scale) for image in row] for row in rows]
    pictures = [cell for row in cells for cell in row if cell is not None]
    if not pictures:
        raise ValueError("image_grid: there is no picture to draw")
    columns = max(len(row) for row in cells)
    for what, labels, count in (("row", row_labels, len(cells)), ("column", column_labels, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"image_grid: {len(labels)} {what} labels for {count} {what}s")
    if captions and list(map(len, captions)) != list(map(len, rows)):
        raise ValueError(f"image_grid: rows of {list(map(len, captions))} captions for {list(map(len, rows))} pictures")
    font = ImageFont.load_default(font_size)
    left = max((_extent(font, text)[0] + 2 * padding for text in row_labels), default=0)
    top = max((_extent(font, text)[1] + 2 * padding for text in column_labels), default=0)
    inner = max([cell.shape[1] for cell in pictures] + [_extent(font, text)[0] for text in column_labels])
    lines = [[_broken(font, text, inner) for text in row] for row in captions]
    below = max((_extent(font, text)[1] + padding for row in lines for text in row), default=0)
    width = inner + 2 * padding
    picture = max([cell.shape[0] for cell in pictures] + [_extent(font, text)[1] for text in row_labels])
    height = picture + below + 2 * padding
    canvas = Image.new("RGB", (left + columns * width, top + len(cells) * height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    def write(column: int, y: int, text: str) -> None:
        place = (left + column * width + (width - _extent(font, text)[0]) // 2, y)
        draw.multiline_text(place, text, fill=INK, font=font, align="center")

    for j, text in enumerate(column_labels):
        write(j, padding, text)
    for i, row in enumerate(cells):
        middle = top + i * height + padding + picture // 2
        if row_labels:
            place = (padding, middle - _extent(font, row_labels[i])[1] // 2)
            draw.multiline_text(place, row_labels[i], fill=INK, font=font)
        for j, cell in enumerate(row):
            if cell is not None:
                x, y = left + j * width + (width - cell.shape[1]) // 2, middle - cell.shape[0] // 2
                canvas.paste(Image.fromarray(cell), (x, y))
            if captions:
                write(j, top + i * height + 2 * padding + picture, lines[i][j])
    return np.array(canvas)


def _extent(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    """Width and height of a text in pixels."""
    _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(np.ceil(right)), int(np.ceil(bottom))


def _broken(font: ImageFont.FreeTypeFont, text: str, width: int) -> str:
    """A text with line breaks between words, so that it fits into `width` pixels if its words do."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _extent(font, longer)[0] > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def heat_map(values: Float[np.ndarray, "height width"], *, maximum: float) -> Picture:
    """Black for 0 over red and yellow to white for `maximum` and more."""
    level = 3 * np.clip(np.asarray(values) / maximum, 0, 1)
    return np.round(255 * np.clip(level[..., None] - np.arange(3), 0, 1)).astype(np.uint8)


def outline_groups(
    image: Picture,
    source_map: Int[np.ndarray, "tokens"],
    *,
    grid: tuple[int, int] | None = None,
    scale: int = 1,
    tint: float = 0.0,
    singles: bool = False,
) -> Drawing:
    """Draws which raw tokens were merged: a line wherever neighbouring tokens belong to different groups.

    The line is one light and one dark pixel wide, so that it shows on any picture.

    Args:
      source_map: [L] group of each raw token in raster order.
      grid: rows and columns of raw tokens, h w = L; by default square.
      scale: whole-number enlargement before drawing.
      tint: 0 to 1, how much of its own colour each group of several tokens is given; the parts of a group that do not
        touch are recognised by it.
      singles: also draw the lines between tokens that were not merged with any other.

    Raises:
      ValueError: L is not h w, or the picture's sides are not multiples of the grid's.
    """
    source_map = np.asarray(source_map)
    side = round(source_map.size**0.5)
    h, w = grid or (side, side)
    canvas = _enlarge(_checked(image), scale)
    if h * w != source_map.size or canvas.shape[0] % h or canvas.shape[1] % w:
        raise ValueError(
            f"outline_groups: {source_map.size} tokens do not tile a {h} x {w} grid on a picture of "
            f"{canvas.shape[0]} x {canvas.shape[1]} pixels"
        )
    _, groups, counts = np.unique(source_map, return_inverse=True, return_counts=True)

    def per_pixel(tokens: np.ndarray) -> np.ndarray:
        rows = np.repeat(tokens.reshape(h, w), canvas.shape[0] // h, axis=0)
        return np.repeat(rows, canvas.shape[1] // w, axis=1)

    group, merged = per_pixel(groups), per_pixel(counts[groups] > 1)
    if tint:
        tinted = np.round((1 - tint) * canvas + tint * _palette(len(counts))[group]).astype(np.uint8)
        canvas = np.where(merged[..., None], tinted, canvas)
    drawn = np.ones_like(merged) if singles else merged
    light, dark = np.zeros_like(merged), np.zeros_like(merged)
    for axis in (0, 1):
        before, after = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
        edge = (group[before] != group[after]) & (drawn[before] | drawn[after])
        light[before] |= edge
        dark[after] |= edge
    canvas[dark] = INK
    canvas[light] = BACKGROUND
    return canvas


def dim_tokens(
    image: Picture, kept: Bool[np.ndarray, "tokens"], *, grid: tuple[int, int], light: float = 0.2
) -> Picture:
    """A picture on which only the kept tokens stay bright.

    Args:
      kept: [L] whether each raw token is kept, in raster order.
      grid: rows and columns of raw tokens, h w = L.
      light: 0 to 1, brightness that the others are left with.

    Raises:
      ValueError: L is not h w, or the picture's sides are not multiples of the grid's.
    """
    image, kept = _checked(image), np.asarray(kept)
    if kept.size != grid[0] * grid[1] or image.shape[0] % grid[0] or image.shape[1] % grid[1]:
        raise ValueError(
            f"dim_tokens: {kept.size} tokens do not tile a {grid[0]} x {grid[1]} grid on a picture of "
            f"{image.shape[0]} x {image.shape[1]} pixels"
        )
    cell = image.shape[0] // grid[0], image.shape[1] // grid[1]
    bright = np.kron(kept.reshape(grid), np.ones(cell, bool))
    return np.where(bright[..., None], image, np.round(light * image)).astype(np.uint8)


def _palette(count: int) -> np.ndarray:
    """Colours [count, 3]; hues step by the golden ratio, so that near numbers get far colours."""
    hues = (np.arange(count) * 0.618034) % 1.0
    return np.array([colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues]) * 255.0


def read_metrics(path: str | os.PathLike, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each name in a metrics.jsonl file (one object a line, with "step").

    Raises:
      ValueError: a name that no line has.
    """
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    curves = {}
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if not points:
            known = sorted({key for line in lines for key in line} - {"step"})
            raise ValueError(f"{path}: no line has {name!r}; there are {', '.join(known) or 'no metrics'}")
        steps, values = zip(*points, strict=True)
        curves[name] = (np.array(steps), np.array(values, dtype=float))
    return curves


def loss_curve(
    metrics: str | os.PathLike | Mapping[str, tuple[np.ndarray, np.ndarray]],
    path: str | os.PathLike,
    *,
    names: Sequence[str] = ("loss",),
    title: str = "",
) -> None:
    """Draws metrics over steps as a PNG: the values pale, their running mean over 2 % of the run on top.

    Args:
      metrics: a metrics.jsonl file, of which `names` are drawn, or steps and values under each name.
      path: where the PNG goes.

    Raises:
      ValueError: a name that the file does not have.
    """
    curves = metrics if isinstance(metrics, Mapping) else read_metrics(metrics, names)
    figure, panels = _panels(len(curves))
    for axes, (name, (steps, values)) in zip(panels, curves.items(), strict=True):
        window = max(len(values) // 50, 1)
        axes.plot(steps, values, color="tab:blue", alpha=0.3 if window > 1 else 1.0, linewidth=1)
        if window > 1:
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.8)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    figure.suptitle(title)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


class Points(NamedTuple):
    """A line of a plot; `half_widths` of intervals, NaN where they are not known."""

    x: Sequence[float]
    y: Sequence[float]
    half_widths: Sequence[float]


def plot_lines(panels: Mapping[str, Mapping[str, Points]], path: str | os.PathLike, *, x_label: str) -> None:
    """Draws lines with intervals as a PNG: a panel for each quantity, in it a line for each name."""
    figure, all_axes = _panels(len(panels))
    for axes, (quantity, lines) in zip(all_axes, panels.items(), strict=True):
        for name, (x, y, half_widths) in lines.items():
            axes.errorbar(x, y, np.nan_to_num(half_widths), marker="o", capsize=3, label=name)
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
    all_axes[0].legend()
    all_axes[-1].set_xlabel(x_label)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


def _panels(count: int) -> tuple[Any, np.ndarray]:
    """A figure of panels one above the other, and their axes."""
    # Without pyplot: no global figures, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3 * count), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
