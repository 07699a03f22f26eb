"""The released state-dict layout, in both directions.

Saved tokenizers use the same names, prefixed with encoder., decoder. and recovery.
"""

from collections.abc import Mapping

import numpy as np

from mergevq_jax.tokenizer.config import TokenizerConfig
from runtime_jax.weights import CONV, POINTWISE, Rule, WeightError, layer, norm, prefixed
from runtime_jax.weights.published import recognized, unwrapped


def _block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *layer(f"{source}.attn.qkv", f"{target}/attn/qkv"),
        *layer(f"{source}.attn.proj", f"{target}/attn/proj"),
        Rule(f"{source}.ls1.gamma", f"{target}/ls1/gamma"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *layer(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
        *layer(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
        Rule(f"{source}.ls2.gamma", f"{target}/ls2/gamma"),
    )


def _res_block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        Rule(f"{source}.conv1.weight", f"{target}/conv1/kernel", CONV),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        Rule(f"{source}.conv2.weight", f"{target}/conv2/kernel", CONV),
        Rule(f"{source}.nin_shortcut.weight", f"{target}/nin_shortcut/kernel", CONV),
    )


def encoder_table(config: TokenizerConfig) -> tuple[Rule, ...]:
    """Rules of `MergeVQEncoder`."""
    if config.isotropic is None:
        stem = (
            Rule("conv_in.weight", "stem/conv_in/kernel", CONV),
            *_res_block("down.{i}.block.{j}", "stem/down_{i}_block_{j}"),
            *layer("down.{i}.downsample", "stem/down_{i}_downsample", CONV),
        )
    else:
        stem = (*layer("conv_in.0", "stem/conv_in", CONV), *norm("conv_in.1", "stem/norm_in"))
    middle = layer("dist_head.2", "head/fc2") if config.dist_head == "layer3" else norm("dist_head.2", "head/norm")
    return (
        *stem,
        Rule("attn.cls_token", "attn/cls_token"),
        *_block("attn.blocks.{i}", "attn/blocks_{i}"),
        *norm("norm_out", "norm_out"),
        *layer("conv_out", "conv_out", POINTWISE),
        *_block("rep_attn.blocks.{i}", "head/blocks_{i}"),
        *layer("dist_head.0", "head/fc1"),
        *middle,
        *layer("dist_head.4" if config.dist_head == "layer3" else "dist_head.3", "head/out"),
    )


DECODER = (
    *layer("conv_in", "conv_in", CONV),
    *layer("attn.pos_embed", "attn/pos_embed", CONV),
    *_block("attn.blocks.{i}", "attn/blocks[i]"),
    *layer("attn.blocks.{i}.mlp.dwconv", "attn/blocks[i]/mlp/dwconv", CONV),
    *layer("adaptive.{i}.gamma", "adaptive_{i}/gamma"),
    *layer("adaptive.{i}.beta", "adaptive_{i}/beta"),
    *_res_block("up.{i}.block.{j}", "up_{i}_block_{j}"),
    *layer("up.{i}.upsample.conv1", "up_{i}_upsample", CONV),
    *norm("norm_out", "norm_out"),
    *layer("conv_out", "conv_out", CONV),
)

RECOVERY = (
    Rule("rec_tokens", "rec_tokens"),
    *layer("rec_embed", "rec_embed"),
    *norm("norm_in", "norm_in"),
    *layer("rec_head", "rec_head"),
    *norm("blocks.{i}.norm1", "blocks_{i}/norm1"),
    *layer("blocks.{i}.q", "blocks_{i}/q"),
    *layer("blocks.{i}.kv", "blocks_{i}/kv"),
    *layer("blocks.{i}.proj", "blocks_{i}/proj"),
    Rule("blocks.{i}.gamma1", "blocks_{i}/ls1/gamma"),
    *norm("blocks.{i}.norm2", "blocks_{i}/norm2"),
    *layer("blocks.{i}.mlp.fc1", "blocks_{i}/mlp/fc1"),
    *layer("blocks.{i}.mlp.fc2", "blocks_{i}/mlp/fc2"),
    Rule("blocks.{i}.gamma2", "blocks_{i}/ls2/gamma"),
    *_block("self_blocks.{i}", "self_blocks_{i}"),  # the paper's; the released module has none
    *layer("rec_place", "rec_place"),  # from here on: not released, with positions only
    *_res_block("res_blocks.{i}", "res_blocks_{i}"),
    Rule("offset_bias", "offset_bias"),
)


def tokenizer_table(config: TokenizerConfig) -> tuple[Rule, ...]:
    """Rules of a whole tokenizer."""
    return (
        *prefixed(encoder_table(config), "encoder.", "encoder/"),
        *prefixed(DECODER, "decoder.", "decoder/"),
        *prefixed(RECOVERY, "recovery.", "recovery/"),
    )


def from_released(tensors: Mapping[str, np.ndarray], *, ema: bool = True) -> dict[str, np.ndarray]:
    """The tokenizer's part of a released stage-1 checkpoint, under the names that `tokenizer_table` reads.

    Args:
      tensors: the Lightning checkpoint's `state_dict`, as safetensors.
      ema: take the moving averages (stored as `model_ema.` + the name without dots) instead of the last weights.

    Raises:
      WeightError: no encoder or decoder, or no moving averages of them.
    """
    parts = ("encoder.", "decoder.", "recovery.")
    tensors = unwrapped(tensors, lambda name: name.startswith(parts))
    own = {name: array for name, array in tensors.items() if name.startswith(parts)}
    if not own:
        raise WeightError(f"no encoder.* or decoder.* among the {len(tensors)} tensors: {no_stage(1, tensors)}")
    if not ema:
        return own
    averaged = {name: "model_ema." + name.replace(".", "") for name in own}
    missing = [name for name, average in averaged.items() if average not in tensors]
    if missing:
        raise WeightError(f"no moving average of {', '.join(missing[:3])} ({len(missing)} in all); use ema=False")
    return {name: tensors[average] for name, average in averaged.items()}


def no_stage(stage: int, tensors: Mapping[str, np.ndarray]) -> str:
    """For errors: what a state dict without a network of this stage is."""
    what = recognized(tensors)
    return f"not a stage-{stage} checkpoint" + (f", but {what}" if what else "")
