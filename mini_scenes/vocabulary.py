"""The vocabulary of mini_scenes: every class, colour, texture and phrase of scenes and captions."""

from typing import NamedTuple

CLASSES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "ring",
    "cross",
    "crescent",
    "hexagon",
    "arrow",
    "drop",
    "flower",
)

# A rotation by 360 / SYMMETRY degrees leaves the outline unchanged; 0: every rotation does.
SYMMETRY = {
    "circle": 0,
    "square": 4,
    "triangle": 3,
    "star": 5,
    "heart": 1,
    "ring": 0,
    "cross": 4,
    "crescent": 1,
    "hexagon": 6,
    "arrow": 1,
    "drop": 1,
    "flower": 6,
}


class ColorRange(NamedTuple):
    """An HSV box: hue in degrees (it may run past 360), saturation and value in [0, 1]."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


# Each name covers a continuous range. The boxes do not touch, so no colour has two names.
COLORS = {
    "red": ColorRange((350, 364), (0.78, 0.95), (0.74, 0.94)),
    "orange": ColorRange((20, 31), (0.85, 1.0), (0.94, 1.0)),
    "yellow": ColorRange((46, 56), (0.75, 0.95), (0.93, 1.0)),
    "green": ColorRange((105, 145), (0.6, 0.85), (0.5, 0.75)),
    "teal": ColorRange((174, 188), (0.6, 0.85), (0.62, 0.82)),
    "blue": ColorRange((212, 232), (0.7, 0.92), (0.66, 0.95)),
    "purple": ColorRange((266, 284), (0.5, 0.75), (0.5, 0.78)),
    "pink": ColorRange((324, 342), (0.35, 0.55), (0.95, 1.0)),
    "brown": ColorRange((17, 27), (0.55, 0.72), (0.32, 0.48)),
    "white": ColorRange((0, 360), (0.0, 0.06), (0.94, 1.0)),
}

TEXTURES = ("plain", "striped", "dotted", "checkered", "zigzag")

# Radius as a share of the image side. Captions do not mention sizes between the two.
SMALL_BELOW = 0.165
BIG_ABOVE = 0.24
SIZES = ("small", "medium", "big")

# Centre and half-width of each range, in degrees clockwise from upright.
POSES = {
    "upright": (0.0, 14.0),
    "leaning left": (-48.0, 16.0),
    "leaning right": (48.0, 16.0),
    "upside down": (180.0, 14.0),
}

# Caption phrase of each background.
BACKGROUNDS = {
    "wall": "against a plain wall",
    "brick": "in front of a brick wall",
    "grass": "on the grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "under the night sky",
    "sunset": "at sunset",
    "floor": "on a wooden floor",
    "tiles": "on a tiled floor",
}
# These have no ground: objects hang in front of the surface and cast their shadows straight onto it.
UPRIGHT_BACKGROUNDS = ("wall", "brick")

# Azimuth range of each light direction, in degrees counter-clockwise from the right.
LIGHT_DIRECTIONS = {"right": (5.0, 40.0), "above": (70.0, 110.0), "left": (140.0, 175.0)}
# Warmth in [-1, 1].
LIGHT_WARMTHS = {"cool": (-1.0, -0.5), "neutral": (-0.25, 0.25), "warm": (0.5, 1.0)}

# Probability that a caption mentions each named attribute.
MENTION_RATES = {
    "color": 0.5,
    "texture": 0.5,
    "size": 0.5,
    "pose": 0.5,
    "background": 0.5,
    "warmth": 0.3,
    "direction": 0.3,
}
