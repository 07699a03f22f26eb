"""Sixteen flat drawings by Pillow, to learn concepts from pictures that mini_scenes did not draw.

python benchmarks/drawings.py --out runs/drawings
tokenverse bench --config tokenverse_bench:drawings --workdir runs/bench_drawings

Each is 512 pixels wide and has two objects, left and right, before a background of one even colour or of two: with dark
outlines, thin outlines or none, plain, striped, dotted, checkered or in zigzag. Beside NAME.png, NAME.json says what is
in it, as a scene of mini_scenes; no line here is shared with mini_scenes' own renderer.
"""

import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 512
COLORS = {
    "red": (217, 33, 45),
    "orange": (250, 128, 26),
    "yellow": (250, 208, 52),
    "green": (52, 160, 78),
    "teal": (42, 178, 182),
    "blue": (42, 92, 218),
    "purple": (128, 66, 172),
    "pink": (250, 140, 184),
    "brown": (104, 64, 38),
    "white": (246, 246, 244),
}
# Above the horizon and below it; None: no ground.
PLACES = {
    "beach": ((150, 205, 238), (236, 214, 164)),
    "snow": ((168, 190, 216), (240, 244, 248)),
    "grass": ((158, 206, 240), (104, 158, 84)),
    "night": ((28, 34, 74), (46, 50, 78)),
    "floor": ((218, 208, 198), (164, 118, 78)),
    "wall": ((206, 190, 176), None),
}
INK, PAPER = (22, 22, 26), (250, 248, 240)
LIGHT = {"azimuth": 90.0, "elevation": 45.0, "warmth": 0.0}
# Of each drawing: place, horizon, width of the outline in pixels, and two objects: shape, colour, texture, the colour
# of the pattern, rotation, radius in pixels. Neighbouring drawings differ in all shapes and colours.
DRAWINGS = (
    ("beach", 0.50, 10, ("circle", "green", "striped", INK, 0, 100), ("square", "red", "dotted", PAPER, 0, 104)),
    ("snow", 0.48, 10, ("star", "purple", "plain", INK, 0, 112), ("ring", "orange", "plain", INK, 0, 108)),
    ("grass", 0.45, 6, ("heart", "pink", "plain", INK, 0, 104), ("triangle", "blue", "checkered", PAPER, 0, 112)),
    ("night", 0.52, 8, ("drop", "yellow", "striped", INK, 0, 112), ("cross", "teal", "plain", INK, 0, 104)),
    ("wall", 0.48, 12, ("arrow", "red", "plain", INK, 48, 112), ("hexagon", "white", "dotted", INK, 0, 104)),
    ("floor", 0.50, 8, ("crescent", "blue", "plain", INK, 0, 104), ("flower", "yellow", "plain", INK, 0, 112)),
    ("beach", 0.44, 0, ("square", "purple", "zigzag", PAPER, 0, 104), ("star", "green", "plain", INK, 0, 112)),
    ("grass", 0.50, 0, ("circle", "orange", "checkered", INK, 0, 100), ("heart", "white", "plain", INK, 0, 104)),
    ("snow", 0.52, 8, ("triangle", "brown", "plain", INK, 0, 112), ("drop", "teal", "dotted", INK, 180, 108)),
    ("wall", 0.48, 10, ("ring", "blue", "striped", PAPER, 0, 108), ("arrow", "orange", "plain", INK, -48, 112)),
    ("night", 0.46, 6, ("hexagon", "pink", "zigzag", INK, 0, 104), ("crescent", "yellow", "plain", INK, 0, 104)),
    ("floor", 0.48, 10, ("cross", "green", "dotted", PAPER, 0, 104), ("circle", "purple", "plain", INK, 0, 100)),
    ("snow", 0.45, 0, ("flower", "red", "plain", INK, 0, 112), ("square", "teal", "striped", INK, 0, 104)),
    ("beach", 0.50, 12, ("heart", "brown", "dotted", PAPER, 0, 104), ("hexagon", "blue", "plain", INK, 0, 104)),
    ("grass", 0.50, 8, ("arrow", "yellow", "checkered", INK, 180, 112), ("ring", "white", "plain", INK, 0, 108)),
    ("wall", 0.50, 6, ("star", "orange", "striped", INK, 0, 112), ("drop", "purple", "plain", INK, 48, 108)),
)
CENTRES = ((0.26, 0.62), (0.74, 0.62))  # shares of the side


def _polygon(points: list[tuple[float, float]]) -> Image.Image:
    """A filled polygon around the middle, in units of half the side."""
    mask = Image.new("L", (SIDE, SIDE))
    middle = SIDE / 2
    ImageDraw.Draw(mask).polygon([(middle + middle * x, middle + middle * y) for x, y in points], fill=255)
    return mask


def _disc(radius: float, x: float = 0.0, y: float = 0.0) -> Image.Image:
    turns = [2 * math.pi * i / 180 for i in range(180)]
    return _polygon([(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns])


def _spikes(count: int, inner: float) -> Image.Image:
    """A star whose notches lie at the radius `inner`; with cos(pi / count) a regular polygon."""
    turns = [math.pi * i / count for i in range(2 * count)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * count)]
    return _polygon([(r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)])


def _heart() -> Image.Image:
    turns = [2 * math.pi * i / 180 for i in range(180)]
    x = [math.sin(turn) ** 3 for turn in turns]
    y = [(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 for t in turns]
    return _polygon([(0.92 * a, -0.92 * b - 0.1) for a, b in zip(x, y, strict=True)])


def _outline(shape: str) -> Image.Image:
    """What a shape covers, upright, with a radius of half the side."""
    bars = [[(-0.3, -0.9), (0.3, -0.9), (0.3, 0.9), (-0.3, 0.9)], [(-0.9, -0.3), (0.9, -0.3), (0.9, 0.3), (-0.9, 0.3)]]
    head, shaft = (
        [(0.0, -0.98), (0.8, -0.05), (-0.8, -0.05)],
        [(-0.28, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95)],
    )
    turns = [math.pi * i / 3 for i in range(6)]
    petals = [_disc(0.38, 0.58 * math.cos(turn), 0.58 * math.sin(turn)) for turn in turns]
    makers = {
        "circle": lambda: _disc(0.92),
        "square": lambda: _polygon([(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)]),
        "triangle": lambda: _spikes(3, math.cos(math.pi / 3)),
        "star": lambda: _spikes(5, 0.45),
        "heart": _heart,
        "ring": lambda: ImageChops.subtract(_disc(0.92), _disc(0.42)),
        "cross": lambda: _union(*map(_polygon, bars)),
        "crescent": lambda: ImageChops.subtract(_disc(0.92), _disc(0.76, 0.42)),
        "hexagon": lambda: _spikes(6, math.cos(math.pi / 6)),
        "arrow": lambda: _union(_polygon(head), _polygon(shaft)),
        "drop": lambda: _union(_disc(0.6, 0.0, 0.32), _polygon([(0.0, -0.98), (0.56, 0.1), (-0.56, 0.1)])),
        "flower": lambda: _union(_disc(0.5), *petals),
    }
    return makers[shape]()


def _union(first: Image.Image, *others: Image.Image) -> Image.Image:
    for other in others:
        first = ImageChops.lighter(first, other)
    return first


def _painted(texture: str, color: tuple[int, int, int], second: tuple[int, int, int]) -> Image.Image:
    """A square of the pattern, whose period is a fifth of the side."""
    image = Image.new("RGB", (SIDE, SIDE), color)
    pen, period = ImageDraw.Draw(image), SIDE / 5
    for i in range(-6, 12):
        at = i * period
        if texture == "striped":
            start = math.sqrt(2) * at  # of a diagonal
            pen.line([(start, -10), (start + SIDE + 20, SIDE + 10)], fill=second, width=round(0.32 * period))
        elif texture == "zigzag":
            points = [(j * period / 2, at + (period / 2) * (j % 2)) for j in range(-1, 13)]
            pen.line(points, fill=second, width=round(0.34 * period))
        elif texture in ("dotted", "checkered"):
            for j in range(7):
                if texture == "dotted":
                    x, y, r = j * period + period / 2 * (i % 2), at, 0.27 * period
                    pen.ellipse([(x - r, y - r), (x + r, y + r)], fill=second)
                elif (i + j) % 2:
                    pen.rectangle([(j * period, at), ((j + 1) * period, at + period)], fill=second)
    return image


def draw(place: str, horizon: float, line: int, *objects: tuple) -> Image.Image:
    """A drawing."""
    sky, ground = PLACES[place]
    image = Image.new("RGB", (SIDE, SIDE), sky)
    if ground is not None:
        ImageDraw.Draw(image).rectangle([(0, horizon * SIDE), (SIDE, SIDE)], fill=ground)
    for (shape, color, texture, second, rotation, radius), (x, y) in zip(objects, CENTRES, strict=True):
        corner = round(x * SIDE - radius), round(y * SIDE - radius)
        turned = [_outline(shape), _painted(texture, COLORS[color], second)]
        turned = [part.rotate(-rotation, Image.Resampling.BICUBIC) for part in turned]
        cover, body = (part.resize((2 * radius, 2 * radius), Image.Resampling.LANCZOS) for part in turned)
        whole = Image.new("L", (SIDE, SIDE))
        whole.paste(cover, corner)
        if line:
            image.paste(INK, mask=whole.filter(ImageFilter.MaxFilter(2 * (line // 2) + 1)))
            whole = whole.filter(ImageFilter.MinFilter(2 * (line // 2) + 1))
        filled = Image.new("RGB", (SIDE, SIDE))
        filled.paste(body, corner)
        image.paste(filled, mask=whole)
    return image


def scene(place: str, horizon: float, line: int, *objects: tuple) -> dict:
    """What is in a drawing, in the form of mini_scenes' JSON."""
    items = [
        {
            "shape": shape,
            "color": color,
            "rgb": COLORS[color],
            "texture": texture,
            "accent": second,
            "size": radius / SIDE,
            "x": x,
            "y": y,
            "rotation": float(rotation),
        }
        for (shape, color, texture, second, rotation, radius), (x, y) in zip(objects, CENTRES, strict=True)
    ]
    return {
        "objects": items,
        "light": LIGHT,
        "background": {"kind": place, "horizon": horizon, "tone": 0.5, "seed": 0},
        "style": {"shading": False, "outline": line / 100, "plain": True},
    }


def main() -> None:
    """Writes all drawings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/drawings"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for number, drawing in enumerate(DRAWINGS):
        draw(*drawing).save(out / f"{number:02}.png")
        (out / f"{number:02}.json").write_text(json.dumps(scene(*drawing)) + "\n")
    print(f"{len(DRAWINGS)} drawings and their scenes are in {out}")


if __name__ == "__main__":
    main()
