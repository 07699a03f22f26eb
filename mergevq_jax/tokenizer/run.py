"""A tokenizer training run: config, data, mesh, state and loop put together."""

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from mergevq_jax.merge_ratio import MergeRatioConfig, draw_keep
from mergevq_jax.tokenizer import report
from mergevq_jax.tokenizer import train as stage1
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.losses import alignment
from mergevq_jax.tokenizer.losses.perceptual import load_lpips
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.config import naming
from runtime_jax.data import DataConfig, check_same_classes, classes_of, make_batches, num_examples
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import DINOv2Config, load_dinov2
from runtime_jax.nn.compute import Compute
from runtime_jax.training import loop
from runtime_jax.training.fit import fit
from runtime_jax.training.network import with_weights
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer
from runtime_jax.workdir import only_writer

MODEL_FOLDER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What a run measures and draws on the way, with the averaged parameters."""

    data: DataConfig
    batches: int = 4
    keeps: tuple[int, ...] = ()  # empty: the model's own K
    preview_images: int = 6


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run, built from what configs/mergevq_*.py return."""

    task: Literal["tokenizer"] = "tokenizer"
    seed: int = 0  # of parameters, K and augmentation; data.seed orders the data
    model: TokenizerConfig
    compute: Compute = Compute()
    losses: stage1.LossConfig = stage1.LossConfig()
    discriminator: stage1.DiscriminatorConfig = stage1.DiscriminatorConfig()
    merge_ratio: MergeRatioConfig
    optimizer: OptimizerConfig = OptimizerConfig(b1=0.5, b2=0.9)
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(b1=0.5, b2=0.9)
    accumulate: int = 1  # parts of one update, if memory is short; see StepConfig.taken_by_part
    ema_decay: float = 0.999
    data: DataConfig
    evaluation: EvaluationConfig
    mesh: MeshConfig = MeshConfig()
    loop: loop.LoopConfig
    lpips: tuple[str, ...] = ()  # files, folders or hub ids with the weights of VGG16 and LPIPS
    teacher: str | None = None  # DINOv2 folder or hub id
    blocks_from: str | None = None  # DINOv2 folder or hub id: initialises a new encoder's blocks (G, G+R)
    init_from: str | None = None  # a tokenizer's folder or hub id
    resume_from: str | None = None  # another run's workdir or checkpoint

    def __post_init__(self):
        model = self.model
        if self.data.image_size != model.resolution or self.evaluation.data.image_size != model.resolution:
            raise ValueError(
                f"data.image_size={self.data.image_size} and evaluation.data.image_size="
                f"{self.evaluation.data.image_size} must be model.resolution={model.resolution}"
            )
        for keep in (*self.merge_ratio.keeps, *self.evaluation.keeps):
            model.merge_counts(model.raw_tokens, keep)
        if self.evaluation.data.views:
            raise ValueError("evaluation.data.views is set, but an evaluation reads only images")
        for view in self.data.views:
            if view.name not in stage1.VIEWS or view.image_size != self.losses.alignment_size:
                raise ValueError(
                    f"data.views: {view.name!r} of {view.image_size} pixels; the alignment loss reads "
                    f"{' and '.join(map(repr, stage1.VIEWS))} of losses.alignment_size={self.losses.alignment_size}"
                )
        if self.optimizer.only and self.init_from is None and self.resume_from is None:
            raise ValueError(
                f"optimizer.only={self.optimizer.only} trains a part of a tokenizer: init_from must name the tokenizer"
            )
        if self.accumulate < 1 or self.data.batch_size % self.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be a multiple of accumulate={self.accumulate}, at least 1"
            )

    def needed_data(self) -> DataConfig:
        """The data with the views that the losses read."""
        needed = stage1.VIEWS if self.losses.alignment_weight else ()
        if self.losses.alignment == "label":
            needed = tuple(name for name in needed if name == stage1.STUDENT)
        return replace(self.data, views=tuple(view for view in self.data.views if view.name in needed))

    def step_config(self, teacher: DINOv2Config | None = None) -> stage1.StepConfig:
        """The static part of the train step; raises as `StepConfig`."""
        return stage1.StepConfig(
            model=self.model,
            compute=self.compute,
            losses=self.losses,
            discriminator=self.discriminator,
            accumulate=self.accumulate,
            only=self.optimizer.only,
            ema_decay=self.ema_decay,
            teacher=teacher,
            seed=self.seed,
        )


def train(config: TrainConfig, workdir: str | os.PathLike) -> loop.Result:
    """Starts or resumes training in `workdir`, and saves the averaged model in its folder MODEL_FOLDER.

    Raises:
      ValueError: config, data, weights or checkpoint do not fit; before anything is compiled.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many updates in a row were not finite.
    """
    with only_writer(workdir, config.loop.min_free_bytes) as workdir:
        with naming("data"):
            examples = num_examples(config.data)
        batch_size = config.data.batch_size
        total_steps = config.loop.duration.to_steps(batch_size, examples)
        durations = {"total_steps": total_steps, "batch_size": batch_size, "num_examples": examples}
        optimizers = stage1.Optimizers(
            Optimizer.make(config.optimizer, **durations), Optimizer.make(config.discriminator_optimizer, **durations)
        )
        if config.losses.alignment_weight and config.losses.alignment == "label":
            check_labels(config)
        step_config, frozen = load_frozen(config)
        start = Tokenizer.from_pretrained(config.init_from) if config.init_from else None
        if start and replace(start.config, recovery=config.model.recovery) != config.model:
            raise ValueError(f"init_from {config.init_from}: its architecture is {start.config}, not {config.model}")
        images = evaluation_images(config.evaluation)
        mesh = make_mesh(config.mesh)
        sharding.check_batch("data.batch_size", batch_size, mesh, config.accumulate)
        notes = []
        if start and start.config != config.model:
            notes.append(f"init_from {config.init_from} has another source recovery; this run's starts anew")
            start = replace(start, params={name: part for name, part in start.params.items() if name != "recovery"})
        if config.accumulate > 1 and (terms := step_config.taken_by_part()):
            part = batch_size // config.accumulate
            notes.append(f"accumulate={config.accumulate}: each part of {part} images has its own {', '.join(terms)}")
        evaluation = _Evaluation(config, images)
        index, count = sharding.batch_part(mesh)
        with jax.set_mesh(mesh):
            program = make_program(step_config, optimizers, mesh, sharding.replicate(frozen, mesh))
            result = fit(
                program,
                workdir=workdir,
                config=config.loop,
                resolved_config=config_lib.to_dict(config),
                total_steps=total_steps,
                batch_size=batch_size,
                batches=lambda step: make_batches(config.needed_data(), step, process_index=index, process_count=count),
                dtype=config.compute.dtype,
                variant=functools.partial(draw_keep, config.merge_ratio, config.seed),
                preview=evaluation.preview,
                evaluate=evaluation.evaluate,
                init=functools.partial(new_state, program, config.blocks_from),
                init_from=functools.partial(with_weights, program, start.params) if start else None,
                resume_from=config.resume_from,
                must_match=("model", "discriminator", "seed", "data", "merge_ratio"),
                may_differ=("data.num_workers", "data.sources.*.data_dir", "data.sources.*.path"),
                notes=notes,
            )
            ema = sharding.to_host(result.state.ema)
            if jax.process_index() == 0:
                Tokenizer(config.model, ema).save_pretrained(workdir / MODEL_FOLDER)
        return result


def check_labels(config: TrainConfig) -> None:
    """Raises ValueError unless the sources have the labels that losses.alignment='label' learns."""
    with naming("losses.alignment='label'"):
        classes = classes_of(config.data.sources)
        for source, names in classes:
            if names is None or len(names) > config.model.num_classes:
                have = "has no labels" if names is None else f"has {len(names)} classes"
                raise ValueError(f"source {source!r} {have}, but model.num_classes is {config.model.num_classes}")
        check_same_classes(classes)


def load_frozen(config: TrainConfig) -> tuple[stage1.StepConfig, stage1.Frozen]:
    """The static part of the step, and the frozen parameters, loaded from the config's sources.

    Raises:
      ValueError: weights that the losses need are not named or do not fit.
    """
    losses, teacher, teacher_params = config.losses, None, None
    if losses.perceptual_weight and not config.lpips:
        raise ValueError(
            "losses.perceptual_weight is not 0, but lpips names no weights: give a file, folder or hub id with VGG16's "
            "convolutions and LPIPS' linear layers, or set the weight to 0"
        )
    if losses.alignment_weight and losses.alignment != "label" and config.teacher is not None:
        teacher, teacher_params = load_dinov2(config.teacher)
    step_config = config.step_config(teacher)
    lpips = load_lpips(*config.lpips) if losses.perceptual_weight else None
    return step_config, stage1.Frozen(lpips=lpips, teacher=teacher_params)


def evaluation_images(config: EvaluationConfig) -> np.ndarray:
    """The images of all evaluations of a run, uint8 [N, H, W, 3]."""
    with naming("evaluation.data"):
        batches = make_batches(config.data, 0)
    return np.concatenate([batch["image"] for batch in itertools.islice(batches, config.batches)])


def make_program(
    config: stage1.StepConfig, optimizers: stage1.Optimizers, mesh: jax.sharding.Mesh, frozen: stage1.Frozen
) -> Program:
    """The train step, with one variant for each K, and its state.

    `frozen` is replicated; tracing the step needs only its shapes.
    """

    def train_step(state, frozen, batch, keep):
        return stage1.train_step(state, frozen, batch, config=config, optimizers=optimizers, keep=keep)

    init_state = functools.partial(stage1.init_state, config, optimizers)
    return Program(init_state, train_step, stage1.SHARDING_RULES, mesh, frozen)


def new_state(program: Program, blocks_from: str | None = None) -> stage1.TrainState:
    """A new state, placed on the mesh; the encoder's blocks come from a DINOv2, if one is named."""
    state = program.init()
    if blocks_from is None:
        return state
    _, dinov2 = load_dinov2(blocks_from)
    filled = alignment.init_blocks_from_dinov2(program.abstract_state.params["encoder"]["attn"], dinov2)
    shardings = program.shardings.params["encoder"]["attn"]
    filled = sharding.place(filled, {name: shardings[name] for name in filled})
    encoder = state.params["encoder"]
    params = {**state.params, "encoder": {**encoder, "attn": {**encoder["attn"], **filled}}}
    return state.replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params))


class _Evaluation:
    """Evaluation and preview pictures of a run."""

    def __init__(self, config: TrainConfig, images: np.ndarray):
        self._config, self._images = config, images
        self._keeps: Sequence[int] = config.evaluation.keeps or (config.model.keep,)

    def _tokenizer(self, state: stage1.TrainState) -> Tokenizer:
        return Tokenizer(self._config.model, state.ema, self._config.compute)

    def evaluate(self, state: stage1.TrainState, step: int) -> dict[str, float]:
        """PSNR at every K; code usage at the smallest."""
        batch_size = self._config.evaluation.data.batch_size
        results = report.measure(self._tokenizer(state), self._images, self._keeps, batch_size=batch_size)
        usage = min(results, key=lambda result: result.keep).usage
        recovered = {f"recovered_psnr/{r.keep}": r.recovered_psnr.mean for r in results if r.recovered_psnr}
        return (
            {f"psnr/{result.keep}": result.psnr.mean for result in results}
            | recovered
            | {"codes_used": usage.used, "dead_bits": float(len(usage.dead_bits))}
        )

    def preview(self, state: stage1.TrainState, step: int) -> dict[str, np.ndarray]:
        """Reconstructions of the first evaluation images."""
        images = self._images[: self._config.evaluation.preview_images]
        batch_size = self._config.evaluation.data.batch_size
        return {"reconstructions": report.picture(self._tokenizer(state), images, self._keeps, batch_size=batch_size)}
