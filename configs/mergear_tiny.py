"""The tiny generators, on codes of the tiny tokenizer: mini_scenes, 64 px, 256 raw tokens, 12 classes.

mergevq scenes --single
for split in train validation; do for keep in 144 256; do
    mergevq tokenize --tfds mini_scenes/64_single --split $split --keep $keep --out data/codes/$split/$keep
done; done
mergevq train --config mergear_tiny:merge --workdir runs/mergear     # MergeAR
mergevq train --config mergear_tiny:plain --workdir runs/plain       # autoregression over all tokens
mergevq train --config mergear_tiny:random --workdir runs/randar     # RandAR over the distinct tokens

On two CPU cores a step of :merge takes 0.46 s with XLA_FLAGS=--xla_force_host_platform_device_count=2, which makes a
mesh of two devices. With the README's GLIBC_TUNABLES as well, it takes 0.36 s.
"""

from ml_collections import ConfigDict

from mergevq_jax.generator.config import preset
from runtime_jax.config import to_dict

STEPS = 10_000
KEEPS = (144, 256)
# The values of K that each variant trains on, with equal weights.
VARIANTS = {"merge": KEEPS, "plain": (256,), "random": KEEPS}


def _codes(split: str, keeps: tuple[int, ...], **changes) -> dict:
    return {"folders": [f"data/codes/{split}/{keep}" for keep in keeps], "batch_size": 8, **changes}


def get_config(arg: str = "merge") -> ConfigDict:
    """`arg`: merge, plain or random."""
    if arg not in VARIANTS:
        raise ValueError(f"no variant {arg!r}; there are {', '.join(VARIANTS)}")
    keeps = VARIANTS[arg]
    model = preset("tiny", keeps=KEEPS, merge_instruction=arg != "plain", position_instruction=arg == "random")
    return ConfigDict(
        {
            "task": "generator",
            "seed": 0,
            "kind": arg,
            "model": to_dict(model),
            "compute": {"remat": True},
            "tokenizer": "tiny",
            "merge_ratio": {"keeps": keeps, "weights": [1.0] * len(keeps)},
            "optimizer": {
                "learning_rate": 2e-3,
                "muon_learning_rate": 0.01,
                "adam_kernels": ["head_"],
                "schedule": "cosine",
                "warmup": {"steps": 200},
                "final_fraction": 0.02,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
            },
            "ema_decay": 0.998,
            "data": _codes("train", keeps),
            "evaluation": {
                "data": _codes("validation", keeps, shuffle=False),
                "batches": 32,
                "sampling": {"cfg_scale": 2.0},
            },
            "loop": {
                "duration": {"steps": STEPS},
                "log_every": 50,
                "checkpoint_every": 500,
                "eval_every": 1000,
                "preview_every": 1000,
                "keep_checkpoints": 1,
            },
        }
    )
