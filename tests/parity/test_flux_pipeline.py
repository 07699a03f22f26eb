"""diffusers' FluxPipeline as a foreign client: it loads the folders that we write, and draws what we draw."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from tiny_pipeline import FLUX, write_tiny_pipeline

from runtime_jax.prng import Stream, stream_key
from tokenverse_jax.flux.autoencoder import PATCH
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.pretrained import SHIPPED
from tokenverse_jax.flux.sampling import initial_noise

# In steps of 255. Float32 sums in another order, then 24 steps and two networks on top of each other.
TOLERANCE = 2
PROMPTS = ["a red ball on the beach", "a dog"]  # words that both vocabularies have or spell in few letters


def random_folder(folder: Path, *, guidance_embeds: bool) -> Path:
    """A pipeline with random weights; its CLIP takes fewer tokens than usual, which its tokenizer has to know."""
    write_tiny_pipeline(folder, flux=dataclasses.replace(FLUX, guidance_embeds=guidance_embeds))
    path = folder / "tokenizer" / "tokenizer_config.json"
    positions = json.loads((folder / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": positions}))
    return folder


def draw_with_diffusers(folder: Path, ours: Pipeline, noise: np.ndarray, **sampling) -> np.ndarray:
    theirs = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(
        PROMPTS,
        latents=torch.from_numpy(np.array(noise)),
        max_sequence_length=ours.text_length,
        output_type="pil",
        **sampling,
    ).images
    return np.stack([np.asarray(image) for image in images])


def initial_latents(ours: Pipeline, height: int, width: int, seed: int) -> np.ndarray:
    """The noise that `generate` starts from: packed latents."""
    side = PATCH * ours.vae.config.downsampling
    shape = (height // side * width // side, ours.transformer.config.in_channels)
    return np.asarray(initial_noise(stream_key(seed, Stream.SAMPLE), np.arange(len(PROMPTS)), shape))


def largest_difference(folder: Path, *, height: int, width: int, num_steps: int, guidance: float, cfg: float) -> int:
    """Between our images and diffusers' from one folder and the same initial latents, in steps of 255."""
    ours = Pipeline.from_pretrained(folder)
    guidance = guidance if ours.transformer.config.guidance_embeds else None
    mine = ours.generate(
        PROMPTS, height=height, width=width, num_steps=num_steps, guidance=guidance, cfg_scale=cfg, seed=5
    )
    theirs = draw_with_diffusers(
        folder,
        ours,
        initial_latents(ours, height, width, seed=5),
        height=height,
        width=width,
        num_inference_steps=num_steps,
        guidance_scale=guidance or 0.0,
        true_cfg_scale=cfg,
        negative_prompt=[""] * len(PROMPTS) if cfg != 1.0 else None,
    )
    assert mine.shape == theirs.shape == (len(PROMPTS), height, width, 3)
    assert np.asarray(mine).std() > 5  # a picture, not a plain colour
    return int(np.abs(np.asarray(mine).astype(int) - theirs).max())


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_a_random_pipeline_draws_the_same(tmp_path, guidance_embeds, cfg):
    folder = random_folder(tmp_path / "random", guidance_embeds=guidance_embeds)
    settings = {"height": 16, "width": 28, "num_steps": 4, "guidance": 3.5, "cfg": cfg}
    assert largest_difference(folder, **settings) <= TOLERANCE


@pytest.mark.parametrize("exported", [False, True], ids=["as shipped", "our export of it"])
def test_the_shipped_pipeline_draws_the_same(tmp_path, exported):
    folder = SHIPPED["tiny"]
    if exported:
        Pipeline.from_pretrained(folder).save_pretrained(tmp_path / "export")
        folder = tmp_path / "export"
    settings = {"height": 64, "width": 64, "num_steps": 24, "guidance": 3.5, "cfg": 2.5}
    assert largest_difference(folder, **settings) <= TOLERANCE
