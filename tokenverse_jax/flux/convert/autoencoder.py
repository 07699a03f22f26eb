"""State-dict names of FLUX's autoencoder, in both directions: diffusers' and those of FLUX's own ae.safetensors."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.weights import CONV, LINEAR, POINTWISE, Rule, fits, import_weights, layer, norm
from runtime_jax.weights.published import unwrapped
from tokenverse_jax.flux.autoencoder import Autoencoder, AutoencoderConfig
from tokenverse_jax.flux.convert import init_shapes


def _res_block(source: str, target: str, shortcut: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *layer(f"{source}.conv1", f"{target}/conv1", CONV),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *layer(f"{source}.conv2", f"{target}/conv2", CONV),
        *layer(f"{source}.{shortcut}", f"{target}/nin_shortcut", POINTWISE),
    )


def diffusers_table(config: AutoencoderConfig) -> tuple[Rule, ...]:
    """Rules of diffusers' AutoencoderKL, whose decoder counts its levels from the lowest resolution."""
    last, shortcut = len(config.block_out_channels) - 1, "conv_shortcut"
    rules = [
        *_res_block("encoder.down_blocks.{i}.resnets.{j}", "encoder/down_{i}_block_{j}", shortcut),
        *layer("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder/down_{i}_downsample", CONV),
    ]
    for level in range(last + 1):
        source, target = f"decoder.up_blocks.{last - level}", f"decoder/up_{level}"
        rules += _res_block(f"{source}.resnets.{{j}}", f"{target}_block_{{j}}", shortcut)
        rules += layer(f"{source}.upsamplers.0.conv", f"{target}_upsample", CONV)
    for side in ("encoder", "decoder"):
        middle, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        rules += [
            *layer(f"{side}.conv_in", f"{side}/conv_in", CONV),
            *_res_block(f"{middle}.resnets.0", f"{side}/mid/block_1", shortcut),
            *norm(f"{attention}.group_norm", f"{side}/mid/attn_1/norm"),
            *(rule for name in "qkv" for rule in layer(f"{attention}.to_{name}", f"{side}/mid/attn_1/{name}", LINEAR)),
            *layer(f"{attention}.to_out.0", f"{side}/mid/attn_1/proj_out", LINEAR),
            *_res_block(f"{middle}.resnets.1", f"{side}/mid/block_2", shortcut),
            *norm(f"{side}.conv_norm_out", f"{side}/norm_out"),
            *layer(f"{side}.conv_out", f"{side}/conv_out", CONV),
        ]
    return tuple(rules)


# FLUX's own names are those of our modules; its attention's linear layers are 1x1 convolutions.
FLUX = (
    *layer("{side}.conv_in", "{side}/conv_in", CONV),
    *_res_block("encoder.down.{i}.block.{j}", "encoder/down_{i}_block_{j}", "nin_shortcut"),
    *layer("encoder.down.{i}.downsample.conv", "encoder/down_{i}_downsample", CONV),
    *_res_block("{side}.mid.block_{i}", "{side}/mid/block_{i}", "nin_shortcut"),
    *norm("{side}.mid.attn_1.norm", "{side}/mid/attn_1/norm"),
    *(r for name in "qkv" for r in layer(f"{{side}}.mid.attn_1.{name}", f"{{side}}/mid/attn_1/{name}", POINTWISE)),
    *layer("{side}.mid.attn_1.proj_out", "{side}/mid/attn_1/proj_out", POINTWISE),
    *_res_block("decoder.up.{i}.block.{j}", "decoder/up_{i}_block_{j}", "nin_shortcut"),
    *layer("decoder.up.{i}.upsample.conv", "decoder/up_{i}_upsample", CONV),
    *norm("{side}.norm_out", "{side}/norm_out"),
    *layer("{side}.conv_out", "{side}/conv_out", CONV),
)


def convert_autoencoder(source: Mapping[str, np.ndarray], config: AutoencoderConfig) -> dict[str, Any]:
    """The parameters of `Autoencoder(config)` from either program's state dict; WeightError where it does not fit."""
    diffusers = diffusers_table(config)
    source = unwrapped(source, functools.partial(fits, (*FLUX, *diffusers)))
    table = FLUX if "encoder.mid.attn_1.q.weight" in source else diffusers
    image = jax.ShapeDtypeStruct((1, config.downsampling, config.downsampling, 3), jnp.float32)
    return import_weights(table, source, init_shapes(Autoencoder(config), image))
