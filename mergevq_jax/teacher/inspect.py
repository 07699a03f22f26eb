"""`mergevq inspect` of a teacher's config: parameters and a train step, without data."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mergevq_jax.teacher.run import TrainConfig, make_program
from runtime_jax.cost import program_row, size_rows, table
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.training.optimizer import make_optimizer
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer


def inspect_teacher(config: TrainConfig, *, compile: bool = False) -> str:
    """Tables of parameters, train state and FLOPs of a step; with `compile` also its temporary memory."""
    program, batch = abstract_step(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state = program.abstract_state
    parts = {"parameters": state.params, "optimizer": state.opt_state, "moving average": state.ema}
    step = program_row("train step", program.trace(batch, None), compile)
    return "\n".join(
        [
            f"{config.model.image_size} px, patches of {config.model.patch_size}, {1 + len(config.data.views)} views",
            "",
            *table(("part", "parameters", "MB, float32"), size_rows(state.params)),
            "",
            *table(("train state", "numbers", "MB"), size_rows(parts | {"whole train state": state})),
            "",
            *table((f"batch of {config.data.batch_size}", "GFLOP", "temporary MB"), [step]),
        ]
    )


def abstract_step(config: TrainConfig, mesh: Mesh) -> tuple[Program, dict[str, Any]]:
    """The program of a training, and the shapes of a batch."""
    rate = optax.constant_schedule(1.0)
    program = make_program(config.step_config(), Optimizer(make_optimizer(config.optimizer, rate), rate), mesh)
    count = config.data.batch_size
    views = (config.data.main_view(), *config.data.views)
    batch = {view.name: jax.ShapeDtypeStruct((count, *view.shape), jnp.uint8) for view in views}
    return program, batch | {"example": jax.ShapeDtypeStruct((count,), jnp.int32)}
