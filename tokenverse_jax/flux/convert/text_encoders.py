"""CLIP's text transformer and T5's encoder in the transformers layout: a pipeline's text_encoder/ and text_encoder_2/.

Arrays keep their dtype: bfloat16 files give bfloat16 parameters.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.config import build, to_dict
from runtime_jax.weights import LINEAR, Rule, WeightError, export_weights, import_weights, layer, norm
from tokenverse_jax.flux.convert import init_shapes
from tokenverse_jax.flux.text_encoders.clip import CLIPTextConfig, CLIPTextEncoder
from tokenverse_jax.flux.text_encoders.t5 import T5Config, T5Encoder

Tensors = Mapping[str, np.ndarray]
Config = TypeVar("Config", CLIPTextConfig, T5Config)
TOKEN = jax.ShapeDtypeStruct((1, 1), jnp.int32)  # the smallest input of an encoder


_LAYER = "encoder.layers.{i}"
CLIP = (
    Rule("embeddings.token_embedding.weight", "token_embedding/embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding/embedding"),
    *norm(f"{_LAYER}.layer_norm1", "blocks[i]/layer_norm1"),
    *layer(f"{_LAYER}.self_attn.q_proj", "blocks[i]/q_proj"),
    *layer(f"{_LAYER}.self_attn.k_proj", "blocks[i]/k_proj"),
    *layer(f"{_LAYER}.self_attn.v_proj", "blocks[i]/v_proj"),
    *layer(f"{_LAYER}.self_attn.out_proj", "blocks[i]/out_proj"),
    *norm(f"{_LAYER}.layer_norm2", "blocks[i]/layer_norm2"),
    *layer(f"{_LAYER}.mlp.fc1", "blocks[i]/fc1"),
    *layer(f"{_LAYER}.mlp.fc2", "blocks[i]/fc2"),
    *norm("final_layer_norm", "final_layer_norm"),
)
# Files of whole CLIP models hold the vision half as well; older ones store the numbers 0 to 76.
CLIP_IGNORED = (r"(vision_model|visual_projection|text_projection)\..*", "logit_scale", r"embeddings\.position_ids")

_ATTENTION, _MLP = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
T5 = (
    Rule("shared.weight", "shared/embedding"),
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias/embedding"),
    Rule(f"{_ATTENTION}.layer_norm.weight", "blocks[i]/attention_layer_norm/scale"),
    *(Rule(f"{_ATTENTION}.SelfAttention.{name}.weight", f"blocks[i]/{name}/kernel", LINEAR) for name in "qkvo"),
    Rule(f"{_MLP}.layer_norm.weight", "blocks[i]/mlp_layer_norm/scale"),
    *(
        Rule(f"{_MLP}.DenseReluDense.{name}.weight", f"blocks[i]/{name}/kernel", LINEAR)
        for name in ("wi_0", "wi_1", "wo")
    ),
    Rule("encoder.final_layer_norm.weight", "final_layer_norm/scale"),
)
T5_IGNORED = (r"decoder\..*", r"lm_head\..*")


def convert_clip(source: Tensors, config: CLIPTextConfig) -> dict[str, Any]:
    """The parameters of `CLIPTextEncoder(config)`.

    Args:
      source: state dict, its names with or without "text_model." in front.

    Raises:
      WeightError: names or shapes do not fit.
    """
    source = {name.removeprefix("text_model."): array for name, array in source.items()}
    return import_weights(CLIP, source, init_shapes(CLIPTextEncoder(config), TOKEN), ignore=CLIP_IGNORED)


def convert_t5(source: Tensors, config: T5Config) -> dict[str, Any]:
    """The parameters of `T5Encoder(config)`.

    Args:
      source: state dict, with the token embedding under one or both of its names.

    Raises:
      WeightError: names or shapes do not fit, or the two token embeddings differ.
    """
    source = dict(source)
    embedding = source.pop("encoder.embed_tokens.weight", None)
    if embedding is not None and not np.array_equal(source.setdefault("shared.weight", embedding), embedding):
        raise WeightError("shared.weight and encoder.embed_tokens.weight differ: the encoder has one token embedding")
    return import_weights(T5, source, init_shapes(T5Encoder(config), TOKEN), ignore=T5_IGNORED)


def export_clip(params: Any) -> dict[str, np.ndarray]:
    """The state dict of transformers' CLIPTextModel; every version of it reads names that begin with "text_model."."""
    return {f"text_model.{name}": array for name, array in export_weights(CLIP, params).items()}


def parse_config(cls: type[Config], fields: Mapping[str, Any], path: str = "config.json") -> Config:
    """The encoder's config from the fields of its config.json; ignores fields that `cls` lacks.

    Raises:
      ConfigError: a size is missing, or a variant that is not supported (ungated T5, another activation).
    """
    known = {field.name for field in dataclasses.fields(cls)}
    return build(cls, {name: value for name, value in fields.items() if name in known}, path)


def config_json(config: CLIPTextConfig | T5Config) -> dict[str, Any]:
    """The inverse of `parse_config`: the config.json from which transformers builds the same encoder."""
    if isinstance(config, CLIPTextConfig):
        fields = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    else:
        fields = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
    return fields | to_dict(config)
