"""Renders a scene from signed distances at twice the resolution: inflated bodies with shading and soft shadows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mini_scenes.backgrounds import axis, paint_background
from mini_scenes.scene import Light, Scene, SceneObject
from mini_scenes.shapes import outline_distance
from mini_scenes.style import Style
from mini_scenes.vocabulary import UPRIGHT_BACKGROUNDS

SUPERSAMPLING = 2
BEVEL = 0.36  # width of the rounded rim, in radii
INK = np.float32([0.1, 0.09, 0.12])  # of outlines
MIN_SIZE = 16


class Rendering(NamedTuple):
    """image: sRGB; mask: 0 for the background, i + 1 where objects[i] is visible."""

    image: UInt8[np.ndarray, "H W 3"]
    mask: UInt8[np.ndarray, "H W"]


def render_scene(scene: Scene, size: int) -> Rendering:
    """Renders `scene` at size x size pixels. The same scene and size always give the same bytes.

    Raises:
        ValueError: size below 16 pixels.
    """
    if size < MIN_SIZE:
        raise ValueError(f"render_scene: size is {size}, it must be at least {MIN_SIZE} pixels")
    mask = np.zeros((size, size), np.uint8)
    style = scene.style
    canvas = paint_background(scene.background, size)
    canvas = _even(canvas, scene) if style.plain else canvas
    canvas = canvas * _falloff(scene.light, size)[..., None] if style.shading else canvas
    # Objects whose lowest point is further down are nearer and cover the others. All shadows are drawn first.
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].y + 0.85 * scene.objects[i].size)
    for i in order if style.shading else ():
        canvas *= 1 - _shadow(scene, scene.objects[i], size)[..., None]
    # Only the objects need the finer grid: backgrounds and shadows are already smooth or antialiased.
    canvas = canvas.repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    for i in order:
        coverage = _draw(canvas, scene.objects[i], scene.light, style)
        mask[_shrink(coverage) >= 0.5] = i + 1
    image = np.clip(_shrink(canvas) * _tint(scene.light), 0, 1)
    return Rendering((image * 255 + 0.5).astype(np.uint8), mask)


def _shrink(array: np.ndarray) -> np.ndarray:
    """Mean over SUPERSAMPLING x SUPERSAMPLING pixels: [2H, 2W, ...] -> [H, W, ...]."""
    return 0.25 * (array[::2, ::2] + array[1::2, ::2] + array[::2, 1::2] + array[1::2, 1::2])


def _direction(light: Light) -> np.ndarray:
    """Unit vector towards the light: x right, y down, z out of the image."""
    azimuth, elevation = np.deg2rad(light.azimuth), np.deg2rad(light.elevation)
    flat = np.cos(elevation)
    return np.array([flat * np.cos(azimuth), -flat * np.sin(azimuth), np.sin(elevation)], np.float32)


def _tint(light: Light) -> np.ndarray:
    warm, cool = np.float32([1.06, 0.98, 0.8]), np.float32([0.84, 0.97, 1.1])
    return 1 + abs(light.warmth) * ((warm if light.warmth > 0 else cool) - 1)


def _falloff(light: Light, side: int) -> np.ndarray:
    towards = _direction(light)
    centred = axis(side) - 0.5
    return 1 + 0.3 * (centred[None] * towards[0] + centred[:, None] * towards[1])


def _local(item: SceneObject, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates to the object's own frame (radius 1, upright)."""
    angle = np.deg2rad(item.rotation)
    cosine, sine = np.float32(np.cos(angle) / item.size), np.float32(np.sin(angle) / item.size)
    dx, dy = x - np.float32(item.x), y - np.float32(item.y)
    return dx * cosine + dy * sine, dy * cosine - dx * sine


def _window(low: float, high: float, side: int) -> slice:
    return slice(max(0, int(np.floor(low * side))), min(side, int(np.ceil(high * side)) + 1))


def _even(canvas: np.ndarray, scene: Scene) -> np.ndarray:
    """The background's mean colour above the horizon and below it; one colour where there is no ground."""
    side = len(canvas)
    edge = side if scene.background.kind in UPRIGHT_BACKGROUNDS else round(scene.background.horizon * side)
    parts = (canvas[:edge], canvas[edge:])
    return np.concatenate([np.broadcast_to(part.mean(axis=(0, 1)), part.shape) for part in parts if len(part)])


def _draw(canvas: np.ndarray, item: SceneObject, light: Light, style: Style) -> np.ndarray:
    """Paints one object onto the canvas in place and returns its coverage [side, side]."""
    side = canvas.shape[0]
    reach = (1.15 + style.outline) * item.size
    rows, columns = _window(item.y - reach, item.y + reach, side), _window(item.x - reach, item.x + reach, side)
    u, v = _local(item, axis(side)[None, columns], axis(side)[rows, None])
    pixel = 1 / (side * item.size)
    distance = outline_distance(item.shape, u, v).astype(np.float32)
    part = np.clip(0.5 - distance / pixel, 0, 1)
    body = _texture(item, u, v, pixel, style)
    if style.shading:
        body = _shade(body, distance, pixel, light)
    if style.outline:
        # Half of the line is inside the outline, half outside.
        inked = np.clip(0.5 + (0.5 * style.outline - np.abs(distance)) / pixel, 0, 1)[..., None]
        body = body + inked * (INK - body)
        part = np.clip(0.5 - (distance - 0.5 * style.outline) / pixel, 0, 1)
    target = canvas[rows, columns]
    target += part[..., None] * (body - target)
    coverage = np.zeros((side, side), np.float32)
    coverage[rows, columns] = part
    return coverage


def _shade(paint: np.ndarray, distance: np.ndarray, pixel: float, light: Light) -> np.ndarray:
    """Lambert and Blinn-Phong shading of a body whose rim is a quarter circle of width BEVEL."""
    towards = _direction(light)
    slope = 0.9 * (1 - np.clip(-distance / BEVEL, 0, 1))
    down, right = np.gradient(distance, pixel)
    nx, ny, nz = right * slope, down * slope, np.sqrt(1 - slope**2)
    diffuse = np.maximum(nx * towards[0] + ny * towards[1] + nz * towards[2], 0)
    half = towards + np.float32([0, 0, 1])
    half /= np.linalg.norm(half)
    gloss = np.maximum(nx * half[0] + ny * half[1] + nz * half[2], 0)
    for _ in range(5):
        gloss = gloss * gloss
    return paint * (0.5 + 0.66 * diffuse)[..., None] + 0.3 * gloss[..., None]


def _texture(item: SceneObject, u: np.ndarray, v: np.ndarray, pixel: float, style: Style) -> np.ndarray:
    """Surface colours [..., 3]; the pattern rotates with the object."""
    base, accent = np.float32(item.rgb) / 255, np.float32(item.accent) / 255
    if item.texture == "plain":
        return np.broadcast_to(base, (*u.shape, 3))
    # At least 5.4 pixels of a 64-pixel image, so that the pattern stays visible on the smallest object.
    period = style.scale * max(0.46, 0.085 / item.size)
    if style.turn:
        cosine, sine = np.float32(np.cos(np.deg2rad(style.turn))), np.float32(np.sin(np.deg2rad(style.turn)))
        u, v = u * cosine + v * sine, v * cosine - u * sine
    inside = PATTERNS[item.texture](u, v, period)
    return base + np.clip(inside / pixel + 0.5, 0, 1)[..., None] * (accent - base)


def _wave(position: np.ndarray, period: float) -> np.ndarray:
    """Signed distance to the nearest edge of stripes that fill 45 % of each period; positive inside a stripe."""
    return (0.225 - np.abs(position / period % 1 - 0.5)) * period


def _striped(u, v, period):
    return _wave(0.8 * u + 0.6 * v, period)


def _zigzag(u, v, period):
    return 0.75 * _wave(v + 0.7 * np.abs((u / (1.6 * period) + 0.25) % 1 - 0.5) * 1.6 * period, 1.15 * period)


def _dotted(u, v, period):
    row = np.floor(v / period)
    across = (u / period + 0.5 * (row % 2)) % 1 - 0.5
    return 0.32 * period - np.hypot(across, v / period - row - 0.5) * period


def _checkered(u, v, period):
    a, b = ((0.25 - np.abs(w / (2 * period) % 1 - 0.5)) * 2 * period for w in (u + 0.5 * period, v + 0.5 * period))
    return np.where(a * b > 0, 1, -1) * np.minimum(np.abs(a), np.abs(b))


PATTERNS = {"striped": _striped, "dotted": _dotted, "checkered": _checkered, "zigzag": _zigzag}


def _shadow(scene: Scene, item: SceneObject, size: int) -> np.ndarray:
    """Share of the light that the object blocks, [size, size]."""
    towards = _direction(scene.light)
    if scene.background.kind in UPRIGHT_BACKGROUNDS:
        return _wall_shadow(item, towards, size)
    return _ground_shadow(item, towards, scene.background.horizon, size)


def _wall_shadow(item: SceneObject, towards: np.ndarray, size: int) -> np.ndarray:
    """The object's outline, shifted away from the light."""
    shift_x, shift_y = (0.35 * item.size * float(part) for part in towards[:2])
    reach = 1.5 * item.size
    rows = _window(item.y - shift_y - reach, item.y - shift_y + reach, size)
    columns = _window(item.x - shift_x - reach, item.x - shift_x + reach, size)
    u, v = _local(item, axis(size)[None, columns] + shift_x, axis(size)[rows, None] + shift_y)
    out = np.zeros((size, size), np.float32)
    out[rows, columns] = 0.5 * _soft(outline_distance(item.shape, u, v), 0.3)
    return out


def _ground_shadow(item: SceneObject, towards: np.ndarray, horizon: float, size: int) -> np.ndarray:
    """The outline laid on the ground behind the object and leaning away from the light, darkest where it stands."""
    foot, radius, margin = _foot(item), item.size, 1.3 * item.size
    lean = 0.9 * float(towards[0])
    left, right = item.x - 2 * radius * max(lean, 0), item.x - 2 * radius * min(lean, 0)
    rows = _window(max(foot - 0.75 * radius, horizon), foot + 0.25 * radius, size)
    columns = _window(left - margin, right + margin, size)
    x, y = axis(size)[None, columns], axis(size)[rows, None]
    # The ground is seen nearly edge-on: a point at height h casts its shadow 0.3 h up the image.
    height = (foot - y) / 0.3
    u, v = _local(item, x + lean * height, foot - height)
    cast = 0.45 * _soft(outline_distance(item.shape, u, v), 0.35)
    contact = 0.5 * np.exp(-(((x - item.x) / (0.5 * radius)) ** 2 + ((y - foot) / (0.09 * radius)) ** 2))
    out = np.zeros((size, size), np.float32)
    out[rows, columns] = np.maximum(cast, contact)
    return out


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """The smooth edge of a shadow: from 1 inside to 0 at `width` outside the outline and beyond."""
    t = np.clip(0.5 - distance / (2 * width), 0, 1)
    return t * t * (3 - 2 * t)


def _foot(item: SceneObject) -> float:
    """y coordinate of the object's lowest point."""
    across, down = (np.linspace(low, 1.1, 25, dtype=np.float32) * np.float32(item.size) for low in (-1.1, 0.0))
    u, v = _local(item, item.x + across[None], item.y + down[:, None])
    inside = (outline_distance(item.shape, u, v) < 0).any(1)
    return item.y + float(down[np.flatnonzero(inside)[-1]])
