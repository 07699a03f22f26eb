"""The judge of images in the style of mini_scenes, at 64 px.

python -m mini_scenes.judge train --config judge --workdir runs/judge
"""

from ml_collections import ConfigDict

from mini_scenes.judge.model import JudgeConfig
from runtime_jax.config import to_dict

STEPS = 5000


def get_config() -> ConfigDict:
    """The config of the shipped judge."""
    return ConfigDict(
        {
            "seed": 0,
            "model": to_dict(JudgeConfig()),
            "image_size": 64,
            "batch_size": 16,
            "optimizer": {
                "learning_rate": 3e-3,
                "muon_learning_rate": 0.02,
                "adam_kernels": [
                    "stem_0",
                    "kind",
                    "texture",
                    "color",
                    "rgb",
                    "turn",
                    "background",
                    "warmth",
                    "azimuth",
                ],
                "schedule": "cosine",
                "warmup": {"steps": 60},
                "final_fraction": 0.01,
                "b2": 0.95,
                "clip_norm": 1.0,
            },
            "ema_decay": 0.998,
            "loop": {"duration": {"steps": STEPS}, "log_every": 50, "checkpoint_every": 500},
        }
    )
