"""Trains source recovery alone, on the frozen codes of a tokenizer, so that generators of these codes can be kept.

Older generators don't record a fingerprint of the codes: they accept only the unchanged tokenizer.

    mergevq train --config mergevq_recovery:tiny --workdir runs/recovery        # of the shipped tokenizer
    mergevq train --config mergevq_recovery:gr-d64 --config.init_from=runs/gr-d64/tokenizer --workdir runs/recovery

The argument is "tiny" or one of mergevq_imagenet's. Source recovery is told where groups start, and convolutions stand
in for cross-attention; --config.model.recovery.positions=none --config.model.recovery.num_layers=2: as released.
"""

from ml_collections import ConfigDict

from runtime_jax.config import load


def get_config(arg: str = "tiny") -> ConfigDict:
    """`arg`: whose data and sizes to take."""
    config = load("mergevq_tiny" if arg == "tiny" else f"mergevq_imagenet:{arg}")
    losses = ("pixel", "perceptual", "adversarial", "entropy", "commitment", "alignment")
    config.losses.update({f"{name}_weight": 0.0 for name in losses} | {"source_weight": 1.0})
    config.model.recovery.update({"positions": "starts", "num_layers": 0})
    config.optimizer = {
        "only": ["^recovery/"],
        "learning_rate": 3e-3 if arg == "tiny" else 3e-4,
        "schedule": "cosine",
        "warmup": {"steps": 200},
        "final_fraction": 0.02,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
    }
    config.update({"teacher": None, "blocks_from": None, "init_from": "tiny" if arg == "tiny" else None})
    config.data.batch_size = 32 if arg == "tiny" else 256
    config.loop.duration = {"steps": 4000} if arg == "tiny" else {"epochs": 10.0}
    return config
