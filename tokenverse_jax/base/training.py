"""What the trainings of all stages share: the state, one update of it, and the run."""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from runtime_jax import sharding
from runtime_jax.training import loop
from runtime_jax.training.initial_state import initial_state
from runtime_jax.training.optimizer import OptimizerConfig, ema_update, make_optimizer, make_schedule
from runtime_jax.training.program import Program

Params = Any
Metrics = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained, whichever it is."""

    batch_size: int
    optimizer: OptimizerConfig
    ema_decay: float = 0.999
    loop: loop.LoopConfig

    def __post_init__(self):
        if self.batch_size < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"batch_size={self.batch_size} is at least 1, ema_decay={self.ema_decay} in [0, 1)")


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds; all of it is donated to the step."""

    step: Any  # untyped, as trees of shapes have this structure too
    params: Params
    opt_state: Any
    ema: Params


# (params, batch, step) -> loss and what else is logged
Loss = Callable[[Params, dict[str, Array], Array], tuple[Array, Metrics]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state that has seen no step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
    )


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
) -> tuple[TrainState, dict[str, tuple[Array, Array]]]:
    """One update; the new state, and metrics as (sum, count).

    Where the loss or a gradient is not finite, everything but the step's number is kept and "nonfinite" counts one.
    """
    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.step)
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(
        step=state.step,
        params=params,
        opt_state=opt_state,
        ema=ema_update(state.ema, params, state.step, ema_decay),
    )
    finite = jnp.isfinite(value + norm)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state).replace(step=state.step + 1)
    metrics = metrics | {"loss": value, "grad_norm": norm, "lr": jnp.asarray(schedule(state.step), jnp.float32)}
    counted = finite.astype(jnp.float32)  # a skipped step's values would make the interval's means NaN
    logged = {name: (jnp.where(finite, value, 0.0), counted) for name, value in metrics.items()}
    return new, logged | {"nonfinite": (1.0 - counted, jnp.ones(()))}


def fit(
    config: TrainingConfig,
    workdir: Path,
    *,
    resolved_config: Mapping[str, Any],
    must_match: tuple[str, ...],
    init: Callable[[], Params],
    loss: Loss,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    preview: Callable[[Params, int], Mapping[str, np.ndarray]] | None = None,
    evaluate: Callable[[Params, int], Mapping[str, float]] | None = None,
    variant: Callable[[int], Hashable] = lambda step: None,
) -> loop.Result:
    """Trains, or goes on training, in `workdir`, with the whole network on every device; see `loop.run`.

    Args:
      init: new parameters; traced here.
      preview, evaluate: as in `loop.run`, of the averaged parameters.
      variant: step -> key; steps of one key have batches of the same shapes.
    """
    total_steps = config.loop.duration.to_steps(config.batch_size, None)
    schedule = make_schedule(config.optimizer, total_steps=total_steps, batch_size=config.batch_size, num_examples=None)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = functools.partial(train_step, loss=loss, optimizer=optimizer, schedule=schedule, ema_decay=config.ema_decay)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with jax.set_mesh(mesh):
        program = Program(
            lambda: init_state(init(), optimizer),
            lambda state, frozen, batch, variant: step(state, batch),
            sharding.EVERYWHERE,
            mesh,
        )
        found = initial_state(
            workdir, program.abstract_state, config=resolved_config, init=program.init, must_match=must_match
        )
        print(
            f"{workdir}: {total_steps} steps of {config.batch_size}, from step {found.step} ({found.origin})",
            flush=True,
        )
        return loop.run(
            config=config.loop,
            workdir=workdir,
            resolved_config=resolved_config,
            state=found.state,
            start_step=found.step,
            total_steps=total_steps,
            train_step=lambda state, batch, number: program.step(state, batch, variant(number)),
            batches=batches,
            shard=lambda batch: sharding.shard_batch(batch, mesh),
            preview=preview and (lambda state, number: preview(state.ema, number)),
            evaluate=evaluate and (lambda state, number: evaluate(state.ema, number)),
            variant=variant,
            flops_per_step=lambda number: program.flops(variant(number)),
        )
