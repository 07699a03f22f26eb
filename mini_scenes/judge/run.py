"""Training runs of the judge."""

import functools
import os
from dataclasses import dataclass

import jax

from mini_scenes.judge import lessons
from mini_scenes.judge.judge import save_weights
from mini_scenes.judge.model import JudgeConfig, init_params
from mini_scenes.judge.train import loss
from runtime_jax import config as config_lib
from runtime_jax.prng import Stream, stream_key
from runtime_jax.training.loop import LoopConfig, Result
from runtime_jax.training.network import TrainingConfig, train_network
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.workdir import only_writer

WEIGHTS = "judge.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Config of a training run, built from what configs/judge.py returns."""

    seed: int = 0
    model: JudgeConfig = JudgeConfig()
    image_size: int = 64
    batch_size: int = 32
    optimizer: OptimizerConfig
    ema_decay: float = 0.99
    loop: LoopConfig

    def __post_init__(self):
        if self.image_size % 8 or self.batch_size < 1:
            raise ValueError(f"image_size={self.image_size} must be a multiple of 8, batch_size={self.batch_size} >= 1")


def train(config: TrainConfig, workdir: str | os.PathLike) -> Result:
    """Starts or resumes training in `workdir`; the averaged weights are in its file WEIGHTS.

    Raises:
      ValueError: an invalid config, or one that does not match the checkpoint in `workdir`.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many consecutive updates were not finite.
    """
    with only_writer(workdir, config.loop.min_free_bytes) as workdir:
        result = train_network(
            TrainingConfig(
                batch_size=config.batch_size, optimizer=config.optimizer, ema_decay=config.ema_decay, loop=config.loop
            ),
            workdir,
            resolved_config=config_lib.to_dict(config),
            must_match=("model", "seed"),
            init=lambda: init_params(config.model, stream_key(config.seed, Stream.PARAMS)),
            loss=functools.partial(loss, config=config.model, seed=config.seed),
            batches=lambda start: lessons.batches(config.seed, start, config.batch_size, config.image_size),
            dtype="float32",
        )
        save_weights(workdir / WEIGHTS, config.model, jax.device_get(result.state.ema), step=result.step)
        return result
