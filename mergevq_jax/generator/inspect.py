"""`mergevq inspect` of a generator's config: parameters, a train step, and the KV cache of sampling."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mergevq_jax.generator import train as stage2
from mergevq_jax.generator.kinds.table import KINDS
from mergevq_jax.generator.run import TrainConfig, make_program
from mergevq_jax.generator.sampling.decode import new_kv_cache
from mergevq_jax.generator.sampling.plan import DrawPlan, Knobs
from mergevq_jax.generator.transformer import SHARDING_RULES, Params, param_shapes
from mergevq_jax.tokenizer.model import param_shapes as tokenizer_shapes
from mergevq_jax.tokenizer.model import read_tokenizer_config
from runtime_jax.cost import program_row, size_of, size_rows, table
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.sharding import replicated_shapes, sharded_shapes
from runtime_jax.training.optimizer import make_optimizer
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer


def inspect_generator(config: TrainConfig, *, compile: bool = False) -> str:
    """Tables of parameters, train state, FLOPs of a step on codes (without tokenizer), and the KV cache of sampling."""
    model, batch_size = config.model, config.data.batch_size
    state, step = trace_train_step(config, batch_size)
    head = f"kind {config.kind}: {model.length} raster tokens, {model.vocab_size} codes, a prefix of {model.prefix}"
    parts = {"parameters": state.params, "optimizer": state.opt_state, "moving average": state.ema}
    step_row = program_row(f"train step on codes, K = {step_keep(config)}", step, compile)
    return "\n".join(
        [
            head,
            "",
            *table(("part", "parameters", "MB, float32"), size_rows(state.params)),
            "",
            *table(("train state", "numbers", "MB"), size_rows(parts | {"whole train state": state})),
            "",
            *table((f"batch of {batch_size}", "GFLOP", "temporary MB"), [step_row]),
            "",
            *table(
                ("K", "slots", "of all", f"KV cache of an image, kB in {config.compute.dtype}"),
                [_cache_row(config, keep) for keep in config.merge_ratio.keeps],
            ),
        ]
    )


def step_keep(config: TrainConfig) -> int:
    """The largest K that is drawn: its steps cost most."""
    return max(config.merge_ratio.keeps)


def trace_train_step(config: TrainConfig, batch_size: int) -> tuple[stage2.TrainState, Any]:
    """Shapes of the train state, and the traced step on codes."""
    program, batch = abstract_step(config, make_mesh(MeshConfig(), jax.devices()[:1]), batch_size, codes=True)
    return program.abstract_state, program.trace(batch, step_keep(config))


def abstract_step(
    config: TrainConfig, mesh: Mesh, batch_size: int | None = None, *, codes: bool = False
) -> tuple[Program, dict[str, Any]]:
    """The program of a training on images, or on `codes`, without weights, and the shapes of a batch."""
    count = batch_size or config.data.batch_size
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    batch = {"label": numbers, "example": numbers}
    tokenizer, frozen = None, None
    if codes:
        raster = jax.ShapeDtypeStruct((count, config.model.length), jnp.int32)
        batch |= {"indices": raster, "source_map": raster}
    else:
        tokenizer = read_tokenizer_config(config.tokenizer)
        side = tokenizer.resolution
        batch["image"] = jax.ShapeDtypeStruct((count, side, side, tokenizer.in_channels), jnp.uint8)
        frozen = replicated_shapes(tokenizer_shapes(tokenizer), mesh)
    rate = optax.constant_schedule(1.0)
    optimizer = Optimizer(make_optimizer(config.optimizer, rate), rate)
    return make_program(config.step_config(tokenizer), optimizer, mesh, frozen), batch


def trace_sampling(config: TrainConfig, mesh: Mesh, batch_size: int, keep: int | None) -> tuple[Params, Any]:
    """Shapes of a generator's parameters on a mesh, and the traced sampler with the settings of its evaluation."""
    params = sharded_shapes(param_shapes(config.model), SHARDING_RULES, mesh)
    return params, KINDS[config.kind].trace(params, batch_size, *_plan(config, keep))


def _plan(config: TrainConfig, keep: int | None) -> tuple[DrawPlan, Knobs]:
    """Of the sampler in an evaluation."""
    model, kind, evaluation = config.model, KINDS[config.kind], config.evaluation
    sampling = kind.settings(evaluation.sampling, model, kind.window(model, config.window))
    steps = evaluation.sampling_steps
    if steps is not None and keep is not None:
        steps = min(steps, keep)
    return kind.plan(model, sampling, keep, steps=steps, compute=config.compute)


def _cache_row(config: TrainConfig, keep: int) -> tuple[str, ...]:
    """Slots and bytes for one image; under guidance, of both its rows."""
    model, kind = config.model, KINDS[config.kind]
    plan, _ = _plan(config, keep if model.merge_instruction else None)
    full = model.prefix + kind.tokens(model)
    kv_cache = functools.partial(new_kv_cache, model, config.compute, layers=model.num_layers, rows=plan.rows)
    size = size_of(jax.eval_shape(functools.partial(kv_cache, slots=plan.slots)))
    return str(keep), str(plan.slots), f"{plan.slots / full:.0%}", f"{size / 1000:,.0f}"
