"""T5's encoder in the layout of transformers: a pipeline's text_encoder_2/.

Arrays keep their dtype: bfloat16 files give bfloat16 parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.config import to_dict
from runtime_jax.weights import LINEAR, Rule, WeightError, import_weights
from tokenverse_jax.flux.convert import init_shapes
from tokenverse_jax.flux.text_encoders.t5 import T5Config, T5Encoder

Tensors = Mapping[str, np.ndarray]
TOKEN = jax.ShapeDtypeStruct((1, 1), jnp.int32)  # the smallest input of an encoder

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


def config_json(config: T5Config) -> dict[str, Any]:
    """The config.json from which transformers builds the same encoder."""
    fields = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
    return fields | to_dict(config)
