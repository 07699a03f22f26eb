"""Concepts of an image on the tiny FLUX model of configs/flux_tiny.py (not tuned yet).

    tokenverse learn --config configs/tokenverse_tiny.py --workdir runs/star \
        --config.images="[{'path': 'star.png', 'captions': ['a star on the grass', 'on the grass, a star']}]" \
        --config.words="['star']" --config.prompts="['a star and a ring on the beach']"
"""

from ml_collections import ConfigDict

from runtime_jax.data.mini_scenes import BACKGROUNDS, CLASSES


def _pool() -> list[str]:
    """25 captions of two objects and a place."""
    places, nouns = list(BACKGROUNDS.values()), [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES]
    pairs = ((nouns[i % len(nouns)], nouns[(5 * i + 3) % len(nouns)]) for i in range(25))
    return [f"{one} and {other} {places[i % len(places)]}" for i, (one, other) in enumerate(pairs)]


def get_config() -> ConfigDict:
    """Everything but the images, their captions and the words to learn."""
    return ConfigDict(
        {
            "model": "tiny",
            "images": [],
            "words": [],
            "size": 64,
            "learn": {
                "concept_mod": {"hidden": 256, "block_hidden": 128},
                "stage_1": {"steps": 240, "high_share": 0.92},
                "stage_2": {"steps": 180, "high_share": 0.08},
                "batch_size": 8,
                "optimizer": {"learning_rate": 1e-3, "warmup": {"steps": 10}, "clip_norm": 1.0},
                "isolation": {"captions": _pool()},
            },
            "sampling": {"num_steps": 24, "cfg_scale": 2.5},
            "checkpoint_every": 120,
            "preview_every": 120,
        }
    )
