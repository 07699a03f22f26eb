"""Paints the backgrounds, each a function of the image plane that looks the same at every resolution."""

import colorsys
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from mini_scenes.scene import Background


def paint_background(background: Background, side: int) -> np.ndarray:
    """The background before the light's tint: float32 [side, side, 3], sRGB in about [0, 1]."""
    rng = np.random.default_rng(background.seed)
    return PAINTERS[background.kind](background, side, rng)


@lru_cache(maxsize=8)
def axis(side: int) -> np.ndarray:
    """Pixel centres of `side` pixels that span [0, 1], float32 [side]."""
    return ((np.arange(side) + 0.5) / side).astype(np.float32)


def _noise(rng: np.random.Generator, side: int, rows: int, columns: int) -> np.ndarray:
    """Smooth noise in [-1, 1], float32 [side, side], interpolated linearly between rows x columns knots."""
    knots = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return _interpolate(_interpolate(knots, side).T, side).T


def _interpolate(knots: np.ndarray, side: int) -> np.ndarray:
    """Linear interpolation along the first axis, [n, m] -> [side, m].

    Not a matrix product, because BLAS rounds differently on different machines.
    """
    position = axis(side) * (len(knots) - 1)
    lower = position.astype(int)
    weight = (position - lower)[:, None]
    return knots[lower] * (1 - weight) + knots[lower + 1] * weight


def _hsv(hue, saturation, value) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32)


def _mix(weight: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Blends two colours: weight [...] in [0, 1] -> [..., 3]."""
    return zero + weight[..., None] * (one - zero)


def _below(background: Background, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth into the ground [side], 0 at the horizon and 1 at the bottom; and the ground's mask [side, 1, 1]."""
    rise = axis(side) - background.horizon
    return np.clip(rise / (1 - background.horizon), 0, 1), np.clip(rise * side + 0.5, 0, 1)[:, None, None]


def _stack(background: Background, side: int, sky: np.ndarray, ground: np.ndarray) -> np.ndarray:
    return sky + _below(background, side)[1] * (ground - sky)


def _sky(background: Background, side: int, top: np.ndarray, low: np.ndarray) -> np.ndarray:
    height = np.clip(axis(side) / background.horizon, 0, 1)
    return np.broadcast_to(_mix(height, top, low)[:, None], (side, side, 3))


def _wall(background, side, rng):
    hue = rng.uniform(0, 360)
    upper, lower = _hsv(hue, 0.16, 0.9 - 0.2 * background.tone), _hsv(hue + 15, 0.24, 0.74 - 0.2 * background.tone)
    radius = np.hypot(axis(side)[:, None] - 0.45, axis(side)[None] - 0.5)
    return _mix(np.clip(radius * 1.3, 0, 1), upper, lower)


def _brick(background, side, rng):
    rows = 9
    y, x = axis(side)[:, None] * rows, axis(side)[None] * rows / 2
    row = np.floor(y)
    x = x + 0.5 * (row % 2)
    across, along = (x % 1) * 2, y % 1
    to_joint = np.minimum(np.minimum(across, 2 - across), np.minimum(along, 1 - along))
    shade = rng.uniform(0.9, 1.08, (rows + 1, rows + 1)).astype(np.float32)[row.astype(int), np.floor(x).astype(int)]
    brick = _mix(np.array(background.tone, np.float32), _hsv(14, 0.4, 0.62), _hsv(28, 0.28, 0.74)) * shade[..., None]
    joint = np.clip((to_joint - 0.05) * side / rows + 0.5, 0, 1)
    return _mix(joint, _hsv(35, 0.12, 0.82), brick)


def _grass(background, side, rng):
    depth, _ = _below(background, side)
    ground = _mix(depth, _hsv(92, 0.42, 0.66), _hsv(100, 0.55, 0.46))[:, None]
    ground = ground * (1 + 0.09 * _noise(rng, side, 14, 40) + 0.06 * _noise(rng, side, 5, 5))[..., None]
    sky = _sky(background, side, _hsv(208, 0.42, 0.92), _hsv(200, 0.12, 0.97))
    cloud = np.clip(1.6 * _noise(rng, side, 7, 4) - 0.5, 0, 1) * 0.7
    return _stack(background, side, _mix(cloud, sky, np.float32([1, 1, 1])), ground)


def _beach(background, side, rng):
    depth, _ = _below(background, side)
    ground = (
        _mix(depth, _hsv(42, 0.3, 0.93), _hsv(36, 0.38, 0.84))[:, None]
        * (1 + 0.04 * _noise(rng, side, 16, 16))[..., None]
    )
    shore = background.horizon - 0.17
    sea_height = np.clip((axis(side) - shore) / 0.17, 0, 1)
    sea = _mix(sea_height, _hsv(206, 0.6, 0.66), _hsv(186, 0.4, 0.84))[:, None]
    sea = sea * (1 + 0.07 * _noise(rng, side, 36, 6))[..., None]
    sky = _sky(background, side, _hsv(205, 0.35, 0.95), _hsv(200, 0.1, 0.98))
    at_sea = np.clip((axis(side) - shore) * side + 0.5, 0, 1)[:, None, None]
    return _stack(background, side, sky + at_sea * (sea - sky), ground)


def _hills(rng, side, level, height):
    x = axis(side)
    phase = rng.uniform(0, 2 * np.pi, 2)
    crest = level - height * (0.6 + 0.25 * np.sin(5 * x + phase[0]) + 0.15 * np.sin(11 * x + phase[1]))
    return np.clip((axis(side)[:, None] - crest) * side + 0.5, 0, 1)[..., None]


def _snow(background, side, rng):
    depth, _ = _below(background, side)
    ground = _mix(depth, _hsv(212, 0.1, 0.9), _hsv(214, 0.05, 0.97))[:, None]
    ground = ground * (1 + 0.03 * _noise(rng, side, 10, 6))[..., None]
    sky = _sky(background, side, _hsv(214, 0.36, 0.72), _hsv(208, 0.14, 0.86))
    sky = sky + _hills(rng, side, background.horizon, 0.2) * (_hsv(210, 0.2, 0.76) - sky)
    return _stack(background, side, sky, ground)


def _night(background, side, rng):
    depth, _ = _below(background, side)
    ground = (
        _mix(depth, _hsv(226, 0.4, 0.2), _hsv(232, 0.36, 0.33))[:, None]
        * (1 + 0.06 * _noise(rng, side, 9, 9))[..., None]
    )
    sky = _sky(background, side, _hsv(232, 0.72, 0.17), _hsv(224, 0.55, 0.4))
    stars = rng.uniform(0, 1, (26, 2)).astype(np.float32) * np.float32([1, background.horizon])
    spots = [np.exp(-(((axis(side)[:, None] - centre) / 0.0075) ** 2)) for centre in (stars[:, 1], stars[:, 0])]
    strength = rng.uniform(0.3, 0.9, 26).astype(np.float32)
    glow = np.einsum("yn,n,xn->yx", spots[0], strength, spots[1])
    return _stack(background, side, sky + glow[..., None], ground)


def _sunset(background, side, rng):
    depth, _ = _below(background, side)
    sky = _sky(background, side, _hsv(262, 0.42, 0.5), _hsv(24, 0.55, 0.96))
    x = 0.15 + 0.7 * background.tone
    radius = np.hypot(axis(side)[None] - x, axis(side)[:, None] - background.horizon + 0.03)
    glow = np.exp(-((radius / 0.3) ** 2))
    sky = _mix(glow * 0.6, sky, _hsv(40, 0.4, 1.0))
    sky = _mix(np.clip((0.085 - radius) * side + 0.5, 0, 1), sky, _hsv(46, 0.3, 1.0))
    ground = _mix(depth, _hsv(340, 0.3, 0.5), _hsv(275, 0.34, 0.32))[:, None]
    sheen = np.exp(-(((axis(side)[None] - x) / 0.16) ** 2)) * (1 - depth[:, None]) * 0.5
    ripples = 1 + 0.06 * _noise(rng, side, 30, 5)
    return _stack(background, side, sky, _mix(sheen, ground, _hsv(28, 0.5, 0.95)) * ripples[..., None])


def _floor_plane(background: Background, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates on the floor in perspective, each [side, side]: across, and towards the viewer."""
    drop = np.maximum(axis(side) - background.horizon, 0)[:, None] + 0.16
    return (axis(side)[None] - 0.5) / drop * 0.55, np.broadcast_to(0.55 / drop, (side, side))


def _room_wall(background, side, rng):
    hue = rng.uniform(0, 360)
    upper, lower = _hsv(hue, 0.14, 0.88 - 0.16 * background.tone), _hsv(hue, 0.2, 0.8 - 0.2 * background.tone)
    return _sky(background, side, upper, lower)


def _skirting(background: Background, side: int, image: np.ndarray) -> np.ndarray:
    rise = axis(side) - background.horizon
    inside = np.clip((0.022 - np.abs(rise + 0.022)) * side + 0.5, 0, 1)[:, None, None]
    return image + inside * (_hsv(40, 0.05, 0.95) - image)


def _floor(background, side, rng):
    across, _ = _floor_plane(background, side)
    plank = across * 3.2 + 40
    shade = rng.uniform(0.9, 1.08, 80).astype(np.float32)[np.clip(plank, 0, 79).astype(int)]
    edge = np.abs(plank % 1 - 0.5)
    shade = shade * (1 - 0.28 * np.clip((edge - 0.465) / 0.035, 0, 1))
    ground = _mix(np.array(background.tone, np.float32), _hsv(26, 0.46, 0.58), _hsv(34, 0.4, 0.74)) * shade[..., None]
    return _skirting(background, side, _stack(background, side, _room_wall(background, side, rng), ground))


def _tiles(background, side, rng):
    across, towards = _floor_plane(background, side)
    waves = np.sin(np.pi * 2.2 * across) * np.sin(np.pi * 2.2 * (towards + background.tone))
    tint = rng.uniform(0, 360)
    ground = _mix(np.clip(waves * 9 + 0.5, 0, 1), _hsv(tint, 0.16, 0.66), _hsv(tint, 0.06, 0.86))
    return _skirting(background, side, _stack(background, side, _room_wall(background, side, rng), ground))


PAINTERS: dict[str, Callable[[Background, int, np.random.Generator], np.ndarray]] = {
    "wall": _wall,
    "brick": _brick,
    "grass": _grass,
    "beach": _beach,
    "snow": _snow,
    "night": _night,
    "sunset": _sunset,
    "floor": _floor,
    "tiles": _tiles,
}
