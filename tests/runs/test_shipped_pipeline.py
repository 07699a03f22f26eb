"""The shipped tiny FLUX pipeline: its size, and that it draws what captions name."""

import numpy as np
import pytest

from mini_scenes.judge import accuracies, follows
from runtime_jax.config import build, load
from tokenverse_jax.base.report import held_out_captions
from tokenverse_jax.base.run import BaseConfig
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.pretrained import SHIPPED


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("tiny")


def test_its_folder_is_small():
    assert sum(path.stat().st_size for path in SHIPPED["tiny"].rglob("*") if path.is_file()) < 12e6


def test_it_is_what_its_config_makes(pipeline):
    config = build(BaseConfig, load("configs/flux_tiny.py"))
    assert pipeline.transformer.config == config.text_to_image.flux
    assert pipeline.text_length == config.text_to_image.captions.text_length
    assert pipeline.usual.size == config.image_size


def test_it_draws_what_captions_name(pipeline):
    captions = held_out_captions("validation", 32)
    images = pipeline.generate(captions, height=64, width=64, num_steps=12, cfg_scale=pipeline.usual.cfg_scale)
    shares = accuracies(follows(captions, np.asarray(images)))
    # Seen: 1, 0.979, 0.955, 0.815, 0.938; another rounding may change a picture or two.
    for kind, bound in {"background": 0.93, "class": 0.93, "color": 0.86, "texture": 0.74, "count": 0.87}.items():
        assert shares[kind].mean > bound, kind
