"""A random FLUX pipeline of a few kilobytes, tokenizers included, for tests."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import traverse_util
from tokenizers import models, pre_tokenizers, processors, trainers

from runtime_jax.networks.clip import CLIPTextConfig, CLIPTextEncoder
from tokenverse_jax.flux.autoencoder import Autoencoder, AutoencoderConfig
from tokenverse_jax.flux.model import FluxConfig, param_shapes
from tokenverse_jax.flux.model_folder import Part
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.schedule import PRESETS
from tokenverse_jax.flux.text import load_tokenizer
from tokenverse_jax.flux.text_encoders.t5 import T5Config, T5Encoder

TEXT_LENGTH = 24
SIDE = 4  # pixels of a token
CORPUS = [
    "a dog and a cat on the beach",
    "a red striped ball beside a blue star",
    "two dogs, a hat; the dog's toy",
] * 20
FLUX = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 6),
)
VAE = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2)


def write_t5_tokenizer(folder: Path, text_length: int = TEXT_LENGTH) -> None:
    """In the file of FLUX's tokenizer_2/: tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, names | {"tokenizer_class": "T5TokenizerFast", "model_max_length": text_length})


def write_clip_tokenizer(folder: Path) -> None:
    """In the files of FLUX's tokenizer/: vocab.json and merges.txt."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = "<|startoftext|>", "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=[start, end], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True)
    tokenizer.model.save(str(folder))
    names = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_config(folder, names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


def _write_config(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def random_params(shapes: Any, seed: int) -> Any:
    """Every parameter random, so that none of them can be forgotten."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in sorted(traverse_util.flatten_dict(shapes, sep="/").items()):
        spread = np.prod(leaf.shape[leaf.ndim > 2 :][:-1]) ** -0.5 if path.endswith("kernel") else 0.2
        value = path.endswith("scale") + spread * rng.normal(size=leaf.shape)
        leaves[path] = value.astype(np.float32)  # cast on the host: on the device it is a program a shape
    return jax.device_put(traverse_util.unflatten_dict(leaves, sep="/"))


def _part(module: nn.Module, example: Any, seed: int) -> Part:
    variables = jax.eval_shape(module.init, jax.random.key(0), example)
    return Part(module.config, random_params(variables["params"], seed))


def tiny_pipeline(tokenizer_folder: Path, *, flux: FluxConfig = FLUX, seed: int = 0) -> Pipeline:
    """A pipeline with random weights; its tokenizers are written to `tokenizer_folder`, an empty one, on the way."""
    write_clip_tokenizer(tokenizer_folder / "tokenizer")
    write_t5_tokenizer(tokenizer_folder / "tokenizer_2")
    tokenizer, tokenizer_2 = (load_tokenizer(tokenizer_folder / name) for name in ("tokenizer", "tokenizer_2"))
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=flux.pooled_projection_dim,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=flux.joint_attention_dim,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return Pipeline(
        transformer=Part(flux, random_params(param_shapes(flux), seed)),
        vae=_part(Autoencoder(VAE), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32), seed + 1),
        clip=_part(CLIPTextEncoder(clip), ids, seed + 2),
        t5=_part(T5Encoder(t5), ids, seed + 3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        schedule=PRESETS["dev"],
        text_length=TEXT_LENGTH,
        source="tiny",
    )


def write_tiny_pipeline(folder: Path, *, flux: FluxConfig = FLUX, seed: int = 0) -> Path:
    """The folder of a pipeline with random weights."""
    tiny_pipeline(folder, flux=flux, seed=seed).save_pretrained(folder)
    return folder
