"""What the tests of generators' runs share: a tokenizer of 16 tokens, pictures in two classes, and a run's config."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from generator_tools import random_params
from PIL import Image

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.kinds.positions import new_counts
from mergevq_jax.generator.model import GeneratorInfo, GeneratorModel, TokenizerRef
from mergevq_jax.generator.run import TrainConfig
from mergevq_jax.tokenizer.config import RecoveryConfig, TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer
from mergevq_jax.tokenizer.model import param_shapes as tokenizer_shapes
from runtime_jax.config import build, to_dict

TOKENIZER = TokenizerConfig(
    resolution=8,
    ch=8,
    ch_mult=(1, 1),
    norm_num_groups=4,
    num_res_blocks=(0, 0),
    num_att_blocks=1,
    num_heads=1,
    z_channels=4,
    keep=10,
    dist_head=None,
    recovery=None,
)
RECOVERING = dataclasses.replace(TOKENIZER, recovery=RecoveryConfig(rec_embed_dim=16, num_layers=1, num_heads=1))
MODEL = GeneratorConfig(
    num_layers=1,
    dim=16,
    num_heads=2,
    ffn_dim=24,
    head_layers=1,
    vocab_sizes=(2, 8),
    num_classes=2,
    class_dropout=0.5,
    grid=(4, 4),
    keeps=(10, 16),
)
IMAGES = 10


def random_tokenizer(seed: int = 0, config: TokenizerConfig = TOKENIZER) -> Tokenizer:
    """Codes of random weights vary from token to token."""
    rng = np.random.default_rng(seed)
    shapes = tokenizer_shapes(config)
    return Tokenizer(config, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes))


def write_pictures(folder: Path, size: int = 8) -> Path:
    """Ten pictures in the classes even and odd."""
    rng = np.random.default_rng(1)
    for number in range(IMAGES):
        path = folder / ("even", "odd")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path)
    return folder


def images_of(pictures: Path, **changes) -> dict:
    """Config of data that are pictures."""
    return {"image_size": 8, "batch_size": 8, "sources": [{"kind": "folder", "path": str(pictures)}], **changes}


def run_config(tokenizer: Path, data: dict, *, steps: int = 4, **changes) -> TrainConfig:
    """A run of four steps that saves every second."""
    fields = {
        "seed": 3,
        "model": to_dict(MODEL),
        "tokenizer": str(tokenizer),
        "merge_ratio": {"keeps": [10, 16], "weights": [0.5, 0.5]},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 1.0},
        "data": data,
        "evaluation": {"data": {**data, "shuffle": False}, "batches": 1, "preview_classes": 2, "preview_images": 2},
        "loop": {"duration": {"steps": steps}, "log_every": 1, "checkpoint_every": 2, "min_free_bytes": 0},
    }
    return build(TrainConfig, {**fields, **changes})


def random_generator(tokenizer: Tokenizer, name: str, kind: str = "merge") -> GeneratorModel:
    """A generator with random weights, of the tokenizer's codes."""
    architecture = dataclasses.replace(MODEL, position_instruction=kind == "random")
    info = GeneratorInfo(
        kind=kind,
        window=3,
        classes=("even", "odd"),
        tokenizer=TokenizerRef(name=name, fingerprint=tokenizer.code_fingerprint()),
        architecture=architecture,
    )
    starts = new_counts(architecture) if kind == "random" else None
    return GeneratorModel(info, random_params(architecture), starts)
