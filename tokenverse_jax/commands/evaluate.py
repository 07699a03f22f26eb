"""`tokenverse evaluate`: concepts measured on a benchmark in DreamBench++'s folder layout.

The output folder has the drawn images (`evaluate.samples`), the learned concepts (`evaluate.concepts`), settings.json
and the report (`evaluate.report`). The same command resumes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from runtime_jax import config as config_lib
from runtime_jax import hosts
from runtime_jax.files import AnyPath, is_file, path_of, read_bytes, write_json, write_text
from runtime_jax.mesh import make_mesh
from runtime_jax.messages import cut
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import only_writer
from tokenverse_jax.commands.learn import LearnRunConfig
from tokenverse_jax.concepts.concept_data import read_image
from tokenverse_jax.concepts.draw import Sampling
from tokenverse_jax.evaluate import requests, scenes, similarity
from tokenverse_jax.evaluate.benchmark import Benchmark, read_benchmark
from tokenverse_jax.evaluate.concepts import Concepts, Mode, check_words, concept_path, learn, needed
from tokenverse_jax.evaluate.draw import Job, draw, make_batches, missing, offset_length
from tokenverse_jax.evaluate.items import Item, make_items
from tokenverse_jax.evaluate.report import Section, write_report
from tokenverse_jax.evaluate.samples import NEGATIVE, Samples
from tokenverse_jax.flux import text
from tokenverse_jax.flux.pipeline import PARTS, Loader, Pipeline

SETTINGS = "settings.json"
PIXELS_AT_ONCE = 256**2  # default total of the images that are drawn together
SCENES = "mini_scenes' judge (no --clip, no --dino)"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is drawn and how it is scored, beside the base model and how concepts are learned.

    concepts: folder of concept files; None: they are learned.
    strength: of all concepts; with 0 the base model draws the prompts alone.
    num: images of each prompt.
    batch_size: images at once; None: as many as have the pixels of one of 256 x 256.
    clip, dino: folders or hub ids of weights. Without both, mini_scenes' judge gives the scores, if `scores`.
    answers: files of an outside judge's answers.
    """

    benchmark: str
    concepts: str | None = None
    mode: Mode = "stored"
    strength: float = 1.0
    num: int = 1
    batch_size: int | None = None
    clip: str | None = None
    dino: str | None = None
    scores: bool = True
    answers: tuple[str, ...] = ()

    def __post_init__(self):
        if self.num < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"--num {self.num}, --batch-size {self.batch_size}: at least 1 is needed")
        if not self.scores and (self.clip or self.dino):
            raise ValueError("--no-scores: leave out --clip and --dino")

    @property
    def by_scenes(self) -> bool:
        """Whether mini_scenes' judge gives the scores."""
        return self.scores and not self.clip and not self.dino


def evaluate(config: EvaluateConfig, run: LearnRunConfig, out: str | os.PathLike) -> str:
    """Learns and draws what is missing in `out`, scores it and writes the report; returns the report's tables.

    Several processes share the images to learn from and the batches to draw; process 0 scores and writes the report.

    Args:
      run: the base model, how concepts are learned and images sampled; its images, words and prompts are empty.

    Raises:
      ValueError: before the model is loaded: another layout, missing captions, words or concepts, prompts that are too
        long, answers that miss requests, an `out` of other settings. Afterwards: concepts of another model.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: values that are not finite.
      StoppedError: by a signal; finished concepts and batches are kept.
    """
    if run.images or run.words or run.prompts:
        raise ValueError("config.images, words and prompts: leave them empty, the benchmark has its own")
    with only_writer(out) as folder, Stop() as stop:
        this = Evaluation.open(config, run, folder)
        answers = requests.read_answers(config.answers, this.jobs) if config.answers else None
        networks = _networks(config)
        this.claim()
        this.make(stop)
        if jax.process_index() > 0:
            return ""
        sections = this.similarities(networks)
        if config.by_scenes:
            sections.append(Section(SCENES, scenes.measure(this.jobs, this.benchmark, this.samples, run.size), {}))
        if answers is not None:
            protocol = {"answers": {name: _digest([path_of(name)]) for name in config.answers}}
            title = f"Judge's answers ({len(config.answers)} repetition{'s' * (len(config.answers) > 1)})"
            sections.append(Section(title, requests.figures(answers, this.jobs), protocol))
        return write_report(folder, this.benchmark, this.jobs, this.samples, sections, this.protocol())


def _networks(config: EvaluateConfig) -> list[similarity.Network]:
    networks = [similarity.load_clip(config.clip)] if config.clip else []
    return networks + ([similarity.load_dino_network(config.dino)] if config.dino else [])


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What is evaluated, in which folder; `evaluate` runs it."""

    config: EvaluateConfig
    run: LearnRunConfig
    folder: AnyPath
    benchmark: Benchmark
    items: Sequence[Item]
    batches: Sequence[Sequence[Job]]
    samples: Samples
    load: Loader
    mesh: Mesh  # of this process

    @classmethod
    def open(cls, config: EvaluateConfig, run: LearnRunConfig, folder: AnyPath) -> "Evaluation":
        """Reads the benchmark and checks everything that needs no weights; ValueError where something does not fit."""
        benchmark, mesh = read_benchmark(config.benchmark), make_mesh(run.mesh, jax.local_devices())
        single = {"transformer": run.transformer, "vae": run.vae}
        load = Loader(run.model, **single, dtype=run.dtype, mesh=mesh, compute=run.compute)
        load.check_size(run.size, run.size)
        bare = load()
        items = make_items(benchmark, bare.tokenizer_2)
        text.encode(bare.tokenizer_2, [item.prompt for item in items], bare.text_length)
        batch_size = config.batch_size or max(1, PIXELS_AT_ONCE // run.size**2)
        this = cls(
            config=config,
            run=run,
            folder=folder,
            benchmark=benchmark,
            items=items,
            batches=make_batches(items, config.num, batch_size),
            samples=Samples(folder, benchmark),
            load=load,
            mesh=mesh,
        )
        this._check(bare)
        return this

    @property
    def jobs(self) -> list[Job]:
        """All images."""
        return [job for batch in self.batches for job in batch]

    @property
    def concept_folder(self) -> AnyPath:
        """Where the concept files are."""
        given = self.config.concepts
        return self.folder / "concepts" if given is None else path_of(given)

    def _check(self, bare: Pipeline) -> None:
        config, tokenizer = self.config, bare.tokenizer_2
        if config.concepts is None:
            check_words(self.benchmark, self.items, tokenizer, bare.text_length, self.run.learn, config.mode)
            for name in needed(self.items):
                read_image(self.benchmark.pictures[name].path, self.run.size)
        else:
            given = self._concepts()
            for item in self.items if config.mode == "stored" else ():
                given.place(item, tokenizer, None)
        if config.by_scenes:
            try:
                scenes.check(self.items, self.run.size)
            except ValueError as error:
                raise ValueError(
                    f"mini_scenes' judge cannot score this benchmark ({error}): give --clip or --dino, or --no-scores"
                ) from error

    def _concepts(self) -> Concepts:
        return Concepts.load(self.concept_folder, self.items, self.config.mode, self.config.strength)

    def claim(self) -> None:
        """Writes settings.json, or checks that the folder holds images of the same settings."""
        config, file = self.config, self.folder / SETTINGS
        given = [concept_path(self.concept_folder, name) for name in needed(self.items)] if config.concepts else None
        settings = {
            "run": config_lib.to_dict(self.run),
            "benchmark": self.benchmark.digest,
            "concepts": given and _digest(given),
            **{name: getattr(config, name) for name in ("mode", "strength", "num")},
            "batch_size": self._batch_size,
        }
        hosts.check_same("what is to be evaluated", settings)
        if jax.process_index() == 0:
            if is_file(file):
                changes = config_lib.config_changes(json.loads(read_bytes(file)), json.loads(json.dumps(settings)))
                if changes:
                    raise ValueError(
                        f"{self.folder} holds images of other settings, {cut(changes.values(), most=3)}: give the same "
                        "ones to resume, or choose another --out"
                    )
            write_json(file, settings)
            write_text(self.folder / NEGATIVE, "")
        hosts.barrier("claimed")

    @property
    def _batch_size(self) -> int:
        return max(map(len, self.batches))

    def make(self, stop: Stop) -> None:
        """Learns and draws what is not on disk; this process its part of it."""
        run, pictures = self.run, [self.benchmark.pictures[name] for name in needed(self.items)]
        mine = slice(jax.process_index(), None, jax.process_count())
        to_learn = [one for one in pictures if not is_file(concept_path(self.concept_folder, one.name))]
        if not hosts.gather(np.asarray(bool(to_learn or missing(self.batches, self.samples)))).any():
            return
        pipeline = replace(self.load(*PARTS), source=run.model)
        with jax.set_mesh(self.mesh):
            if self.config.concepts is None:
                with stop.parts("; the same command goes on from there"):
                    learn(
                        pipeline,
                        pictures[mine],
                        self.concept_folder,
                        stop,
                        mesh=self.mesh,
                        size=run.size,
                        config=run.learn,
                        seed=run.seed,
                        sampling=run.sampling,
                        cache=run.cache,
                        keep_params=self.config.mode == "recomputed",
                    )
            own = {"height": run.size, "width": run.size, "seed": run.seed, "batch_size": self._batch_size}
            with stop.parts("; the same command goes on from there"):
                draw(
                    pipeline,
                    self.batches[mine],
                    self._concepts(),
                    self.samples,
                    stop,
                    sampling=Sampling(**vars(run.sampling) | own),
                    length=offset_length(self.items, pipeline.tokenizer_2),
                )

    def similarities(self, networks: Sequence[similarity.Network]) -> list[Section]:
        """The figures of CLIP and DINO in one section."""
        if not networks:
            return []
        each = [similarity.measure(network, self.jobs, self.benchmark, self.samples) for network in networks]
        figures = [
            {name: value for own in all_of_one for name, value in own.items()} for all_of_one in zip(*each, strict=True)
        ]
        protocol = {network.name: network.protocol for network in networks}
        return [Section(f"Cosines of {' and '.join(protocol)}", figures, protocol)]

    def protocol(self) -> dict[str, Any]:
        """What results.json says of how the images were made."""
        return {
            "benchmark": str(self.config.benchmark),
            "benchmark_sha256": self.benchmark.digest,
            "model": self.run.model,
            "base_hash": self._concepts().base_hash,
            "settings": json.loads(read_bytes(self.folder / SETTINGS)),
        }


def _digest(paths: Sequence[AnyPath]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()
