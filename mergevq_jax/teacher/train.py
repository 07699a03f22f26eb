"""Self-distillation (DINO): a student learns what its own moving average says about other views of a picture.

The state's `ema` is the teacher. Batches hold pictures only: whoever trains this removes the labels (see `run`).

Axes: B batch, V views, P prototypes.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mergevq_jax.teacher import losses
from mergevq_jax.teacher.colour import ColourConfig, jitter
from mergevq_jax.teacher.model import HeadConfig, Projected
from runtime_jax.networks.dinov2 import DINOv2Config
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.sharding import IF_LARGE, Axis, Rule, constrain
from runtime_jax.training import network
from runtime_jax.training.network import TrainState
from runtime_jax.training.update import Metrics, Optimizer, Params

SHARDING_RULES: tuple[Rule, ...] = ((r".*", IF_LARGE),)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Temperatures of the two distributions: the teacher's is the sharper one."""

    student_temperature: float = 0.1
    teacher_temperature: float = 0.05

    def __post_init__(self):
        if not 0 < self.teacher_temperature < self.student_temperature:
            raise ValueError(f"losses: {self}: 0 < teacher_temperature < student_temperature")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything static that a train step reads.

    `whole` and `parts` name the batch's views: the teacher sees the whole ones, the student sees all.
    """

    model: DINOv2Config
    head: HeadConfig
    losses: DistillationConfig
    colour: ColourConfig
    compute: Compute
    whole: tuple[str, ...]
    parts: tuple[str, ...]
    ema_decay: float
    seed: int

    @property
    def network(self) -> Projected:
        """The module of both sides."""
        return Projected(self.model, self.head, self.compute)


def init_state(config: StepConfig, optimizer: Optimizer) -> TrainState:
    """A new state from the config's seed."""
    side = config.model.image_size
    params = config.network.init(stream_key(config.seed, Stream.PARAMS), jnp.zeros((1, side, side, 3)))["params"]
    return network.init_state(params, optimizer)


def train_step(
    state: TrainState, batch: dict[str, Array], *, config: StepConfig, optimizer: Optimizer
) -> tuple[TrainState, Metrics]:
    """One update of the student; the teacher follows.

    Args:
      state: donated by the caller's jit.
      batch: the views, uint8 [B, S, S, 3] by name, and "example" int [B].

    Returns:
      The new state and metrics as (sum, count). If loss or gradient is not finite, only the step's number changes.
    """
    whole = _views(batch, config.whole, state.step, config, first=0)
    parts = _views(batch, config.parts, state.step, config, first=len(config.whole))
    settings = config.losses
    seen = _project(state.ema, whole, config)
    goal = losses.targets(seen, settings.teacher_temperature)

    def loss(params: Params) -> Array:
        student = [_project(params, views, config) for views in (whole, parts) if views]
        return losses.distillation(jnp.concatenate(student), goal, settings.student_temperature)

    value, gradients = jax.value_and_grad(loss)(state.params)
    spread = losses.spread(seen, settings.teacher_temperature)
    return network.updated(
        state,
        gradients,
        {"loss": value, "teacher/entropy": spread.entropy, "teacher/entropy_of_mean": spread.entropy_of_mean},
        optimizer=optimizer,
        ema_decay=config.ema_decay,
    )


def _views(batch: dict[str, Array], names: tuple[str, ...], step: Array, config: StepConfig, first: int) -> list[Array]:
    """Views of one size in changed colours, float [B, S, S, 3] in [-1, 1]; the number of the first sets their keys."""
    key = stream_key(config.seed, Stream.AUGMENT, step)
    changed = []
    for number, name in enumerate(names, first):
        keys = example_keys(jax.random.fold_in(key, number), batch["example"])
        changed.append(jitter(batch[name].astype(jnp.float32) / 127.5 - 1.0, keys, config.colour))
    return changed


def _project(params: Params, views: list[Array], config: StepConfig) -> Array:
    """Cosines [V, B, P]."""
    project = functools.partial(config.network.apply, {"params": params})
    images = constrain(jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:]), Axis.BATCH, None, None, None)
    return jnp.swapaxes(project(images).reshape(-1, len(views), config.head.prototypes), 0, 1)
