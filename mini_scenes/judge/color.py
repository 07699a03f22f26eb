"""Perceptual colour differences."""

import numpy as np
from jaxtyping import Float

Colors = np.ndarray | tuple[int, int, int]  # sRGB from 0 to 255, integer or float
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)  # D65


def to_lab(srgb: Colors) -> Float[np.ndarray, "*n 3"]:
    """CIE L*a*b* (D65) of sRGB values [..., 3] from 0 to 255, integer or float; L* runs from 0 to 100."""
    value = np.asarray(srgb, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def color_difference(first: Colors, second: Colors) -> Float[np.ndarray, "*n"]:
    """Distance in L*a*b* (CIE 1976 ΔE) between sRGB colours [..., 3] from 0 to 255; 2.3 is just noticeable."""
    return np.asarray(np.linalg.norm(to_lab(first) - to_lab(second), axis=-1))
