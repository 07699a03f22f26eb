"""A training run of the judge: config, state and loop put together."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from mini_scenes.judge import lessons
from mini_scenes.judge.judge import save_weights
from mini_scenes.judge.model import JudgeConfig
from mini_scenes.judge.train import StepConfig, init_state, train_step
from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.training import loop
from runtime_jax.training.initial_state import initial_state
from runtime_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from runtime_jax.training.program import Program
from runtime_jax.workdir import only_writer

WEIGHTS = "judge.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run; what configs/judge.py returns is built into this."""

    seed: int = 0
    model: JudgeConfig = JudgeConfig()
    image_size: int = 64
    batch_size: int = 32
    optimizer: OptimizerConfig
    ema_decay: float = 0.99
    loop: loop.LoopConfig

    def __post_init__(self):
        if self.image_size % 8 or self.batch_size < 1:
            raise ValueError(f"image_size={self.image_size} is to be a multiple of 8, batch_size={self.batch_size} > 0")


class Trained(NamedTuple):
    """What a run leaves."""

    path: Path  # of the averaged weights, as far as they got
    step: int
    stopped_by: str | None  # the signal that ended the run early


def train(config: TrainConfig, workdir: str | Path) -> Trained:
    """Trains, or goes on training, in `workdir`.

    Raises:
      ValueError: a config or checkpoint that does not fit.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many updates in a row were not finite.
    """
    with only_writer(workdir, config.loop.min_free_bytes) as folder:
        return _train(config, folder)


def _train(config: TrainConfig, workdir: Path) -> Trained:
    total_steps = config.loop.duration.to_steps(config.batch_size)
    schedule = make_schedule(config.optimizer, total_steps=total_steps, batch_size=config.batch_size, num_examples=None)
    step_config = StepConfig(config.model, make_optimizer(config.optimizer, schedule), config.ema_decay, config.seed)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    resolved = config_lib.to_dict(config)
    with jax.set_mesh(mesh):
        program = Program(
            functools.partial(init_state, step_config),
            lambda state, frozen, batch, variant: train_step(state, batch, config=step_config),
            sharding.EVERYWHERE,
            mesh,
        )
        found = initial_state(
            workdir, program.abstract_state, config=resolved, init=program.init, must_match=("model", "seed")
        )
        result = loop.run(
            config=config.loop,
            workdir=workdir,
            resolved_config=resolved,
            state=found.state,
            start_step=found.step,
            total_steps=total_steps,
            train_step=lambda state, batch, _: program.step(state, batch, None),
            batches=lambda start: lessons.batches(config.seed, start, config.batch_size, config.image_size),
            shard=lambda batch: sharding.shard_batch(batch, mesh),
            flops_per_step=lambda _: program.flops(None),
        )
    path = workdir / WEIGHTS
    save_weights(path, config.model, jax.device_get(result.state.ema), step=result.step)
    return Trained(path, result.step, result.stopped_by)
