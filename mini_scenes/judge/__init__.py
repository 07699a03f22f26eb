"""The judge reads images in the style of mini_scenes back into scenes: objects, their attributes, background and light.

judge = Judge.load()
judge.look(images)[0].scene                                 # a Scene; the result also has masks
follows(["a red circle on the grass"], images)[0].score     # does the image show what the caption names?

The judge is a small dense network. `python -m mini_scenes.judge train` trains it on scenes with ground truth;
`python -m mini_scenes.judge evaluate` measures it on held-out scenes.
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
