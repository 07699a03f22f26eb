"""A scene as plain data, random sampling of scenes, and lossless JSON."""

import colorsys
import dataclasses
import json

import numpy as np

from mini_scenes import vocabulary as words
from mini_scenes.style import SHADED, Style, sample_style

MAX_OBJECTS = 3
RGB = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object. Lengths are shares of the image side, angles degrees clockwise from upright, colours 8-bit sRGB."""

    shape: str
    color: str
    rgb: RGB
    texture: str
    accent: RGB
    size: float
    x: float
    y: float
    rotation: float

    @property
    def size_name(self) -> str:
        """ "small", "medium" or "big"."""
        if self.size < words.SMALL_BELOW:
            return "small"
        return "big" if self.size > words.BIG_ABOVE else "medium"

    @property
    def pose(self) -> str | None:
        """The nearest named pose; None for a shape with rotational symmetry."""
        if words.SYMMETRY[self.shape] != 1:
            return None
        return min(words.POSES, key=lambda name: abs((self.rotation - words.POSES[name][0] + 180) % 360 - 180))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Light:
    """azimuth: degrees counter-clockwise from the right; elevation: degrees out of the image plane; warmth: [-1, 1]."""

    azimuth: float
    elevation: float
    warmth: float

    @property
    def direction_name(self) -> str:
        """ "left", "right" or "above"."""
        return min(words.LIGHT_DIRECTIONS, key=lambda name: abs(2 * self.azimuth - sum(words.LIGHT_DIRECTIONS[name])))

    @property
    def warmth_name(self) -> str:
        """ "cool", "neutral" or "warm"."""
        return "neutral" if abs(self.warmth) < 0.375 else ("warm" if self.warmth > 0 else "cool")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """kind: a key of BACKGROUNDS; horizon: its distance from the top; tone (in [0, 1]) and seed vary the details."""

    kind: str
    horizon: float
    tone: float
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """objects[0] is the main object: the largest, and the one that sets the label. Object i is i + 1 in the mask."""

    objects: tuple[SceneObject, ...]
    light: Light
    background: Background
    style: Style = SHADED

    @property
    def label(self) -> int:
        """Index of the main object's class in CLASSES."""
        return words.CLASSES.index(self.objects[0].shape)

    def with_object(self, index: int, **changes) -> "Scene":
        """A copy with attributes of one object replaced. With a new rgb, also replace the accent: see `accent_of`."""
        objects = list(self.objects)
        objects[index] = dataclasses.replace(objects[index], **changes)
        return dataclasses.replace(self, objects=tuple(objects))

    def to_json(self) -> str:
        """One line of lossless JSON: `from_json(scene.to_json()) == scene`."""
        fields = {name: value for name, value in vars(self).items() if name != "style" or value != SHADED}
        return json.dumps(fields, default=vars, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """The inverse of `to_json`."""
        data = json.loads(text)
        objects = tuple(
            SceneObject(**{**item, "rgb": tuple(item["rgb"]), "accent": tuple(item["accent"])})
            for item in data["objects"]
        )
        style = Style(**data.get("style", {}))
        light, background = Light(**data["light"]), Background(**data["background"])
        return cls(objects=objects, light=light, background=background, style=style)


def sample_color(rng: np.random.Generator, name: str) -> RGB:
    """A colour drawn uniformly from the HSV box of `name`."""
    box = words.COLORS[name]
    hue, saturation, value = (rng.uniform(*limits) for limits in box)
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def accent_of(rgb: RGB) -> RGB:
    """The second colour of a texture: a dark shade of a light colour, a pale tint of a dark one."""
    luminance = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    if luminance > 150:
        return tuple(round(0.42 * channel) for channel in rgb)
    return tuple(round(0.25 * channel + 0.75 * tint) for channel, tint in zip(rgb, (255, 248, 232), strict=True))


def sample_scene(rng: np.random.Generator) -> Scene:
    """One to three objects of different classes and colours, with little overlap, on a random background."""
    kind = _pick(rng, tuple(words.BACKGROUNDS))
    background = Background(
        kind=kind, horizon=rng.uniform(0.4, 0.56), tone=rng.uniform(), seed=int(rng.integers(2**31))
    )
    direction = words.LIGHT_DIRECTIONS[_pick(rng, tuple(words.LIGHT_DIRECTIONS))]
    warmth = words.LIGHT_WARMTHS[_pick(rng, tuple(words.LIGHT_WARMTHS))]
    light = Light(azimuth=rng.uniform(*direction), elevation=rng.uniform(35, 60), warmth=rng.uniform(*warmth))
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    shapes = rng.permutation(words.CLASSES)[:count]
    colors = rng.permutation(tuple(words.COLORS))[:count]
    places = _arrange(rng, _sample_sizes(rng, count), background)
    objects = tuple(
        _sample_object(rng, str(shape), str(color), *place)
        for shape, color, place in zip(shapes, colors, places, strict=True)
    )
    return Scene(objects=objects, light=light, background=background)


# Constants of `in_a_row`.
MAX_IN_A_ROW = 2
ROW_SIZE = 0.23  # the largest that leaves a gap
# Each object of a pair is a quarter of the side from the middle, where a single object is. That is a whole number of
# tokens if a model's rows have a multiple of four tokens, so the object's tokens look the same in both positions.
ROW_DISTANCE = 0.5
ROW_HEIGHT = 0.625  # a multiple of an eighth, for the same reason
ROW_HORIZON = 0.48
ALONE_SIZE = 0.32  # the largest that leaves room below it


def in_a_row(scene: Scene, rng: np.random.Generator, size: float = ROW_SIZE) -> Scene:
    """The scene with its first two objects side by side, in one size: simple enough for a small model to learn.

    Classes, colours, textures, left-to-right order, the background's kind and details, and the light's warmth stay the
    same. Everything else takes only a few values. A shape that has poses keeps its pose half of the time, turned to
    the exact angle of that pose; all other shapes are upright. The light comes from the middle of its named direction.
    """
    kept = scene.objects[:MAX_IN_A_ROW]
    columns = np.argsort(np.argsort([item.x for item in kept])) - (len(kept) - 1) / 2
    objects = []
    for column, item in zip(columns.tolist(), kept, strict=True):
        keeps = words.SYMMETRY[item.shape] == 1 and rng.uniform() < 0.5
        rotation = (words.POSES[item.pose][0] + 180.0) % 360 - 180 if keeps else 0.0
        objects.append(
            dataclasses.replace(item, size=size, x=0.5 + column * ROW_DISTANCE, y=ROW_HEIGHT, rotation=rotation)
        )
    azimuth = sum(words.LIGHT_DIRECTIONS[scene.light.direction_name]) / 2
    return dataclasses.replace(
        scene,
        objects=tuple(objects),
        light=dataclasses.replace(scene.light, azimuth=azimuth, elevation=45.0),
        background=dataclasses.replace(scene.background, horizon=ROW_HORIZON),
    )


# Ranges of `as_drawing`, in shares of the side.
DRAWN_SIZES = (0.16, 0.23)
DRAWN_SHIFT = 0.04
DRAWN_HORIZONS = (0.36, 0.62)
INKS = ((24, 22, 28), (250, 248, 240))


def as_drawing(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene as somebody else might draw it: in another style, with objects of other sizes, a little displaced.

    The second colour of a texture is nearly black or nearly white half of the time.
    """
    objects = []
    for item in scene.objects:
        dx, dy = rng.uniform(-DRAWN_SHIFT, DRAWN_SHIFT, 2).tolist()
        accent = INKS[rng.integers(2)] if rng.uniform() < 0.5 else item.accent
        if np.abs(np.subtract(accent, item.rgb)).max() < 100:  # the pattern would not show
            accent = item.accent
        moved = {"size": rng.uniform(*DRAWN_SIZES), "x": item.x + dx, "y": item.y + dy, "accent": accent}
        objects.append(dataclasses.replace(item, **moved))
    background = dataclasses.replace(scene.background, horizon=rng.uniform(*DRAWN_HORIZONS))
    return dataclasses.replace(scene, objects=tuple(objects), background=background, style=sample_style(rng))


def alone(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with only its first object, in the middle, as large as fits there; otherwise like `in_a_row`."""
    return in_a_row(dataclasses.replace(scene, objects=scene.objects[:1]), rng, size=ALONE_SIZE)


# Constants of `portrait`, in shares of the side.
LARGE_SIZES = (0.25, 0.4)
FROM_MIDDLE = 0.1  # at most


def portrait(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with only its first object, turned as before, large, about in the middle, against a plain wall.

    So two crops of a picture share the object and nothing else: what self-distillation learns is about the object.
    """
    x, y = rng.uniform(0.5 - FROM_MIDDLE, 0.5 + FROM_MIDDLE, 2).tolist()
    kept = dataclasses.replace(scene.objects[0], size=rng.uniform(*LARGE_SIZES), x=x, y=y)
    wall = dataclasses.replace(scene.background, kind="wall")
    return dataclasses.replace(scene, objects=(kept,), background=wall)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _sample_object(rng: np.random.Generator, shape: str, color: str, x: float, y: float, size: float) -> SceneObject:
    rgb = sample_color(rng, color)
    centre, spread = words.POSES[_pick(rng, tuple(words.POSES))]
    rotation = centre + rng.uniform(-spread, spread)
    return SceneObject(
        shape=shape,
        color=color,
        rgb=rgb,
        texture=_pick(rng, words.TEXTURES),
        accent=accent_of(rgb),
        size=size,
        x=x,
        y=y,
        rotation=(rotation + 180) % 360 - 180,
    )


def _sample_sizes(rng: np.random.Generator, count: int) -> list[float]:
    main = rng.uniform(*((0.2, 0.34), (0.19, 0.27), (0.175, 0.21))[count - 1])
    return [main, *(max(0.14, main * rng.uniform(0.6, 0.88)) for _ in range(count - 1))]


def _arrange(rng: np.random.Generator, sizes: list[float], background: Background) -> list[tuple[float, float, float]]:
    """(x, y, size) of each object, redrawn until the bounding circles overlap by less than a tenth.

    The objects shrink a little after every failed draw, so that the loop ends.
    """
    while True:
        places = [(rng.uniform(0.02 + r, 0.98 - r), _sample_height(rng, r, background), r) for r in sizes]
        pairs = [(a, b) for i, a in enumerate(places) for b in places[:i]]
        if all(np.hypot(a[0] - b[0], a[1] - b[1]) > 0.92 * (a[2] + b[2]) for a, b in pairs):
            return places
        sizes = [0.997 * r for r in sizes]


def _sample_height(rng: np.random.Generator, radius: float, background: Background) -> float:
    if background.kind in words.UPRIGHT_BACKGROUNDS:
        return rng.uniform(0.04 + radius, 0.96 - radius)
    foot = rng.uniform(background.horizon + 0.1, 0.94)
    return max(foot - 0.85 * radius, 0.04 + radius)
