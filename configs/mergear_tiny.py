"""The tiny generators on the codes of the tiny tokenizer: mini_scenes, 64 px, 256 raw tokens, 12 classes.

mergevq train --config configs/mergear_tiny.py:merge --workdir runs/mergear         # MergeAR
mergevq train --config configs/mergear_tiny.py:plain --workdir runs/plain           # autoregression over all tokens
mergevq train --config configs/mergear_tiny.py:random --workdir runs/randar         # RandAR over the distinct tokens
mergevq train --config configs/mergear_tiny.py:demo --workdir runs/mergear-demo     # MergeAR for a few minutes
"""

from ml_collections import ConfigDict

from mergevq_jax.generator.config import preset
from runtime_jax.config import to_dict

# Variant: kind, K that are drawn with their weights, steps.
VARIANTS = {
    "merge": ("merge", {64: 0.3, 144: 0.35, 256: 0.35}, 8000),
    "plain": ("plain", {256: 1.0}, 8000),
    "random": ("random", {64: 0.3, 144: 0.35, 256: 0.35}, 8000),
    "demo": ("merge", {144: 1.0}, 300),
}


def _data(split: str, batch_size: int, **changes) -> dict:
    source = {"kind": "tfds", "name": "mini_scenes/64_o1", "split": split}
    return {"image_size": 64, "batch_size": batch_size, "sources": [source], **changes}


def get_config(arg: str = "merge") -> ConfigDict:
    """`arg`: merge, plain, random or demo."""
    if arg not in VARIANTS:
        raise ValueError(f"no variant {arg!r}; there are {', '.join(VARIANTS)}")
    kind, keeps, steps = VARIANTS[arg]
    switches = {"merge_instruction": kind != "plain", "position_instruction": kind == "random"}
    model = preset("tiny", merge_numbers=(64, 144, 256), **switches)
    return ConfigDict(
        {
            "task": "generator",
            "seed": 0,
            "kind": kind,
            "model": to_dict(model),
            "tokenizer": "tiny",
            "merge_ratio": {"keeps": list(keeps), "weights": list(keeps.values())},
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup": {"steps": steps // 30},
                "final_fraction": 0.02,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
            },
            "ema_decay": 0.998,
            "data": _data("train", 16, flip=True),
            "evaluation": {
                "data": _data("validation", 16, shuffle=False, random_crop=False),
                "batches": 8,
                "sampling": {"cfg_scale": 2.0},
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
