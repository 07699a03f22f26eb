"""The appearance of an object or a light, and how similar two are: the measure behind CP and bleeding."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mini_scenes import SYMMETRY, TEXTURES, Light, SceneObject
from mini_scenes.judge import color_difference

# Distances of likeness 0. Two colours of mini_scenes are 10 apart on average if they share a name, otherwise 70.
COLOR_REACH = 50.0  # ΔE
TURN_REACH = 90.0  # degrees
WARMTH_REACH = 1.0  # half of its range
DIRECTION_REACH = 90.0  # degrees


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What a concept carries over; None: not this.

    An object has a colour and a texture, and a rotation if its outline looks different at every angle. A light has
    warmth and azimuth.
    """

    rgb: tuple[int, int, int] | None = None
    texture: str | None = None
    rotation: float | None = None
    warmth: float | None = None
    azimuth: float | None = None

    @classmethod
    def of_object(cls, item: SceneObject) -> "Appearance":
        """The appearance of an object."""
        return cls(rgb=item.rgb, texture=item.texture, rotation=item.rotation if SYMMETRY[item.shape] == 1 else None)

    @classmethod
    def of_light(cls, light: Light) -> "Appearance":
        """The appearance of a light."""
        return cls(warmth=light.warmth, azimuth=light.azimuth)


def object_likeness(
    appearance: Appearance, item: SceneObject, textures: Float[np.ndarray, "textures"]
) -> dict[str, float]:
    """Similarity of an object to an appearance, in [0, 1] for colour, texture and pose, where both have them.

    Colour falls linearly with the distance in L*a*b*, pose with the angle. Texture is the probability that the judge
    gives to the right one, so that half of a texture counts half.
    """
    parts = {}
    if appearance.rgb is not None:
        parts["color"] = _near(float(color_difference(appearance.rgb, item.rgb)), COLOR_REACH)
    if appearance.texture is not None:
        parts["texture"] = float(textures[TEXTURES.index(appearance.texture)])
    if appearance.rotation is not None and SYMMETRY[item.shape] == 1:
        parts["pose"] = _near(_angle(appearance.rotation - item.rotation), TURN_REACH)
    return parts


def light_likeness(appearance: Appearance, light: Light) -> dict[str, float]:
    """Similarity of a light to an appearance, in [0, 1] for warmth and direction, those that the appearance has."""
    parts = {}
    if appearance.warmth is not None:
        parts["warmth"] = _near(abs(appearance.warmth - light.warmth), WARMTH_REACH)
    if appearance.azimuth is not None:
        parts["direction"] = _near(_angle(appearance.azimuth - light.azimuth), DIRECTION_REACH)
    return parts


def _near(distance: float, reach: float) -> float:
    return max(0.0, 1.0 - distance / reach)


def _angle(degrees: float) -> float:
    """Size of an angle, in [0, 180]."""
    return abs((degrees + 180) % 360 - 180)
