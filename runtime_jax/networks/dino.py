"""DINO (Caron et al. 2021), the first version: a plain ViT; weights in transformers' ViT layout.

The network is `dinov2.DINOv2` without LayerScale. Similarities of DreamBooth and DreamBench++ use it.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime_jax.networks import dinov2
from runtime_jax.networks.dinov2 import DINOv2Config, param_shapes
from runtime_jax.weights import WeightError, import_weights, layer, norm
from runtime_jax.weights.hub import local_path, read_tensors, rename

_LAYER = "encoder.layer.{i}"
TABLE = (
    *(rule for rule in dinov2.TABLE if rule.source.startswith(("embeddings.", "layernorm.", f"{_LAYER}.attention."))),
    *norm(f"{_LAYER}.layernorm_before", "blocks[i]/norm1"),
    *norm(f"{_LAYER}.layernorm_after", "blocks[i]/norm2"),
    *layer(f"{_LAYER}.mlp.fc1", "blocks[i]/fc1"),
    *layer(f"{_LAYER}.mlp.fc2", "blocks[i]/fc2"),
)
_IGNORED = (r"pooler\..*",)
# From the names in files, which stay those of transformers 4, and in memory since version 5.
_RENAMES = (
    (r"^vit\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def convert_dino(source: Mapping[str, np.ndarray], config: DINOv2Config) -> dict[str, Any]:
    """The parameters of `DINOv2(config)`, float32, from the state dict of transformers' ViTModel.

    Raises:
      WeightError: names or shapes that do not fit.
    """
    tensors = {rename(name, _RENAMES): array.astype(np.float32) for name, array in source.items()}
    return import_weights(TABLE, tensors, param_shapes(config), ignore=_IGNORED)


def parse_config(fields: Mapping[str, Any]) -> DINOv2Config:
    """The sizes in a `config.json` of transformers' ViTModel.

    Raises:
      WeightError: another kind of model, or an unsupported variant.
    """
    required = {"model_type": "vit", "qkv_bias": True, "hidden_act": "gelu", "num_channels": 3}
    for name, value in required.items():
        if fields.get(name, value) != value:
            raise WeightError(f"ViT config.json: {name} = {fields[name]!r}; only {value!r} is supported")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
    if missing := [name for name in sizes if not isinstance(fields.get(name), int)]:
        raise WeightError(f"ViT config.json: not a whole number: {', '.join(missing)}")
    width, layers, heads, hidden, patch, side = (fields[name] for name in sizes)
    if hidden % width:
        raise WeightError(f"ViT config.json: intermediate_size={hidden} is no multiple of hidden_size={width}")
    return DINOv2Config(
        width=width,
        num_layers=layers,
        num_heads=heads,
        mlp_ratio=hidden // width,
        patch_size=patch,
        image_size=side,
        layer_scale=False,
        layer_norm_epsilon=float(fields.get("layer_norm_eps", 1e-12)),
    )


def load_dino(source: str | os.PathLike) -> tuple[DINOv2Config, dict[str, Any]]:
    """Config and parameters of DINO or DINOv2, told apart by config.json: a folder, or a hub id (facebook/dino-vits16).

    Raises:
      WeightError: the source is missing, unreadable or does not fit.
    """
    folder = local_path(source, ("*.safetensors", "config.json"))
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise WeightError(f"{folder / 'config.json'}: not a readable config.json ({error})") from error
    if fields.get("model_type") == "dinov2":
        return dinov2.load_dinov2(folder)
    config = parse_config(fields)
    return config, convert_dino(read_tensors(folder), config)
