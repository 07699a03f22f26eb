"""`mergevq inspect`: what a tokenizer costs, from its config alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mergevq_jax.tokenizer import model
from mergevq_jax.tokenizer import train as stage1
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.losses.perceptual import lpips_shapes
from mergevq_jax.tokenizer.run import TrainConfig, make_program
from runtime_jax.cost import program_row, size_rows, table
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks import dinov2
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import replicated_shapes
from runtime_jax.training.optimizer import make_optimizer
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer


def inspect_model(
    config: TokenizerConfig,
    batch_size: int,
    *,
    params: model.Params | None = None,
    compute: Compute = Compute(),
    compile: bool = False,
) -> str:
    """Tables of parameters, and of FLOPs and bytes of encode and decode; `params`: their shapes, if known."""
    params = model.param_shapes(config) if params is None else params
    encoder = dict(params["encoder"])
    parts = {"encoder": encoder, "alignment head": encoder.pop("head", {})}  # apart, as in the paper's table
    parts |= {name: part for name, part in params.items() if name != "encoder"}
    side = config.resolution
    images = jax.ShapeDtypeStruct((batch_size, side, side, config.in_channels), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch_size, config.keep, config.z_channels), jnp.float32)
    source_map = jax.ShapeDtypeStruct((batch_size, config.raw_tokens), jnp.int32)
    encode = functools.partial(model.encode, config=config, keep=config.keep, compute=compute)
    decode = functools.partial(model.decode, config=config, grid=config.grid(side, side), compute=compute)
    rows = [
        program_row("encode", jax.jit(encode).trace(params, images=images), compile),
        program_row("decode", jax.jit(decode).trace(params, codes=codes, source_map=source_map), compile),
    ]
    return "\n".join(
        [
            f"{side} px, {config.raw_tokens} raw tokens, {config.keep} kept, {config.bits} bits",
            "",
            *table(("part", "parameters", "MB, float32"), size_rows(parts)),
            "",
            *table((f"batch of {batch_size}", "GFLOP", "temporary MB"), rows),
        ]
    )


def inspect_config(config: TrainConfig, *, compile: bool = False) -> str:
    """As `inspect_model`, and the train step: bytes of its state, FLOPs, and with `compile` its temporary memory."""
    batch_size = config.data.batch_size
    state, step = trace_train_step(config, batch_size)
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "discriminator and its optimizer": (state.disc_params, state.disc_stats, state.disc_opt_state),
        "whole train state": state,
    }
    return "\n".join(
        [
            inspect_model(config.model, batch_size, params=state.params, compute=config.compute, compile=compile),
            "",
            *table(("train state", "numbers", "MB"), size_rows(parts)),
            "",
            *table((f"batch of {batch_size}", "GFLOP", "temporary MB"), [program_row("train step", step, compile)]),
        ]
    )


def trace_train_step(config: TrainConfig, batch_size: int) -> tuple[stage1.TrainState, Any]:
    """Shapes of the train state, and the traced step."""
    program, batch = abstract_step(config, make_mesh(MeshConfig(), jax.devices()[:1]), batch_size)
    return program.abstract_state, program.trace(batch, config.model.keep)


def abstract_step(config: TrainConfig, mesh: Mesh, batch_size: int | None = None) -> tuple[Program, dict[str, Any]]:
    """The program of a training, without weights, and the shapes of a batch."""
    losses, teacher = config.losses, None
    if losses.alignment_weight and losses.alignment != "label" and config.teacher is not None:
        teacher = dinov2.read_dinov2_config(config.teacher)
    frozen = stage1.Frozen(
        lpips=lpips_shapes() if losses.perceptual_weight else None,
        teacher=None if teacher is None else dinov2.param_shapes(teacher),
    )
    rate = optax.constant_schedule(1.0)
    optimizers = stage1.Optimizers(
        Optimizer(make_optimizer(config.optimizer, rate), rate),
        Optimizer(make_optimizer(config.discriminator_optimizer, rate), rate),
    )
    side, count = config.model.resolution, batch_size or config.data.batch_size
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    images = jax.ShapeDtypeStruct((count, side, side, config.model.in_channels), jnp.uint8)
    batch = {"image": images, "label": numbers, "example": numbers}
    for view in config.needed_data().views:
        shape = (count, view.image_size, view.image_size, config.model.in_channels)
        batch[view.name] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return make_program(config.step_config(teacher), optimizers, mesh, replicated_shapes(frozen, mesh)), batch
