"""How a scene is drawn: shaded, as all scenes are unless they say otherwise, or as some drawing."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """The defaults are mini_scenes' own look; any other style is a drawing, and captions call it one.

    shading: bodies are rounded by the light and cast shadows; without, colours are even, and only the light's warmth
      shows.
    outline: width of a dark line along every outline, in radii of the object.
    plain: the background is one even colour, or two that meet at the horizon.
    scale, turn: size of the textures' patterns (1: as usual) and their rotation in degrees.
    """

    shading: bool = True
    outline: float = 0.0
    plain: bool = False
    scale: float = 1.0
    turn: float = 0.0


SHADED = Style()


def sample_style(rng: np.random.Generator) -> Style:
    """A drawing's style: with outlines, without shading, or both."""
    outlined = rng.uniform() < 0.6
    return Style(
        shading=outlined and rng.uniform() < 0.4,
        outline=rng.uniform(0.04, 0.16) if outlined else 0.0,
        plain=rng.uniform() < 0.6,
        scale=rng.uniform(0.75, 1.5),
        turn=rng.uniform(-90, 90),
    )
