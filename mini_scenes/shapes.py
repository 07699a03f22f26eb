"""Signed distance functions of the object classes, in a frame where the object's radius is 1 and y points down.

Each maps coordinate arrays of equal shape to the distance from the outline, negative inside. Distances are exact near
the outline, as antialiasing, rounding and soft shadows require.
"""

from collections.abc import Callable

import numpy as np

Coordinates = np.ndarray


def outline_distance(shape: str, x: Coordinates, y: Coordinates) -> np.ndarray:
    """Signed distance of the points (x, y) to the outline of `shape` (one of CLASSES), in units of its radius."""
    return SHAPES[shape](x, y)


def _circle(x, y):
    return np.hypot(x, y) - 0.9


def _ring(x, y):
    return np.abs(np.hypot(x, y) - 0.66) - 0.26


def _box(x, y, half_width, half_height):
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x, y):
    return _box(x, y, 0.7, 0.7) - 0.07


def _cross(x, y):
    return np.minimum(_box(x, y, 0.24, 0.86), _box(x, y, 0.86, 0.24)) - 0.06


def _crescent(x, y):
    # The smaller disc is cut out on the right; the shape is shifted to centre it on the origin.
    return np.maximum(np.hypot(x - 0.16, y) - 0.95, 0.72 - np.hypot(x - 0.55, y))


def _fold(x, y, count):
    """Folds the plane into half of one of `count` equal sectors around the upward axis: (along, across >= 0)."""
    sector = 2 * np.pi / count
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.sin(angle)


def _pointed(x, y, count, outer, inner, rounding):
    """A star with `count` tips at radius `outer` and notches at `inner`; a regular polygon if the notches are flat."""
    along, across = _fold(x, y, count)
    half = np.pi / count
    edge = np.array([inner * np.cos(half) - outer, inner * np.sin(half)])
    length = np.hypot(*edge)
    edge /= length
    px, py = along - outer, across
    nearest = np.clip(px * edge[0] + py * edge[1], 0, length)
    distance = np.hypot(px - nearest * edge[0], py - nearest * edge[1])
    outside = px * edge[1] - py * edge[0] > 0
    return np.where(outside, distance, -distance) - rounding


def _triangle(x, y):
    return _pointed(x, y, 3, 0.98, 0.49, 0.07)


def _hexagon(x, y):
    return _pointed(x, y, 6, 0.88, 0.88 * np.cos(np.pi / 6), 0.05)


def _star(x, y):
    return _pointed(x, y, 5, 0.98, 0.44, 0.05)


def _flower(x, y):
    along, across = _fold(x, y, 6)
    return np.minimum(np.hypot(along - 0.6, across) - 0.36, np.hypot(x, y) - 0.5)


def _heart(x, y):
    # A square on its corner with a half-disc on each upper side. By symmetry, one half is enough.
    side = 0.55
    x, y = np.abs(x), y - 0.02
    across, along = (x - y) / np.sqrt(2), (x + y) / np.sqrt(2)
    square = np.maximum(np.abs(along), -across) - side
    return np.where(across > side, np.hypot(across - side, along) - side, square) - 0.03


def _drop(x, y):
    # A disc, and its two tangents from the tip above it.
    tip, centre, radius = -0.97, 0.3, 0.6
    sine = radius / (centre - tip)
    cosine = np.sqrt(1 - sine**2)
    x, y = np.abs(x), y - tip
    along = np.maximum(x * sine + y * cosine, 0)
    to_tangent = x * cosine - y * sine
    side = np.where(x * sine + y * cosine > 0, to_tangent, np.hypot(x, y))
    disc = np.hypot(x, y - (centre - tip)) - radius
    return np.where(along > (centre - tip) * cosine, disc, side)


def _arrow(x, y):
    # A head pointing up, over a shaft; symmetric about the vertical axis.
    x = np.abs(x)
    head = np.maximum(0.74 * x - 0.67 * (y + 0.97), y + 0.08)
    return np.minimum(head, _box(x, y - 0.4, 0.27, 0.55)) - 0.02


SHAPES: dict[str, Callable[[Coordinates, Coordinates], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "hexagon": _hexagon,
    "arrow": _arrow,
    "drop": _drop,
    "flower": _flower,
}
