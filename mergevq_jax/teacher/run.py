"""A teacher's training run: its config, and how data, mesh, state and loop are combined."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from mergevq_jax.teacher import train as distillation
from mergevq_jax.teacher.colour import ColourConfig
from mergevq_jax.teacher.model import BACKBONE, HeadConfig
from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.config import naming
from runtime_jax.data import DataConfig, make_batches, num_examples
from runtime_jax.data.pipeline import Batches
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import LAYER_NORM_EPSILON, DINOv2Config, save_dinov2
from runtime_jax.nn.compute import Compute
from runtime_jax.training import loop
from runtime_jax.training.fit import fit
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer
from runtime_jax.workdir import only_writer

MODEL_FOLDER = "teacher"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run, built from what configs/mergevq_teacher.py returns.

    Views of `data.image_size`, which is the model's, are whole views: the teacher and the student see them. All other
    views have one smaller size, and only the student sees them.
    """

    task: Literal["teacher"] = "teacher"
    seed: int = 0  # of parameters and colours; data.seed orders and crops the pictures
    model: DINOv2Config
    head: HeadConfig = HeadConfig()
    losses: distillation.DistillationConfig = distillation.DistillationConfig()
    colour: ColourConfig = ColourConfig()
    compute: Compute = Compute()
    optimizer: OptimizerConfig
    ema_decay: float = 0.996  # of the teacher
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    loop: loop.LoopConfig
    resume_from: str | None = None  # another run's workdir or checkpoint

    def __post_init__(self):
        model, views = self.model, self.data.views
        if self.data.image_size != model.image_size:
            raise ValueError(
                f"data.image_size={self.data.image_size} must be model.image_size={model.image_size}, "
                "the size of whole views"
            )
        if model.image_size % model.patch_size or model.width % model.num_heads:
            raise ValueError(
                f"model: image_size={model.image_size} must be a multiple of patch_size={model.patch_size}, "
                f"width={model.width} of num_heads={model.num_heads}"
            )
        if not model.layer_scale or model.layer_norm_epsilon != LAYER_NORM_EPSILON:
            raise ValueError(f"model: DINOv2 has layer_scale=True and layer_norm_epsilon={LAYER_NORM_EPSILON}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is in [0, 1)")
        if len(self.whole_views) < 2:
            raise ValueError(f"data.views: at least one more view of {model.image_size} pixels is needed")
        sizes = {view.image_size for view in views} - {model.image_size}
        if len(sizes) > 1 or any(size % model.patch_size or size > model.image_size for size in sizes):
            raise ValueError(
                f"data.views: sizes {sorted(sizes)}; views smaller than {model.image_size} pixels have one size, "
                f"a multiple of model.patch_size={model.patch_size}"
            )

    @property
    def whole_views(self) -> tuple[str, ...]:
        """Names of the views that both sides see."""
        return ("image", *(view.name for view in self.data.views if view.image_size == self.data.image_size))

    def step_config(self) -> distillation.StepConfig:
        """The static part of the train step."""
        whole = self.whole_views
        return distillation.StepConfig(
            model=self.model,
            head=self.head,
            losses=self.losses,
            colour=self.colour,
            compute=self.compute,
            whole=whole,
            parts=tuple(view.name for view in self.data.views if view.name not in whole),
            ema_decay=self.ema_decay,
            seed=self.seed,
        )


def train(config: TrainConfig, workdir: str | os.PathLike) -> loop.Result:
    """Starts or resumes training in `workdir`; the averaged DINOv2 is in its folder MODEL_FOLDER.

    Raises:
      ValueError: data or checkpoint that do not fit the config; before any compilation.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many consecutive updates were not finite.
    """
    with only_writer(workdir, config.loop.min_free_bytes) as workdir:
        with naming("data"):
            examples = num_examples(config.data)
        batch_size = config.data.batch_size
        total_steps = config.loop.duration.to_steps(batch_size, examples)
        optimizer = Optimizer.make(
            config.optimizer, total_steps=total_steps, batch_size=batch_size, num_examples=examples
        )
        mesh = make_mesh(config.mesh)
        sharding.check_batch("data.batch_size", batch_size, mesh)
        index, count = sharding.batch_part(mesh)
        with jax.set_mesh(mesh):
            result = fit(
                make_program(config.step_config(), optimizer, mesh),
                workdir=workdir,
                config=config.loop,
                resolved_config=config_lib.to_dict(config),
                total_steps=total_steps,
                batch_size=batch_size,
                batches=lambda step: Unlabelled(
                    make_batches(config.data, step, process_index=index, process_count=count)
                ),
                dtype=config.compute.dtype,
                resume_from=config.resume_from,
                must_match=("model", "head", "losses", "colour", "seed", "data"),
                may_differ=("data.num_workers", "data.sources.*.data_dir", "data.sources.*.path"),
            )
            backbone = sharding.to_host(result.state.ema)[BACKBONE]
            if jax.process_index() == 0:
                save_dinov2(workdir / MODEL_FOLDER, config.model, backbone)
        return result


def make_program(config: distillation.StepConfig, optimizer: Optimizer, mesh: jax.sharding.Mesh) -> Program:
    """The train step and its state."""
    return Program(
        lambda: distillation.init_state(config, optimizer),
        lambda state, frozen, batch, variant: distillation.train_step(state, batch, config=config, optimizer=optimizer),
        distillation.SHARDING_RULES,
        mesh,
    )


class Unlabelled(Iterator[dict[str, np.ndarray]]):
    """Batches without their labels, so that no feature can depend on what a probe is to find in it."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in next(self._batches).items() if name != "label"}

    @property
    def skipped(self) -> Counter[str]:
        """As of `Batches`."""
        return self._batches.skipped

    def close(self) -> None:
        """Ends the iterator."""
        self._batches.close()
