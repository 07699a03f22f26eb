"""A generator's training run: its config, and how data, frozen tokenizer, mesh, state and loop are combined."""

import contextlib
import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from mergevq_jax.generator import data as generator_data
from mergevq_jax.generator import train as stage2
from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.data import TokensConfig
from mergevq_jax.generator.kinds.table import KINDS, KindName
from mergevq_jax.generator.model import GeneratorInfo, GeneratorModel, TokenizerRef, load_generator
from mergevq_jax.generator.sampling.plan import WINDOW, SamplingConfig
from mergevq_jax.generator.transformer import SHARDING_RULES
from mergevq_jax.merge_ratio import MergeRatioConfig, draw_keep
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer
from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.config import naming
from runtime_jax.data import DataConfig
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.pictures import image_grid
from runtime_jax.training import loop
from runtime_jax.training.fit import fit
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer
from runtime_jax.workdir import only_writer

MODEL_FOLDER = "generator"
PUBLISHED = OptimizerConfig(learning_rate=3e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured and drawn during training, with the averaged parameters."""

    data: DataConfig | TokensConfig
    batches: int = 4
    keeps: tuple[int, ...] = ()  # K that the loss is measured at; none: all that are drawn
    preview_classes: int = 6  # one in each row of the picture
    preview_images: int = 6  # of each class
    sampling: SamplingConfig = SamplingConfig()
    sampling_steps: int | None = None  # calls of the network for a picture, of RandAR; None: 64

    def __post_init__(self):
        sizes = ("batches", "preview_classes", "preview_images")
        if bad := [f"{name}={getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
            raise ValueError(f"evaluation: {', '.join(bad)}: at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Config of a run, built from what configs/mergear_*.py return."""

    task: Literal["generator"] = "generator"
    seed: int = 0  # of parameters, K and class dropout; data.seed orders the data
    kind: KindName = "merge"
    model: GeneratorConfig
    tokenizer: str = "tiny"  # shipped, folder or hub id; frozen
    window: int = WINDOW
    groups: stage2.Groups = "source_map"
    merge_ratio: MergeRatioConfig
    compute: Compute = Compute()
    tokenizer_compute: Compute = Compute()  # of a step's own codes; in float32 they are those of `mergevq tokenize`
    optimizer: OptimizerConfig = PUBLISHED
    accumulate: int = 1  # parts of one update, where a batch does not fit in memory
    ema_decay: float = 0.9999
    data: DataConfig | TokensConfig
    evaluation: EvaluationConfig
    mesh: MeshConfig = MeshConfig()
    loop: loop.LoopConfig
    init_from: str | None = None  # a generator: shipped name, folder or hub id
    resume_from: str | None = None  # another run's workdir or checkpoint

    def __post_init__(self):
        known = self.model.keeps
        if self.model.merge_instruction and (unknown := sorted(set(self.all_keeps) - set(known))):
            raise ValueError(f"K = {unknown} in merge_ratio or evaluation.keeps: model.keeps has only {known}")
        KINDS[self.kind].check_keeps(self.model, self.all_keeps)
        for name, data in (("data", self.data), ("evaluation.data", self.evaluation.data)):
            if isinstance(data, DataConfig) and data.views:
                raise ValueError(f"{name}.views is set, but a generator reads only images")
        if self.accumulate < 1 or self.data.batch_size % self.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be a multiple of accumulate={self.accumulate}, at least 1"
            )
        self.step_config(None)

    @property
    def evaluated_keeps(self) -> tuple[int, ...]:
        """K that the loss is measured at."""
        return self.evaluation.keeps or self.merge_ratio.keeps

    @property
    def all_keeps(self) -> tuple[int, ...]:
        """Every K of the run."""
        return tuple(dict.fromkeys((*self.merge_ratio.keeps, *self.evaluated_keeps)))

    @property
    def preview_keep(self) -> int | None:
        """The merge instruction of the preview: the K that is drawn most often."""
        likeliest = self.merge_ratio.keeps[int(np.argmax(self.merge_ratio.weights))]
        return likeliest if self.model.merge_instruction else None

    def step_config(self, tokenizer: TokenizerConfig | None) -> stage2.StepConfig:
        """The static part of the step; `tokenizer`: of images, None for codes."""
        return stage2.StepConfig(
            model=self.model,
            tokenizer=tokenizer,
            kind=self.kind,
            window=self.window,
            groups=self.groups,
            compute=self.compute,
            tokenizer_compute=self.tokenizer_compute,
            accumulate=self.accumulate,
            ema_decay=self.ema_decay,
            seed=self.seed,
        )


def train(config: TrainConfig, workdir: str | os.PathLike) -> loop.Result:
    """Starts or resumes training in `workdir`; the averaged model is in its folder MODEL_FOLDER.

    Raises:
      ValueError: data, tokenizer, weights or checkpoint that do not fit the config; before any compilation.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many consecutive updates were not finite.
    """
    with only_writer(workdir, config.loop.min_free_bytes) as workdir:
        tokenizer = load_tokenizer(config.tokenizer, compute=config.tokenizer_compute)
        info = check(config, tokenizer)
        start = load_generator(config.init_from) if config.init_from else None
        if start and start.config != config.model:
            raise ValueError(f"init_from {config.init_from}: its architecture is {start.config}, not {config.model}")
        if start and not tokenizer.made(start.info.tokenizer.fingerprint):
            raise ValueError(
                f"init_from {config.init_from}: its codes are not those of the tokenizer {config.tokenizer}"
            )
        examples, batch_size = generator_data.num_examples(config.data), config.data.batch_size
        total_steps = config.loop.duration.to_steps(batch_size, examples)
        optimizer = Optimizer.make(
            config.optimizer, total_steps=total_steps, batch_size=batch_size, num_examples=examples
        )
        mesh = make_mesh(config.mesh)
        sharding.check_batch("data.batch_size", batch_size, mesh, config.accumulate)
        sharding.check_batch("evaluation.data.batch_size", config.evaluation.data.batch_size, mesh)
        # A resumed run may find the tokenizer elsewhere, but it must be the same one.
        resolved = config_lib.to_dict(config) | {"codes_of": info.tokenizer.fingerprint}
        draw = functools.partial(draw_keep, config.merge_ratio, config.seed)
        with jax.set_mesh(mesh):
            run = Run(config, tokenizer, info, optimizer, mesh)
            result = fit(
                run.program,
                workdir=workdir,
                config=config.loop,
                resolved_config=resolved,
                config_class=TrainConfig,
                total_steps=total_steps,
                batch_size=batch_size,
                batches=lambda step: generator_data.make_batches(config.data, draw, step, **_part(mesh)),
                dtype=config.compute.dtype,
                variant=draw,
                preview=run.preview,
                evaluate=run.evaluate,
                init_from=functools.partial(run.with_weights, start) if start else None,
                resume_from=config.resume_from,
                must_match=("kind", "model", "window", "groups", "codes_of", "seed", "data", "merge_ratio"),
                may_differ=("data.num_workers", "data.folders", "data.sources.*.data_dir", "data.sources.*.path"),
            )
            averaged = run.averaged(result.state)
            if jax.process_index() == 0:
                averaged.save_pretrained(workdir / MODEL_FOLDER)
        return result


def check(config: TrainConfig, tokenizer: Tokenizer) -> GeneratorInfo:
    """Checks that tokenizer, data and generator fit together; returns the info of the trained generator.

    Raises:
      ValueError: they do not, or the previews cannot be sampled.
    """
    generator_data.check_tokenizer(config.model, tokenizer)
    for keep in config.all_keeps:
        tokenizer.config.merge_counts(tokenizer.config.raw_tokens, keep)
    with naming("data"):
        classes = generator_data.check_data(config.data, config.model, tokenizer, config.merge_ratio.keeps)
    with naming("evaluation.data"):
        others = generator_data.check_data(config.evaluation.data, config.model, tokenizer, config.evaluated_keeps)
        if others != classes:
            raise ValueError("its classes are not those of data")
    kind = KINDS[config.kind]
    info = GeneratorInfo(
        kind=config.kind,
        window=kind.window(config.model, config.window),
        classes=classes,
        tokenizer=TokenizerRef(name=config.tokenizer, fingerprint=tokenizer.code_fingerprint()),
        architecture=config.model,
    )
    if kind.recovers and tokenizer.config.recovery is None:
        raise ValueError(f"tokenizer {config.tokenizer} has no source recovery, which kind={config.kind!r} needs")
    sampling, steps = info.sampling(config.evaluation.sampling), config.evaluation.sampling_steps
    with naming("evaluation.sampling, evaluation.sampling_steps"):
        kind.plan(config.model, sampling, config.preview_keep, steps=steps, compute=config.compute)
    return info


def _part(mesh: jax.sharding.Mesh) -> dict[str, int]:
    index, count = sharding.batch_part(mesh)
    return {"process_index": index, "process_count": count}


def make_program(config: stage2.StepConfig, optimizer: Optimizer, mesh: jax.sharding.Mesh, tokenizer: Any) -> Program:
    """The train step, whose variants are the K, and its state.

    Args:
      tokenizer: its parameters, on every device; to trace the step, shapes will do, and for codes None.
    """

    def train_step(state, frozen, batch, keep):
        return stage2.train_step(state, frozen, batch, config=config, optimizer=optimizer, keep=keep)

    init_state = functools.partial(stage2.init_state, config, optimizer)
    return Program(init_state, train_step, SHARDING_RULES, mesh, tokenizer)


class Run:
    """The compiled parts of a run: step, held-out loss, pictures. Use it under `jax.set_mesh(mesh)`."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        info: GeneratorInfo,
        optimizer: Optimizer,
        mesh: jax.sharding.Mesh,
    ):
        """`info`: of `check`."""
        step_config = config.step_config(tokenizer.config)

        self._config, self._info, self._mesh = config, info, mesh
        self.program = make_program(step_config, optimizer, mesh, sharding.replicate(tokenizer.params, mesh))
        self._tokenizer = dataclasses.replace(tokenizer, params=self.program.frozen)
        self._losses = jax.jit(
            functools.partial(stage2.evaluate, config=step_config),
            static_argnames="keep",
            out_shardings=sharding.replicated(mesh),
        )

    def with_weights(self, model: GeneratorModel, state: stage2.TrainState) -> stage2.TrainState:
        """The state with the weights and counts of a saved generator of the same architecture."""
        params = sharding.place(model.params, self.program.shardings.params)
        state = state.replace(params=params, ema=jax.tree.map(lambda leaf: leaf.copy(), params))
        if isinstance(state, stage2.CountingState):
            starts = sharding.place(model.start_counts, self.program.shardings.group_starts)
            state = state.replace(group_starts=starts)
        return state

    def averaged(self, state: stage2.TrainState) -> GeneratorModel:
        """The generator with the averaged parameters, on the host."""
        model = self._model(state)
        params, starts = sharding.to_host((model.params, model.start_counts))
        return dataclasses.replace(model, params=params, start_counts=starts)

    def _model(self, state: stage2.TrainState) -> GeneratorModel:
        starts = state.group_starts if isinstance(state, stage2.CountingState) else None
        return GeneratorModel(self._info, state.ema, starts, self._config.compute)

    def evaluate(self, state: stage2.TrainState, step: int) -> dict[str, float]:
        """Held-out losses and accuracies at each K, always on the same images."""
        config = self._config.evaluation
        results = {}
        for keep in self._config.evaluated_keeps:
            batches = generator_data.make_batches(
                config.data, functools.partial(_constant, keep), 0, **_part(self._mesh)
            )
            with contextlib.closing(batches):
                means = [
                    self._losses(state.ema, self.program.frozen, sharding.shard_batch(batch, self._mesh), keep=keep)
                    for batch in itertools.islice(batches, config.batches)
                ]
            results |= {f"{name}/K{keep}": float(np.mean([mean[name] for mean in means])) for name in means[0]}
        return results

    def preview(self, state: stage2.TrainState, step: int) -> dict[str, np.ndarray]:
        """Samples of the first classes, one row each."""
        config = self._config.evaluation
        rows, columns = min(config.preview_classes, self._config.model.num_classes), config.preview_images
        model = self._model(state)
        labels = np.repeat(np.arange(rows), columns)
        number, seed = self._config.preview_keep, self._config.seed
        drawn = model.sample(labels, number, sampling=config.sampling, seed=seed, steps=config.sampling_steps)
        images = sharding.to_host(KINDS[self._config.kind].images(self._tokenizer, drawn))
        grid = [list(row) for row in np.split(images, rows)]
        return {"samples": image_grid(grid, row_labels=self._info.classes[:rows])}


def _constant(keep: int, step: int) -> int:
    return keep
