"""`tokenverse bench`: learn, draw, measure, tabulate. The same command resumes a run that was stopped."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from mini_scenes import render_scene
from mini_scenes.judge import Judge
from runtime_jax import config as config_lib
from runtime_jax.files import is_remote, write_text
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import only_writer
from tokenverse_jax.bench.cases import Case, ConceptImage, make_cases, make_images, read_images
from tokenverse_jax.bench.metrics import View, measure
from tokenverse_jax.bench.picture import write_picture
from tokenverse_jax.bench.rows import FULL, PROMPT, RENDERED, Row, make_rows, steer_case
from tokenverse_jax.bench.table import complete, markdown
from tokenverse_jax.bench.workdir import Workdir
from tokenverse_jax.concepts.bank import Concept, ConceptFile, load_concepts
from tokenverse_jax.concepts.captions import Captions, bind_captions
from tokenverse_jax.concepts.concept_data import (
    ConceptData,
    encode_concept,
    encode_images,
    encode_prompts,
    make_concepts,
)
from tokenverse_jax.concepts.learn import LearnConfig
from tokenverse_jax.concepts.learner import Learner
from tokenverse_jax.concepts.pool import make_pool
from tokenverse_jax.flux.fingerprint import fingerprint
from tokenverse_jax.flux.pipeline import PARTS, Pipeline, PromptEncoding
from tokenverse_jax.flux.sampling import SamplingConfig

AT_ONCE = 4  # concept images between two reports: both pairs of each kind
Images = UInt8[np.ndarray, "N H W 3"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A whole benchmark, built from what configs/tokenverse_bench.py returns.

    learn: how the full method learns, with per_block and isolation; the other rows leave parts of it out.
    strengths: of the directions without learning.
    images: concept images, a multiple of four.
    pictures: a folder of pictures with their scenes, to learn from instead of scenes of mini_scenes, see `read_images`.
    rows: names of the rows to draw; empty: all.
    """

    model: str = "tiny"
    size: int = 64
    images: int = 64
    pictures: str | None = None
    rows: tuple[str, ...] = ()
    seeds: int = 4
    seed: int = 0
    learn: LearnConfig
    strengths: tuple[float, ...] = (1.0, 2.0)
    sampling: SamplingConfig
    batch_size: int = 32  # images that are drawn at once
    cache: str = "~/.cache/tokenverse_jax/pool"

    def __post_init__(self):
        if not self.learn.per_block or self.learn.isolation is None or self.learn.space != "modulation":
            raise ValueError("learn: must be the full method, with per_block and isolation in the space 'modulation'")
        if self.learn.flip:
            raise ValueError("learn.flip: mirroring changes pose and light, which are measured here")
        if self.seeds < 1 or self.batch_size % self.seeds:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of seeds={self.seeds}")
        self.make_rows()

    def make_rows(self) -> list[Row]:
        """The rows to draw; the prompt alone is always among them, for others are measured against its images."""
        rows = {row.name: row for row in make_rows(self.learn, self.strengths)}
        if unknown := sorted(set(self.rows) - rows.keys()):
            raise ValueError(f"rows: no {', '.join(unknown)}; there are {', '.join(rows)}")
        return [row for name, row in rows.items() if name in (PROMPT, *(self.rows or rows))]


def bench(config: BenchConfig, workdir: str | Path) -> Path:
    """Runs or resumes the benchmark; returns the folder, see `bench.workdir`.

    Raises:
      ValueError: config, model or workdir that do not fit.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      StoppedError: by a signal, after the concept or the images that were being made.
    """
    if is_remote(workdir):
        raise ValueError(f"{os.fspath(workdir)}: a benchmark appends to its files, and needs a folder on a disk")
    with only_writer(workdir) as folder:
        this = Bench.open(config, folder)
        with this.stop, this.stop.parts("; the same command goes on from there"):
            this.draw([case for case in this.cases if not case.images])
            for end in range(AT_ONCE, config.images + 1, AT_ONCE):
                some = this.images[end - AT_ONCE : end]
                for image in tqdm(some, desc=f"images to {end} of {config.images}", disable=None):
                    this.learn(image)
                this.draw([case for case in this.cases if case.images and max(case.images) < end])
                this.measure()
        return folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """The state of a benchmark; `bench` runs it."""

    config: BenchConfig
    files: Workdir
    pipeline: Pipeline
    weights: dict[str, str]  # fingerprints of its parts
    judge: Judge
    images: Sequence[ConceptImage]
    cases: Sequence[Case]
    rows: Sequence[Row]
    learners: dict[str, Learner] = field(default_factory=dict)  # by name of the row
    stop: Stop = field(default_factory=Stop)  # checked before each piece of work

    @classmethod
    def open(cls, config: BenchConfig, workdir: str | Path) -> "Bench":
        """A new benchmark, or the one in a workdir; ValueError where config, model and workdir do not fit."""
        folder = config.pictures
        images = read_images(Path(folder), config.images) if folder else make_images(config.images, config.seed)
        pipeline, judge = Pipeline.from_pretrained(config.model), Judge.load()
        weights = {part: fingerprint(getattr(pipeline, part).params) for part in PARTS}
        resolved = config_lib.to_dict(config) | {"weights": weights, "judge": fingerprint(judge.params)}
        for image in images:  # a caption that is too long is found now, and not when its turn comes
            _bind(pipeline, config.learn, image)
        return cls(
            config=config,
            files=Workdir(workdir, resolved),
            pipeline=pipeline,
            weights=weights,
            judge=judge,
            images=images,
            cases=make_cases(images, config.seed),
            rows=config.make_rows(),
        )

    # Learning.

    def learn(self, image: ConceptImage) -> None:
        """Learns the concepts of an image with every row, where they are not on disk."""
        for row in self.rows:
            if row.learn is None or (path := self.files.concept(row.name, image.number)).exists():
                continue
            self.stop.check()
            if row.name not in self.learners:
                self.learners[row.name] = Learner(self.pipeline, row.learn)
            data = self._encode(row.learn, image)
            params = self.learners[row.name].learn(data, self.config.seed)
            ConceptFile(
                concepts=make_concepts(params, data, row.learn),
                caption=image.captions[0],
                base=self.config.model,
                base_hash=self._base_hash(row),
            ).save(path)

    def _encode(self, config: LearnConfig, image: ConceptImage) -> ConceptData:
        captions = _bind(self.pipeline, config, image)
        data = encode_concept(self.pipeline, config, image.pixels(self.config.size)[None], captions)
        return self.with_pool(data) if config.isolation else data

    def with_pool(self, data: ConceptData) -> ConceptData:
        """The data with the isolation loss's pool."""
        return replace(data, pool_latents=self._pool_latents)

    @functools.cached_property
    def _pool_latents(self) -> np.ndarray:
        isolation = self.config.learn.isolation
        pool = make_pool(
            self.pipeline,
            encode_prompts(self.pipeline, isolation.captions),
            isolation,
            size=self.config.size,
            sampling=self.config.sampling,
            cache=Path(self.config.cache).expanduser(),
            weights=self.weights,
        )
        return encode_images(self.pipeline, pool)

    def _base_hash(self, row: Row) -> str:
        """The model's, changed for rows whose directions `tokenverse generate` would misread."""
        own = self.pipeline.base_hash()
        return own if row.learn.space == "modulation" else f"{own} {row.learn.space}"

    # Drawing.

    def draw(self, cases: Sequence[Case]) -> None:
        """Draws what is not on disk, some cases at once; all rows have the same noise for a case and a seed."""
        seeds, together = self.config.seeds, self.config.batch_size // self.config.seeds
        for row in self.rows:
            missing = [case for case in cases if row.takes(case.task) and not self.files.has_images(row.name, case)]
            for start in tqdm(range(0, len(missing), together), desc=row.name, leave=False, disable=None):
                self.stop.check()
                some = missing[start : start + together]
                filled = some + some[-1:] * (together - len(some))
                images = self.generate(row, filled, [self._concepts(row, case) for case in filled])
                for case, own in zip(some, images.reshape(together, seeds, *images.shape[1:]), strict=False):
                    self.files.save_images(row.name, case, own)

    def generate(
        self, row: Row, cases: Sequence[Case], concepts: Sequence[Mapping[tuple[int, str], Concept]]
    ) -> Images:
        """All seeds of the first case, then of the next one.

        Args:
          concepts: of each case, by number of the image and word.
        """
        encoded = encode_prompts(self.pipeline, [case.prompt for case in cases])
        steered = [
            steer_case(self.pipeline, row, case, txt, own)
            for case, txt, own in zip(cases, encoded.txt, concepts, strict=True)
        ]
        seeds = self.config.seeds
        txt, offsets = jax.tree.map(lambda *parts: jnp.repeat(jnp.stack(parts), seeds, axis=0), *steered)
        images = self.pipeline.generate(
            PromptEncoding(txt, jnp.repeat(encoded.vec, seeds, axis=0)),
            height=self.config.size,
            width=self.config.size,
            seed=self.config.seed,
            examples=np.asarray([self.cases.index(case) * seeds + i for case in cases for i in range(seeds)]),
            offsets=offsets.replace(blocks=self.config.learn.blocks),
            **vars(self.config.sampling),
        )
        return np.asarray(images)

    def _concepts(self, row: Row, case: Case) -> dict[tuple[int, str], Concept]:
        """The row's concepts for a case, by number of the image and word."""
        concepts = {}
        if row.learn is None:
            return concepts
        for number in case.images:
            file = load_concepts(self.files.concept(row.name, number), base_hash=self._base_hash(row))
            concepts |= {(number, concept.word): concept for concept in file.concepts}
        return concepts

    # Measuring.

    def measure(self) -> None:
        """Measures what is drawn and not yet measured, and writes the report."""
        done = {(record["row"], record["task"], record["case"]) for record in self.files.records()}
        drawn = [case for case in self.cases if self.files.has_images(PROMPT, case)]
        names = [RENDERED, *(row.name for row in self.rows)]
        for name in names:
            there = drawn if name == RENDERED else [case for case in drawn if self.files.has_images(name, case)]
            cases = [case for case in there if (name, case.task, case.number) not in done]
            pairs = zip(cases, self._views(name, cases), self._views(PROMPT, cases), strict=True)
            records = []
            for case, views, bases in pairs:
                seeds = [measure(case, *both)._asdict() for both in zip(views, bases, strict=True)]
                records.append({"row": name, "task": case.task, "unit": case.unit, "case": case.number, "seeds": seeds})
            self.files.add_records(records)
        table = markdown(complete(self.files.records()), names, FULL)
        write_text(self.files.path / "table.md", table)
        for task in dict.fromkeys(case.task for case in drawn):
            write_picture(
                [case for case in drawn if case.task == task],
                self.images,
                [row.name for row in self.rows if row.takes(task)],
                concept=lambda image: image.pixels(self.config.size),
                drawn=lambda row, case: self._drawn(row, case)[0],
                path=self.files.path / f"{task.replace(' ', '_')}.png",
            )

    def _views(self, row: str, cases: Sequence[Case]) -> list[list[View]]:
        """The views of all seeds for each case."""
        images = [image for case in cases for image in self._drawn(row, case)]
        seen = self.judge.look(np.stack(images)) if images else []
        views = [View(*pair) for pair in zip(images, seen, strict=True)]
        return [views[start : start + self.config.seeds] for start in range(0, len(views), self.config.seeds)]

    def _drawn(self, row: str, case: Case) -> Images:
        """The images of all seeds; true scenes go through the base model's autoencoder."""
        if row != RENDERED:
            return self.files.images(row, case, self.config.seeds)
        pixels, _ = render_scene(case.scene, self.config.size)
        grid = self.pipeline.vae.config.token_grid(*pixels.shape[:2])
        decoded = self.pipeline.decode_latents(self.pipeline.encode_images(pixels[None]), grid)
        return np.repeat(np.asarray(decoded), self.config.seeds, axis=0)


def _bind(pipeline: Pipeline, config: LearnConfig, image: ConceptImage) -> Captions:
    tokenizer, length = pipeline.tokenizer_2, pipeline.text_length
    return bind_captions(tokenizer, length, [image.captions], list(image.words), config.isolation)
