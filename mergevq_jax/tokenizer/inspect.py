"""`mergevq inspect`: what a model costs, from its config alone."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mergevq_jax.tokenizer import model
from mergevq_jax.tokenizer import train as stage1
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.losses.perceptual import lpips_shapes
from mergevq_jax.tokenizer.run import TrainConfig, load_frozen, make_program
from runtime_jax.cost import program_row, size_rows, table
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import MeshConfig, make_mesh
from runtime_jax.training.optimizer import make_optimizer
from runtime_jax.training.update import Optimizer


def parts_of(params: model.Params) -> dict[str, Any]:
    """Parameters of each part; the alignment head is not counted to the encoder, as in the paper's table."""
    encoder = {name: part for name, part in params["encoder"].items() if name != "head"}
    return params | {"encoder": encoder, "alignment head": params["encoder"].get("head", {})}


def forward_programs(
    config: TokenizerConfig, params: model.Params, batch_size: int, compute: Compute = Compute()
) -> dict[str, Any]:
    """Traced encode and decode of training-size images, not compiled; `params` may be shapes."""
    side = config.resolution
    images = jax.ShapeDtypeStruct((batch_size, side, side, config.in_channels), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch_size, config.keep, config.z_channels), jnp.float32)
    source_map = jax.ShapeDtypeStruct((batch_size, config.raw_tokens), jnp.int32)
    grid = config.grid(side, side)
    encode = lambda params, images: model.encode(params, config, images, keep=config.keep, compute=compute)  # noqa: E731
    decode = lambda params, codes, sources: model.decode(params, config, codes, sources, grid, compute=compute)  # noqa: E731
    return {
        "encode": jax.jit(encode).trace(params, images),
        "decode": jax.jit(decode).trace(params, codes, source_map),
    }


def inspect_model(
    config: TokenizerConfig,
    batch_size: int,
    *,
    params: model.Params | None = None,
    compute: Compute = Compute(),
    compile: bool = False,
) -> str:
    """Tables of parameters, and of FLOPs and bytes of encode and decode; `params`: their shapes, where known."""
    params = model.param_shapes(config) if params is None else params
    head = f"{config.resolution} px, {config.raw_tokens} raw tokens, {config.keep} kept, {config.bits} bits"
    programs = forward_programs(config, params, batch_size, compute)
    rows = [program_row(name, program, compile) for name, program in programs.items()]
    sizes = table(("part", "parameters", "MB, float32"), size_rows(parts_of(params)))
    return "\n".join([head, "", *sizes, "", *table((f"batch of {batch_size}", "GFLOP", "temporary MB"), rows)])


def inspect_config(config: TrainConfig, *, compile: bool = False) -> str:
    """As `inspect_model`, and the train step: bytes of its state, FLOPs, and with `compile` its temporary memory."""
    batch_size = config.data.batch_size
    state, step = trace_train_step(config, batch_size)
    forward = inspect_model(config.model, batch_size, params=state.params, compute=config.compute, compile=compile)
    name = "train step" + (", without the alignment loss" if config.losses.alignment_weight else "")
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "discriminator and its optimizer": (state.disc_params, state.disc_stats, state.disc_opt_state),
        "whole train state": state,
    }
    return "\n".join(
        [
            forward,
            "",
            *table(("train state", "numbers", "MB"), size_rows(parts)),
            "",
            *table((f"batch of {batch_size}", "GFLOP", "temporary MB"), [program_row(name, step, compile)]),
        ]
    )


def trace_train_step(config: TrainConfig, batch_size: int) -> tuple[stage1.TrainState, Any]:
    """Shapes of the train state, and the traced step; without the alignment loss, whose teacher is not known here."""
    losses = replace(config.losses, perceptual_weight=0.0, alignment_weight=0.0)
    step_config, frozen = load_frozen(replace(config, losses=losses))
    if config.losses.perceptual_weight:
        losses = replace(losses, perceptual_weight=config.losses.perceptual_weight)
        step_config, frozen = replace(step_config, losses=losses), stage1.Frozen(lpips=lpips_shapes())
    rate = optax.constant_schedule(1.0)
    optimizers = stage1.Optimizers(
        Optimizer(make_optimizer(config.optimizer, rate), rate),
        Optimizer(make_optimizer(config.discriminator_optimizer, rate), rate),
    )
    side = config.model.resolution
    batch = {"image": jax.ShapeDtypeStruct((batch_size, side, side, config.model.in_channels), jnp.uint8)}
    program = make_program(step_config, optimizers, make_mesh(MeshConfig(), jax.devices()[:1]), frozen)
    return program.abstract_state, program.trace(batch, config.model.keep)
