"""MergeAR on ImageNet-1K at 256 px with the paper's schedule, over the codes of a G+R tokenizer.

    mergevq train --config mergear_imagenet:L --workdir runs/mergear-l \
        --config.tokenizer=runs/gr-d64/tokenizer

The argument is a size: B, L or XL. ImageNet is read through TFDS (`imagenet2012`, prepared as array_record) and
tokenized in each step. To train on codes that `mergevq tokenize --views flip` (or ten-crop) wrote for each K instead:

    --config.data="{'folders': ['codes/144', 'codes/169', 'codes/196', 'codes/225', 'codes/256'], 'batch_size': 768}"
"""

from ml_collections import ConfigDict

from mergevq_jax.generator.config import preset
from mergevq_jax.merge_ratio import gaussian
from runtime_jax.config import to_dict


def get_config(arg: str = "L") -> ConfigDict:
    """`arg`: B, L or XL."""
    stage1 = gaussian(144, 6)
    keeps, weights = stage1.keeps[1:], stage1.weights[1:]  # the paper's second stage starts at 144
    data = {"kind": "tfds", "name": "imagenet2012", "data_dir": "data"}
    return ConfigDict(
        {
            "task": "generator",
            "kind": "merge",
            "model": to_dict(preset(arg, keeps=keeps)),
            "tokenizer": "runs/gr-d64/tokenizer",
            "merge_ratio": {"keeps": list(keeps), "weights": list(weights)},
            "compute": {"dtype": "bfloat16", "remat": True},
            "optimizer": {
                "learning_rate": 3e-4,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
            },
            "data": {
                "image_size": 256,
                "batch_size": 768,
                "sources": [{**data, "split": "train"}],
                "flip": True,
                "num_workers": 8,
            },
            "evaluation": {
                "data": {
                    "image_size": 256,
                    "batch_size": 64,
                    "sources": [{**data, "split": "validation"}],
                    "shuffle": False,
                    "random_crop": False,
                },
                "batches": 16,
                "sampling": {"cfg_scale": 2.0},
            },
            "loop": {
                "duration": {"epochs": 300.0},
                "log_every": 100,
                "checkpoint_every": 5000,
                "eval_every": 5000,
                "preview_every": 5000,
            },
        }
    )
