"""A judge of pictures in the manner of mini_scenes: what is where, of which colour, texture and pose, in which light.

judge = Judge.load()
judge.look(images)[0].scene                                 # as a Scene, with masks beside it
follows(["a red circle on the grass"], images)[0].score     # does the image have what the caption names?

A small dense network, trained on scenes with their truth (python -m runtime_jax.judge train), measured on held-out ones
(python -m runtime_jax.judge evaluate).
"""

from runtime_jax.judge.captions import (
    Verdict,
    Wanted,
    WantedObject,
    accuracies,
    compare,
    follows,
    parse_caption,
)
from runtime_jax.judge.color import color_difference, to_lab
from runtime_jax.judge.judge import Judge, Seen

__all__ = [
    "Judge",
    "Seen",
    "Verdict",
    "Wanted",
    "WantedObject",
    "accuracies",
    "color_difference",
    "compare",
    "follows",
    "parse_caption",
    "to_lab",
]
