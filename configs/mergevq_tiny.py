"""The tiny tokenizer on mini_scenes and crops of two photographs: 64 px, 256 raw tokens, 12 bits.

mergevq train --config mergevq_tiny --workdir runs/tiny            # the shipped one
mergevq train --config mergevq_tiny:demo --workdir runs/demo       # a few minutes on two cores
"""

from ml_collections import ConfigDict

from mergevq_jax.tokenizer.config import PRESETS
from runtime_jax.config import to_dict

STEPS = {"full": 4000, "demo": 150}


def _sources(scenes: str, photos: str) -> list[dict]:
    return [
        {"kind": "tfds", "name": "mini_scenes/64", "split": scenes, "weight": 0.75},
        {"kind": "photos", "split": photos, "weight": 0.25, "crop_scale": [0.3, 1.0]},
    ]


def get_config(arg: str = "full") -> ConfigDict:
    """`full`: the shipped model; `demo`: the same model, trained for a few minutes."""
    if arg not in STEPS:
        raise ValueError(f"no variant {arg!r}; there are {', '.join(STEPS)}")
    steps = STEPS[arg]
    optimizer = {
        "learning_rate": 3e-3,
        "muon_learning_rate": 0.02,  # 22.3 dB at K = 256 after 131 steps; Adam alone: 20.8 dB after 185
        "adam_kernels": ["conv_out", "adaptive_"],
        "schedule": "cosine",
        "warmup": {"steps": steps // 30},
        "final_fraction": 0.02,
        "b1": 0.9,
        "b2": 0.95,
        "clip_norm": 1.0,
    }
    return ConfigDict(
        {
            "task": "tokenizer",
            "seed": 0,
            "model": to_dict(PRESETS["tiny"]),
            "losses": {
                "perceptual_weight": 0.0,
                "adversarial_weight": 0.01,
                "discriminator_start": 3 * steps // 4,
                # At the published 0.01, a feature of 0.5 already counts as certain, and nothing spreads the codes out.
                "entropy_temperature": 0.6,
                "entropy_weight": 0.1,
                "commitment_weight": 0.1,
                "source_weight": 0.05,
            },
            "discriminator": {"ndf": 16},
            "merge_ratio": {"keeps": [64, 144, 256], "weights": [0.3, 0.35, 0.35]},
            "optimizer": optimizer,
            "discriminator_optimizer": {"learning_rate": 5e-4, "b1": 0.5, "b2": 0.9},
            "ema_decay": 0.998,
            "data": {"image_size": 64, "batch_size": 8, "sources": _sources("train", "train"), "flip": True},
            "evaluation": {
                "data": {
                    "image_size": 64,
                    "batch_size": 32,
                    "sources": _sources("validation", "held_out"),
                    "shuffle": False,
                    "random_crop": False,
                },
                "batches": 4,
                "keeps": [64, 144, 256],
            },
            "loop": {
                "duration": {"steps": steps},
                "log_every": 20,
                "checkpoint_every": 500,
                "eval_every": 1000,
                "preview_every": 1000,
            },
        }
    )
