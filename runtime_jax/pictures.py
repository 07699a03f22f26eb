"""Pictures for people: labelled image grids, heat maps, merged groups drawn on an image, loss curves."""

import contextlib
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from runtime_jax.files import path_of, replacing

Picture = UInt8[np.ndarray, "height width 3"]
Drawing = UInt8[np.ndarray, "new_height new_width 3"]

BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)
PADDING = 4  # pixels around each cell of a grid


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes a uint8 [H, W, 3] picture; a reader sees the old file or the whole new one."""
    with replacing(path) as new:
        Image.fromarray(_checked(image)).save(new, format="PNG")


def jpeg(image: np.ndarray) -> bytes:
    """A uint8 [H, W, 3] picture as a JPEG of quality 95 with full colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(_checked(image)).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


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
    font_size: int = 14,
) -> Drawing:
    """Lays out pictures in rows, with labels to the left and above and captions below each.

    Args:
      rows: uint8 [H, W, 3] pictures of any sizes; None leaves a cell empty. A cell is as large as the largest picture.
      row_labels, column_labels: one text for each row or column, or none at all; "\\n" breaks a line.
      captions: rows of texts as in `rows`, or none; long ones are broken at the width of a cell.
      scale: whole-number enlargement without smoothing, so that pixels stay visible.
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
    left = max((_extent(font, text)[0] + 2 * PADDING for text in row_labels), default=0)
    top = max((_extent(font, text)[1] + 2 * PADDING for text in column_labels), default=0)
    inner = max([cell.shape[1] for cell in pictures] + [_extent(font, text)[0] for text in column_labels])
    lines = [[_broken(font, text, inner) for text in row] for row in captions]
    below = max((_extent(font, text)[1] + PADDING for row in lines for text in row), default=0)
    width = inner + 2 * PADDING
    picture = max([cell.shape[0] for cell in pictures] + [_extent(font, text)[1] for text in row_labels])
    height = picture + below + 2 * PADDING
    canvas = Image.new("RGB", (left + columns * width, top + len(cells) * height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    def write(column: int, y: int, text: str) -> None:
        x = left + column * width + (width - _extent(font, text)[0]) // 2
        draw.multiline_text((x, y), text, fill=INK, font=font, align="center")

    for j, text in enumerate(column_labels):
        write(j, PADDING, text)
    for i, row in enumerate(cells):
        middle = top + i * height + PADDING + picture // 2
        if row_labels:
            y = middle - _extent(font, row_labels[i])[1] // 2
            draw.multiline_text((PADDING, y), row_labels[i], fill=INK, font=font)
        for j, cell in enumerate(row):
            if cell is not None:
                x, y = left + j * width + (width - cell.shape[1]) // 2, middle - cell.shape[0] // 2
                canvas.paste(Image.fromarray(cell), (x, y))
            if captions:
                write(j, top + i * height + 2 * PADDING + picture, lines[i][j])
    return np.array(canvas)


def _extent(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    """Width and height of a text in pixels."""
    _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(np.ceil(right)), int(np.ceil(bottom))


def _broken(font: ImageFont.FreeTypeFont, text: str, width: int) -> str:
    """A text with line breaks between words; no line exceeds `width` pixels unless a single word does."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _extent(font, longer)[0] > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def heat_map(values: Float[np.ndarray, "height width"], *, maximum: float) -> Picture:
    """From black for 0, over red and yellow, to white for `maximum` and above."""
    level = 3 * np.clip(np.asarray(values) / maximum, 0, 1)
    return np.round(255 * np.clip(level[..., None] - np.arange(3), 0, 1)).astype(np.uint8)


def outline_groups(
    image: Picture, source_map: Int[np.ndarray, "tokens"], *, grid: tuple[int, int], scale: int = 1
) -> Drawing:
    """Draws which raw tokens were merged: lines around the groups of several tokens.

    A line is one light and one dark pixel wide, so that it shows on any picture.

    Args:
      source_map: [L] group of each raw token in raster order.
      grid: rows and columns of raw tokens, h w = L.
      scale: whole-number enlargement before drawing.

    Raises:
      ValueError: L is not h w, or the picture's sides are not multiples of the grid's.
    """
    canvas = _enlarge(_checked(image), scale)
    _, groups, counts = np.unique(source_map, return_inverse=True, return_counts=True)
    group, merged = _per_pixel(groups, grid, canvas), _per_pixel(counts[groups] > 1, grid, canvas)
    light, dark = np.zeros_like(merged), np.zeros_like(merged)
    for axis in (0, 1):
        before, after = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
        edge = (group[before] != group[after]) & (merged[before] | merged[after])
        light[before] |= edge
        dark[after] |= edge
    canvas[dark] = INK
    canvas[light] = BACKGROUND
    return canvas


def dim_tokens(image: Picture, kept: Bool[np.ndarray, "tokens"], *, grid: tuple[int, int]) -> Picture:
    """A picture on which only the kept tokens stay bright; the others keep a fifth of their brightness.

    Args:
      kept: [L] whether each raw token is kept, in raster order.
      grid: rows and columns of raw tokens, h w = L.

    Raises:
      ValueError: L is not h w, or the picture's sides are not multiples of the grid's.
    """
    bright = _per_pixel(kept, grid, _checked(image))
    return np.where(bright[..., None], image, np.round(0.2 * image)).astype(np.uint8)


def _per_pixel(tokens: np.ndarray, grid: tuple[int, int], image: Picture) -> np.ndarray:
    """[height, width]: the value of the raw token that each pixel belongs to."""
    (h, w), (height, width) = grid, image.shape[:2]
    if h * w != tokens.size or height % h or width % w:
        raise ValueError(f"{tokens.size} tokens do not tile a {h} x {w} grid on a picture of {height} x {width} pixels")
    return tokens.reshape(grid).repeat(height // h, axis=0).repeat(width // w, axis=1)


def read_metrics(path: str | os.PathLike, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each name in a metrics.jsonl file (one object a line, with "step").

    Raises:
      ValueError: a name that no line has.
    """
    lines = [json.loads(line) for line in path_of(path).read_text().splitlines() if line.strip()]
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
      metrics: a metrics.jsonl file, whose `names` are drawn, or steps and values by name.

    Raises:
      ValueError: a name that the file does not have.
    """
    curves = metrics if isinstance(metrics, Mapping) else read_metrics(metrics, names)
    with _panels(path, curves, x_label="step") as panels:
        panels[0].figure.suptitle(title)
        for axes, (steps, values) in zip(panels, curves.values(), strict=True):
            window = max(len(values) // 50, 1)
            axes.plot(steps, values, color="tab:blue", alpha=0.3 if window > 1 else 1.0, linewidth=1)
            if window > 1:
                smooth = np.convolve(values, np.ones(window) / window, mode="valid")
                axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.8)


class Points(NamedTuple):
    """A line of a plot; the `half_widths` of its intervals are NaN where unknown."""

    x: Sequence[float]
    y: Sequence[float]
    half_widths: Sequence[float]


def plot_lines(panels: Mapping[str, Mapping[str, Points]], path: str | os.PathLike, *, x_label: str) -> None:
    """Draws lines with intervals as a PNG: one panel per quantity, one line per name."""
    with _panels(path, panels, x_label=x_label) as all_axes:
        for axes, lines in zip(all_axes, panels.values(), strict=True):
            for name, (x, y, half_widths) in lines.items():
                axes.errorbar(x, y, np.nan_to_num(half_widths), marker="o", capsize=3, label=name)
        all_axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def plot_intervals(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], path: str | os.PathLike, *, x_label: str = ""
) -> None:
    """Draws means and half-widths of their intervals as a PNG: one panel per quantity, one row per name.

    A line at 0 shows which intervals hold it. A name may be missing in some of the panels.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    figure = Figure(figsize=(3.2 + 2.1 * len(panels), 1.0 + 0.34 * len(names)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (quantity, rows) in zip(all_axes, panels.items(), strict=True):
        places = [names.index(name) for name in rows]
        means, half_widths = zip(*rows.values(), strict=True)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.errorbar(means, places, xerr=half_widths, fmt="o", capsize=3)
        axes.set_title(quantity, fontsize=9)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)


@contextlib.contextmanager
def _panels(path: str | os.PathLike, names: Collection[str], *, x_label: str) -> Iterator[np.ndarray]:
    """Axes one above the other, labelled with `names`; when the block ends, the figure is written as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no global figures, no display

    figure = Figure(figsize=(7, 3 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(x_label)
    yield panels
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=120)
