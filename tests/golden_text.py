"""Golden files of the text encoders; see check_golden.py."""

from collections.abc import Callable

from golden_tools import Tensors, apply, require_equal

from runtime_jax.weights import export_weights
from tokenverse_jax.flux.convert.text_encoders import T5, convert_clip, convert_t5, export_clip, parse_config
from tokenverse_jax.flux.text_encoders.clip import CLIPTextConfig, CLIPTextEncoder
from tokenverse_jax.flux.text_encoders.t5 import T5Config, T5Encoder


def run_clip_text(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = parse_config(CLIPTextConfig, config)
    converted = convert_clip(params, ours)
    # The reference's modules have no prefix in memory, but its files do, and so has our export.
    require_equal(export_clip(converted), {f"text_model.{name}": array for name, array in params.items()})
    output = apply({"params": converted}, inputs["input_ids"], module=CLIPTextEncoder(ours))
    return {"hidden": output.hidden, "pooled": output.pooled}


def run_t5_encoder(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = parse_config(T5Config, config)
    converted = convert_t5(params, ours)
    # The reference's state dict names its one token embedding twice, its files and our export once.
    require_equal(export_weights(T5, converted) | {"encoder.embed_tokens.weight": params["shared.weight"]}, params)
    return {"hidden": apply({"params": converted}, inputs["input_ids"], module=T5Encoder(ours))}


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {
    "clip_text": run_clip_text,
    "t5_encoder": run_t5_encoder,
}
