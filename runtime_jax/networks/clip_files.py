"""CLIP's files in the layout of transformers: whole models, and the text half alone (a pipeline's text_encoder/)."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.config import build_known, to_dict
from runtime_jax.networks.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPTextEncoder, CLIPVisionConfig
from runtime_jax.prng import key_shape
from runtime_jax.weights import CONV, LINEAR, Rule, WeightError, export_weights, import_weights, layer, norm, prefixed
from runtime_jax.weights.hub import local_path, read_tensors

Tensors = Mapping[str, np.ndarray]
WEIGHTS = ("*.safetensors", "config.json")  # what `load_clip` reads of a folder
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
# The text fields that a config.json may leave out: transformers' defaults, ViT-B/32's sizes.
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}

_LAYER = "encoder.layers.{i}"
_BLOCKS = (
    *norm(f"{_LAYER}.layer_norm1", "blocks[i]/layer_norm1"),
    *layer(f"{_LAYER}.self_attn.q_proj", "blocks[i]/q_proj"),
    *layer(f"{_LAYER}.self_attn.k_proj", "blocks[i]/k_proj"),
    *layer(f"{_LAYER}.self_attn.v_proj", "blocks[i]/v_proj"),
    *layer(f"{_LAYER}.self_attn.out_proj", "blocks[i]/out_proj"),
    *norm(f"{_LAYER}.layer_norm2", "blocks[i]/layer_norm2"),
    *layer(f"{_LAYER}.mlp.fc1", "blocks[i]/fc1"),
    *layer(f"{_LAYER}.mlp.fc2", "blocks[i]/fc2"),
)
TEXT_TABLE = (
    Rule("embeddings.token_embedding.weight", "token_embedding/embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding/embedding"),
    *_BLOCKS,
    *norm("final_layer_norm", "final_layer_norm"),
)
VISION_TABLE = (
    Rule("embeddings.class_embedding", "class_embedding"),
    Rule("embeddings.patch_embedding.weight", "patch_embedding/kernel", CONV),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    *norm("pre_layrnorm", "pre_layer_norm"),  # spelt so
    *_BLOCKS,
    *norm("post_layernorm", "post_layer_norm"),
)
TABLE = (
    *prefixed(TEXT_TABLE, "text_model.", "text/"),
    *prefixed(VISION_TABLE, "vision_model.", "vision/"),
    Rule("text_projection.weight", "text_projection/kernel", LINEAR),
    Rule("visual_projection.weight", "visual_projection/kernel", LINEAR),
)
# Older files store the numbers of the positions; those of whole models hold the vision half as well.
_IGNORED = ("logit_scale", r"((text|vision)_model\.)?embeddings\.position_ids")
_TEXT_IGNORED = (*_IGNORED, r"(vision_model|visual_projection|text_projection)\..*")


def convert_clip_text(source: Tensors, config: CLIPTextConfig) -> dict[str, Any]:
    """The parameters of `CLIPTextEncoder(config)`; arrays keep their dtype.

    Args:
      source: state dict, its names with or without "text_model." in front; the vision half is left out.

    Raises:
      WeightError: names or shapes do not fit.
    """
    source = {name.removeprefix("text_model."): array for name, array in source.items()}
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(CLIPTextEncoder(config).init, key_shape(), ids)["params"]
    return import_weights(TEXT_TABLE, source, shapes, ignore=_TEXT_IGNORED)


def export_clip_text(params: Any) -> dict[str, np.ndarray]:
    """The state dict of transformers' CLIPTextModel; every version of it reads names that begin with "text_model."."""
    return {f"text_model.{name}": array for name, array in export_weights(TEXT_TABLE, params).items()}


def text_config_json(config: CLIPTextConfig) -> dict[str, Any]:
    """The config.json from which transformers builds the same text transformer."""
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | to_dict(config)


def convert_clip(source: Tensors, config: CLIPConfig) -> dict[str, Any]:
    """The parameters of `CLIP(config)`, float32, from the state dict of transformers' CLIPModel.

    Raises:
      WeightError: names or shapes do not fit.
    """
    source = {name: array.astype(np.float32) for name, array in source.items()}
    return import_weights(TABLE, source, param_shapes(config), ignore=_IGNORED)


def param_shapes(config: CLIPConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `CLIP(config)`."""
    side = config.vision.image_size
    inputs = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(CLIP(config).init, key_shape(), *inputs)["params"]


def parse_config(fields: Mapping[str, Any], path: str = "config.json") -> CLIPConfig:
    """The sizes in a config.json of transformers' CLIPModel.

    Raises:
      WeightError: another kind of model.
      ConfigError: a value that is not supported.
    """
    if fields.get("model_type") != "clip":
        raise WeightError(f"{path}: model_type = {fields.get('model_type')!r}, but 'clip' is needed")

    def half(name: str) -> dict[str, Any]:
        return dict(fields.get(name) or {}) | dict(fields.get(f"{name}_dict") or {})  # the second in older files

    return CLIPConfig(
        text=build_known(CLIPTextConfig, _TEXT_DEFAULTS | half("text_config"), f"{path}.text_config"),
        vision=build_known(CLIPVisionConfig, half("vision_config"), f"{path}.vision_config"),
        projection_dim=fields.get("projection_dim", 512),
    )


def load_clip(source: str | os.PathLike) -> tuple[CLIPConfig, dict[str, Any]]:
    """Config and parameters of a folder in transformers' layout, or a hub id (openai/clip-vit-large-patch14).

    Raises:
      WeightError: the source is missing, unreadable or does not fit.
    """
    folder = local_path(source, WEIGHTS)
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise WeightError(f"{folder / 'config.json'}: not a readable config.json ({error})") from error
    config = parse_config(fields, str(folder / "config.json"))
    return config, convert_clip(read_tensors(folder), config)
