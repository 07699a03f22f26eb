"""The training of one network: its state, one update, and the run."""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from runtime_jax import sharding
from runtime_jax.files import AnyPath
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.training import loop
from runtime_jax.training.fit import fit
from runtime_jax.training.optimizer import OptimizerConfig, ema_update
from runtime_jax.training.program import Program
from runtime_jax.training.update import Metrics, Optimizer, Params, guarded

Means = dict[str, Array]
# (params, batch, step) -> loss and other means to log
Loss = Callable[[Params, dict[str, Array], Array], tuple[Array, Means]]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How any network is trained."""

    batch_size: int
    optimizer: OptimizerConfig
    ema_decay: float = 0.999
    loop: loop.LoopConfig

    def __post_init__(self):
        if self.batch_size < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"batch_size={self.batch_size} is at least 1, ema_decay={self.ema_decay} in [0, 1)")


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds; a step donates all of it."""

    step: Any  # untyped, for trees of shapes and of shardings have this structure too
    params: Params
    opt_state: Any
    ema: Params


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """A state that has seen no step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transformation.init(params),
        ema=jax.tree.map(jnp.copy, params),
    )


def updated(
    state: TrainState, gradients: Params, means: Means, *, optimizer: Optimizer, ema_decay: float, **fields: Any
) -> tuple[TrainState, Metrics]:
    """One update by mean gradients; see `guarded`.

    Args:
      means: to be logged; "loss" among them.
      fields: new values of further fields of the state.
    """
    norm = optax.tree.norm(gradients)
    params, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    ema = ema_update(state.ema, params, state.step, ema_decay)
    new = state.replace(params=params, opt_state=opt_state, ema=ema, **fields)
    logged = means | {"grad_norm": norm, "lr": optimizer.rate(state.step)}
    return guarded(state, new, logged, watched=means["loss"] + norm)


def train_step(
    state: TrainState, batch: dict[str, Array], *, loss: Loss, optimizer: Optimizer, ema_decay: float
) -> tuple[TrainState, Metrics]:
    """One update on a batch; the new state, and metrics as (sum, count)."""
    (value, means), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.step)
    return updated(state, gradients, means | {"loss": value}, optimizer=optimizer, ema_decay=ema_decay)


def train_network(
    config: TrainingConfig,
    workdir: AnyPath,
    *,
    resolved_config: Mapping[str, Any],
    must_match: tuple[str, ...],
    init: Callable[[], Params],
    loss: Loss,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    dtype: str,
    preview: Callable[[Params, int], Mapping[str, np.ndarray]] | None = None,
    evaluate: Callable[[Params, int], Mapping[str, float]] | None = None,
    variant: Callable[[int], Hashable] = lambda step: None,
    rates: Callable[[str], ArrayLike] | None = None,
    start: Mapping[str, Params] | None = None,
) -> loop.Result:
    """Starts or resumes a training in `workdir` with a whole copy of the network on every device; see `fit`.

    Args:
      init: makes new parameters; traced here.
      batches: as in `loop.Loop`, but of whole batches on every process.
      preview, evaluate: as in `loop.Loop`, of the averaged parameters.
      variant: step -> key; steps of one key have batches of the same shapes.
      rates: as in `Optimizer.scaled`.
      start: host arrays that replace what `init` makes under these names, in a new state.
    """
    total_steps = config.loop.duration.to_steps(config.batch_size, None)
    optimizer = Optimizer.make(config.optimizer, total_steps=total_steps, batch_size=config.batch_size)
    optimizer = optimizer if rates is None else optimizer.scaled(rates)
    step = functools.partial(train_step, loss=loss, optimizer=optimizer, ema_decay=config.ema_decay)
    mesh = make_mesh(MeshConfig())
    sharding.check_batch("batch_size", config.batch_size, mesh)
    with jax.set_mesh(mesh):
        program = Program(
            lambda: init_state(init(), optimizer),
            lambda state, frozen, batch, variant: step(state, batch),
            sharding.EVERYWHERE,
            mesh,
        )
        return fit(
            program,
            workdir=workdir,
            config=config.loop,
            resolved_config=resolved_config,
            total_steps=total_steps,
            batch_size=config.batch_size,
            batches=lambda step: sharding.own_rows(batches(step), mesh),
            dtype=dtype,
            variant=variant,
            preview=preview and (lambda state, number: preview(state.ema, number)),
            evaluate=evaluate and (lambda state, number: evaluate(state.ema, number)),
            init_from=None if start is None else functools.partial(with_weights, program, start),
            must_match=must_match,
        )


def with_weights(program: Program, start: Mapping[str, Params], state: Any) -> Any:
    """A new state with other weights, host arrays by name, in `params` and `ema`; what they lack stays as it is."""
    shardings = {name: program.shardings.params[name] for name in start}
    params = {**state.params, **sharding.place(dict(start), shardings)}
    return state.replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params))
