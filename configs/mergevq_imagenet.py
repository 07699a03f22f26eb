"""The published tokenizers on ImageNet-1K at 256 px, with the losses and schedules of the released code.

    mergevq train --config mergevq_imagenet:gr-d64 --workdir runs/gr-d64 \
        --config.lpips="('path/to/vgg16-397923af.pth', 'path/to/vgg.pth')"

The argument is a preset: g-d32, g-d64, gr-d32, gr-d64, gr-d96 or r-d64. ImageNet is read through TFDS (`imagenet2012`,
prepared as array_record), or from a folder: --config.data.sources="[{'kind': 'folder', 'path': ...}]".

Augmentation is the released one. An image is a square as large as the shorter side, at a random position, and never
mirrored. In the alignment loss, the teacher sees another such square. The student sees a random resized crop, mirrored
in half of the examples.
"""

from ml_collections import ConfigDict

from mergevq_jax.merge_ratio import exponential, gaussian
from mergevq_jax.tokenizer.config import preset
from runtime_jax.config import to_dict

# Batch size, epochs, epochs of the learning rate drops, gradient clipping, alignment weight and source weight.
SCHEDULES = {
    "g": (128, 100, (90,), None, 0.1, 0.5),  # the released second drop is at the end of the run, so it is omitted
    "gr": (256, 200, (170, 190), None, 1.0, 0.5),
    "r": (256, 270, (220, 250), 5.0, 1.0, 1.0),
}


def get_config(arg: str = "gr-d64") -> ConfigDict:
    """`arg`: a preset."""
    model, variant = preset(arg), arg.split("-")[0]
    if variant not in SCHEDULES:
        raise ValueError(
            f"preset {arg!r} has no published schedule; there are {', '.join(SCHEDULES)} with -d32 to -d96"
        )
    batch_size, epochs, drops, clip_norm, alignment, source = SCHEDULES[variant]
    if arg == "gr-d96":
        clip_norm = 5.0
    ratios = {"g": gaussian(256, 8 if arg == "g-d32" else 9), "gr": gaussian(144, 6), "r": exponential(36, 6)}
    optimizer = {
        "learning_rate": 1e-4,
        "b1": 0.5,
        "b2": 0.9,
        "schedule": "steps",
        "drops": [{"epochs": float(epoch)} for epoch in drops],
        "clip_norm": clip_norm,
    }
    data = {"kind": "tfds", "name": "imagenet2012", "data_dir": "data"}
    return ConfigDict(
        {
            "task": "tokenizer",
            "model": to_dict(model),
            "compute": {"dtype": "bfloat16", "remat": True},
            "losses": {"alignment_weight": alignment, "source_weight": source},
            "merge_ratio": to_dict(ratios[variant]),
            "optimizer": optimizer,
            "discriminator_optimizer": {**optimizer, "clip_norm": None},
            "data": {
                "image_size": 256,
                "batch_size": batch_size,
                "sources": [{**data, "split": "train"}],
                "num_workers": 8,
                "views": [
                    {"name": "teacher", "image_size": 224},
                    {"name": "student", "image_size": 224, "resized_crop": {"area": [0.08, 1.0]}, "flip": True},
                ],
            },
            "evaluation": {
                "data": {
                    "image_size": 256,
                    "batch_size": 32,
                    "sources": [{**data, "split": "validation"}],
                    "shuffle": False,
                    "random_crop": False,
                },
                "batches": 32,
            },
            "lpips": [],
            "teacher": "facebook/dinov2-base",
            "blocks_from": None if variant == "r" else "facebook/dinov2-base",
            "loop": {
                "duration": {"epochs": float(epochs)},
                "log_every": 100,
                "checkpoint_every": 5000,
                "eval_every": 5000,
                "preview_every": 5000,
            },
        }
    )
