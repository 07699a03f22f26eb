"""State-dict names of FLUX's transformer, in both directions: diffusers' and those of FLUX's own single files.

Arrays keep their dtype: bfloat16 files give bfloat16 parameters.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime_jax.weights import LINEAR, Rule, Transform, fits, import_weights, joined, layer
from runtime_jax.weights.published import unwrapped
from tokenverse_jax.flux.layers import MLP_RATIO
from tokenverse_jax.flux.model import FluxConfig, param_shapes


def _modulation(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"{target}/lin/kernel", LINEAR), Rule(f"{source}.bias", f"{target}/bias")


def _joined_layer(sources: tuple[str, ...], target: str, shares: tuple[int, ...] = ()) -> tuple[Rule, ...]:
    return (
        *joined([f"{source}.weight" for source in sources], f"{target}/kernel", LINEAR, shares),
        *joined([f"{source}.bias" for source in sources], f"{target}/bias", shares=shares),
    )


def _swap_halves(x: np.ndarray) -> np.ndarray:
    return np.roll(x, x.shape[-1] // 2, axis=-1)


# FLUX's last layer makes shift, then scale; diffusers' makes scale, then shift.
_SWAPPED = Transform(_swap_halves, _swap_halves)
_SWAPPED_LINEAR = Transform(lambda x: _swap_halves(x.T), lambda x: _swap_halves(x).T)

_DOUBLE, _SINGLE = "double_blocks.{i}", "single_blocks.{i}"

FLUX = (
    *layer("img_in", "img_in"),
    *layer("txt_in", "txt_in"),
    *(rule for name in ("time", "vector", "guidance") for rule in layer(f"{name}_in.{{part}}", f"{name}_in/{{part}}")),
    *_modulation(f"{_DOUBLE}.{{stream}}_mod.lin", "double_blocks[i]/{stream}_mod"),
    *layer(f"{_DOUBLE}.{{stream}}_attn.qkv", "double_blocks[i]/{stream}_attn/qkv"),
    Rule(f"{_DOUBLE}.{{stream}}_attn.norm.{{part}}.scale", "double_blocks[i]/{stream}_attn/norm/{part}/scale"),
    *layer(f"{_DOUBLE}.{{stream}}_attn.proj", "double_blocks[i]/{stream}_attn/proj"),
    *layer(f"{_DOUBLE}.{{stream}}_mlp.0", "double_blocks[i]/{stream}_mlp/in_layer"),
    *layer(f"{_DOUBLE}.{{stream}}_mlp.2", "double_blocks[i]/{stream}_mlp/out_layer"),
    *_modulation(f"{_SINGLE}.modulation.lin", "single_blocks[i]/modulation"),
    *layer(f"{_SINGLE}.linear1", "single_blocks[i]/linear1"),
    Rule(f"{_SINGLE}.norm.{{part}}.scale", "single_blocks[i]/norm/{part}/scale"),
    *layer(f"{_SINGLE}.linear2", "single_blocks[i]/linear2"),
    *layer("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation"),
    *layer("final_layer.linear", "final_layer/linear"),
)


def _diffusers_stream(name: str, qkv: tuple[str, ...], norms: str, out: str, mlp: str, mod: str) -> tuple[Rule, ...]:
    """One stream of a double block."""
    source, target = "transformer_blocks.{i}", f"double_blocks[i]/{name}"
    return (
        *_modulation(f"{source}.{mod}.linear", f"{target}_mod"),
        *_joined_layer(tuple(f"{source}.attn.{part}" for part in qkv), f"{target}_attn/qkv"),
        Rule(f"{source}.attn.{norms}_q.weight", f"{target}_attn/norm/query_norm/scale"),
        Rule(f"{source}.attn.{norms}_k.weight", f"{target}_attn/norm/key_norm/scale"),
        *layer(f"{source}.attn.{out}", f"{target}_attn/proj"),
        *layer(f"{source}.{mlp}.net.0.proj", f"{target}_mlp/in_layer"),
        *layer(f"{source}.{mlp}.net.2", f"{target}_mlp/out_layer"),
    )


_S = "single_transformer_blocks.{i}"

DIFFUSERS = (
    *layer("x_embedder", "img_in"),
    *layer("context_embedder", "txt_in"),
    *(
        rule
        for source, target in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in"))
        for number, part in ((1, "in_layer"), (2, "out_layer"))
        for rule in layer(f"time_text_embed.{source}_embedder.linear_{number}", f"{target}/{part}")
    ),
    *_diffusers_stream("img", ("to_q", "to_k", "to_v"), "norm", "to_out.0", "ff", "norm1"),
    *_diffusers_stream(
        "txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added", "to_add_out", "ff_context", "norm1_context"
    ),
    *_modulation(f"{_S}.norm.linear", "single_blocks[i]/modulation"),
    *_joined_layer(
        (f"{_S}.attn.to_q", f"{_S}.attn.to_k", f"{_S}.attn.to_v", f"{_S}.proj_mlp"),
        "single_blocks[i]/linear1",
        shares=(1, 1, 1, MLP_RATIO),
    ),
    Rule(f"{_S}.attn.norm_q.weight", "single_blocks[i]/norm/query_norm/scale"),
    Rule(f"{_S}.attn.norm_k.weight", "single_blocks[i]/norm/key_norm/scale"),
    *layer(f"{_S}.proj_out", "single_blocks[i]/linear2"),
    Rule("norm_out.linear.weight", "final_layer/adaLN_modulation/kernel", _SWAPPED_LINEAR),
    Rule("norm_out.linear.bias", "final_layer/adaLN_modulation/bias", _SWAPPED),
    *layer("proj_out", "final_layer/linear"),
)


def convert_transformer(source: Mapping[str, np.ndarray], config: FluxConfig) -> dict[str, Any]:
    """The parameters of `Flux(config)` from either program's state dict; WeightError where it does not fit."""
    source = unwrapped(source, functools.partial(fits, (*FLUX, *DIFFUSERS)))
    return import_weights(FLUX if "img_in.weight" in source else DIFFUSERS, source, param_shapes(config))
