"""Golden files of CLIP and T5; see check_golden.py."""

from collections.abc import Callable

from golden_tools import Tensors, apply, require_equal, to_nhwc

from runtime_jax.config import build_known
from runtime_jax.networks import clip_files
from runtime_jax.networks.clip import CLIP, CLIPTextConfig, CLIPTextEncoder
from runtime_jax.weights import export_weights
from tokenverse_jax.flux.convert.t5 import T5, convert_t5
from tokenverse_jax.flux.text_encoders.t5 import T5Config, T5Encoder


def run_clip_text(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = build_known(CLIPTextConfig, config, "config.json")
    converted = clip_files.convert_clip_text(params, ours)
    # The reference's modules have no prefix in memory, but its files do, and so has our export.
    written = {f"text_model.{name}": array for name, array in params.items()}
    require_equal(clip_files.export_clip_text(converted), written)
    output = apply({"params": converted}, inputs["input_ids"], module=CLIPTextEncoder(ours))
    return {"hidden": output.hidden, "pooled": output.pooled}


def run_clip(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = clip_files.parse_config(config)
    ignored = {"logit_scale": params["logit_scale"]}
    converted = clip_files.convert_clip(params, ours)
    require_equal(export_weights(clip_files.TABLE, converted) | ignored, params)
    images, texts = apply({"params": converted}, to_nhwc(inputs["x"]), inputs["input_ids"], module=CLIP(ours))
    return {"images": images, "texts": texts}


def run_t5_encoder(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    ours = build_known(T5Config, config, "config.json")
    converted = convert_t5(params, ours)
    # The reference's state dict names its one token embedding twice, its files and our export once.
    require_equal(export_weights(T5, converted) | {"encoder.embed_tokens.weight": params["shared.weight"]}, params)
    return {"hidden": apply({"params": converted}, inputs["input_ids"], module=T5Encoder(ours))}


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {
    "clip": run_clip,
    "clip_text": run_clip_text,
    "t5_encoder": run_t5_encoder,
}
