"""A small DINOv2 for 64 px, trained by self-distillation on scenes of one object, without labels.

mergevq scenes --probe
mergevq train --config mergevq_teacher --workdir runs/teacher
docs/teacher.md says how a tokenizer's training uses it.
"""

from ml_collections import ConfigDict

STEPS = {"full": 8000, "demo": 40}


def get_config(arg: str = "full") -> ConfigDict:
    """`full`: an hour on two busy cores; `demo`: one minute."""
    if arg not in STEPS:
        raise ValueError(f"no variant {arg!r}; there are {', '.join(STEPS)}")
    steps = STEPS[arg]
    whole = {"area": [0.4, 1.0]}
    part = {"area": [0.2, 0.5]}
    views = [{"name": "whole_1", "image_size": 64, "resized_crop": whole, "flip": True}]
    views += [{"name": f"part_{i}", "image_size": 32, "resized_crop": part, "flip": True} for i in range(4)]
    return ConfigDict(
        {
            "task": "teacher",
            "seed": 0,
            "model": {"width": 64, "num_layers": 4, "num_heads": 4, "patch_size": 8, "image_size": 64},
            "head": {"hidden": 256, "bottleneck": 64, "prototypes": 1024},
            # A scene's class is a shape: colours must not tell two pictures apart.
            "colour": {"hue": 0.5, "saturation": 0.4},
            "optimizer": {
                "learning_rate": 2e-3,
                "muon_learning_rate": 0.02,
                "adam_kernels": ["patch_embed", "fc3"],
                "schedule": "cosine",
                "warmup": {"steps": steps // 20},
                "final_fraction": 0.01,
                "clip_norm": 3.0,
            },
            "ema_decay": 0.99,
            "data": {
                "image_size": 64,
                "batch_size": 32,
                "sources": [
                    {"kind": "tfds", "name": "mini_scenes/64_probe", "split": "train"},
                ],
                "resized_crop": whole,
                "flip": True,
                "views": views,
            },
            "loop": {"duration": {"steps": steps}, "log_every": 20, "checkpoint_every": 200},
        }
    )
