"""Learns concepts from an image with the shipped tiny FLUX model.

Words include the article, because this model's text encoder spreads an object over its article and noun.

    tokenverse learn --config tokenverse_tiny:star --workdir runs/star       # from mini_scenes/pictures/star.png
    tokenverse learn --config tokenverse_tiny:all --workdir runs/concepts    # from star.png and heart.png, side by side
    tokenverse learn --config tokenverse_tiny --workdir runs/mine \
        --config.images="[{'path': 'mine.png', 'captions': ['a star and a drop in the snow']}]" \
        --config.words="['a star', 'a drop']" --config.prompts="['a star and a ring on the beach']"
"""

from ml_collections import ConfigDict

from mini_scenes import BACKGROUNDS, CLASSES, example_path

# Example images of mini_scenes: the two objects from left to right, and the background.
EXAMPLES = {"star": (("a star", "a drop"), "in the snow"), "heart": (("a ring", "a heart"), "on the grass")}


def _all() -> dict:
    """All examples, each image with its own words."""
    examples = [_example(name) for name in EXAMPLES]
    images = [each["images"][0] | {"words": each["words"]} for each in examples]
    return {"images": images, "prompts": [prompt for each in examples for prompt in each["prompts"]]}


def _example(name: str) -> dict:
    """The image, captions that do not describe appearance, and prompts to draw during learning."""
    (left, right), place = EXAMPLES[name]
    captions = [
        f"{left} and {right} {place}",
        f"a picture of {left} next to {right} {place}",
        f"{place}, {left} to the left of {right}",
    ]
    prompts = [f"{left} and a circle on the beach", f"a circle and {right} against a plain wall"]
    return {
        "images": [{"path": str(example_path(name)), "captions": captions}],
        "words": [left, right],
        "prompts": prompts,
    }


def _pool() -> list[str]:
    """25 captions of two objects and a background."""
    places, nouns = list(BACKGROUNDS.values()), [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES]
    pairs = ((nouns[i % len(nouns)], nouns[(5 * i + 3) % len(nouns)]) for i in range(25))
    return [f"{one} and {other} {places[i % len(places)]}" for i, (one, other) in enumerate(pairs)]


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: an example of EXAMPLES, or "all". Without it, images, captions and words to learn are left empty."""
    if arg not in ("", "all", *EXAMPLES):
        raise ValueError(f"no example {arg!r}; there are {', '.join(EXAMPLES)}, and all")
    learned = {"images": [], "words": []}
    if arg:
        learned = _all() if arg == "all" else _example(arg)
    return ConfigDict(
        {
            "model": "tiny",
            **learned,
            "size": 64,
            "learn": {
                "tokens": "words",
                "concept_mod": {"hidden": 256, "block_hidden": 128},
                # More steps or larger batches did not improve the results.
                "stage_1": {"steps": 110, "high_share": 0.92},
                "stage_2": {"steps": 50, "high_share": 0.08},
                "batch_size": 2,
                "optimizer": {
                    "learning_rate": 3e-3,
                    "schedule": "cosine",
                    "final_fraction": 0.1,
                    "warmup": {"steps": 10},
                    "clip_norm": 1.0,
                },
                "flip": False,  # a flip would reverse the light's direction
                "isolation": {"captions": _pool()},
            },
            "sampling": {"num_steps": 24, "cfg_scale": 2.5},
            "checkpoint_every": 80,
            "preview_every": 80,
        }
    )
