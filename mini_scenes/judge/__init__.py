"""A judge of pictures in the manner of mini_scenes: what is where, of which colour, texture and pose, in which light.

judge = Judge.load()
judge.look(images)[0].scene                                 # as a Scene, with masks beside it
follows(["a red circle on the grass"], images)[0].score     # does the image have what the caption names?

A small dense network, trained on scenes with their truth (python -m mini_scenes.judge train), measured on held-out ones
(python -m mini_scenes.judge evaluate).
"""

from runtime_jax import lazy

__getattr__, __dir__, __all__ = lazy.attributes(
    __name__,
    {
        "mini_scenes.judge.captions": (
            "Verdict",
            "Wanted",
            "WantedObject",
            "accuracies",
            "compare",
            "follows",
            "parse_caption",
        ),
        "mini_scenes.judge.color": ("color_difference", "to_lab"),
        "mini_scenes.judge.judge": ("Judge", "Seen"),
    },
)
