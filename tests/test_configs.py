"""Every config file builds; the full-size ones carry the published figures."""

import pytest

from mergevq_jax.tokenizer.config import PRESETS
from mergevq_jax.tokenizer.run import TrainConfig
from runtime_jax.config import build, load, to_dict

LPIPS = "lpips=('vgg16.safetensors',)"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_imagenet_configs_build(preset):
    config = build(TrainConfig, load(f"configs/mergevq_imagenet.py:{preset}", [LPIPS]))
    assert config.model == PRESETS[preset]
    assert config.merge_ratio.keeps[0 if preset.startswith("r") else 1] == config.model.keep
    assert config.optimizer.clip_norm == (5.0 if preset in ("r-d64", "gr-d96") else None)
    assert build(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize("arg", ["full", "demo"])
def test_tiny_configs_build(arg):
    config = build(TrainConfig, load(f"configs/mergevq_tiny.py:{arg}"))
    assert config.model == PRESETS["tiny"]
    assert config.losses.discriminator_start < config.loop.duration.steps


def test_full_size_needs_weights_for_its_perceptual_loss():
    with pytest.raises(ValueError, match="lpips names no weights"):
        build(TrainConfig, load("configs/mergevq_imagenet.py:gr-d64"))
