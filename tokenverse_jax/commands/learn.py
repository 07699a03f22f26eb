"""`tokenverse learn`: a run that learns the concepts of images, from its config to the concept files.

A run is of one Concept-Mod, learned from one image or from several together, or of several: each image that has words
of its own gets one, and all are learned side by side, as each would be alone.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.config import Duration
from runtime_jax.data import center_crop
from runtime_jax.files import path_of
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.pictures import image_grid
from runtime_jax.training import loop
from runtime_jax.training.fit import fit
from runtime_jax.workdir import only_writer
from tokenverse_jax.concepts.bank import KEPT_SIDE, ConceptFile
from tokenverse_jax.concepts.captions import Captions, bind_captions
from tokenverse_jax.concepts.compose import compose, place_stored
from tokenverse_jax.concepts.concept_data import (
    ConceptData,
    alike,
    draw,
    encode_concept,
    encode_images,
    encode_prompts,
    make_concepts,
    read_image,
)
from tokenverse_jax.concepts.concept_mod import Params
from tokenverse_jax.concepts.familiar import loss_ratios, warn_unfamiliar
from tokenverse_jax.concepts.learn import LearnConfig, LearnState
from tokenverse_jax.concepts.learner import Learner
from tokenverse_jax.concepts.pool import make_pool
from tokenverse_jax.flux import text
from tokenverse_jax.flux.fingerprint import fingerprint
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets
from tokenverse_jax.flux.pipeline import Loader, Pipeline, PromptEncoding
from tokenverse_jax.flux.sampling import SamplingConfig
from tokenverse_jax.flux.words import Tokenizer, find_word

CONCEPT_FILE = "concept.safetensors"


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """An image file and its captions, in different words and orders; each contains every word that the image has."""

    path: str
    captions: tuple[str, ...]
    words: tuple[str, ...] = ()  # to learn from this image alone

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return path_of(self.path).stem


@dataclass(frozen=True, kw_only=True)
class LearnRunConfig:
    """A whole run, built from what configs/tokenverse_*.py return."""

    model: str  # a FLUX pipeline: folder, hub id, or the name of a shipped one
    transformer: str | None = None  # a file of its weights in FLUX's own layout, instead of the folder's
    vae: str | None = None  # the same for the autoencoder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model's parameters
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig(data=1, tensor=-1)  # batches are small: devices share the model
    images: tuple[ImageConfig, ...]
    words: tuple[str, ...] = ()  # to learn from all images together; "dog#2" is the second "dog" of a caption
    size: int  # side of the images, pixels
    learn: LearnConfig = LearnConfig()
    at_once: int = 1  # images with words of their own that are computed together: more memory, better use of a device
    seed: int = 0
    prompts: tuple[str, ...] = ()  # drawn during learning; each contains one of the words
    sampling: SamplingConfig = SamplingConfig()  # of the prompts, and of the isolation loss's pool
    cache: str = "~/.cache/tokenverse_jax/pool"  # of the pool's images
    keep_params: bool = False  # also store Concept-Mod's parameters, to recompute directions for each prompt
    log_every: int = 20
    checkpoint_every: int = 200
    preview_every: int = 200

    def __post_init__(self):
        if self.learn.space != "modulation":
            raise ValueError(
                f"learn.space={self.learn.space!r}: concept files are of 'modulation'; the benchmark has the others"
            )
        if self.at_once < 1:
            raise ValueError(f"at_once={self.at_once}: at least 1 is needed")
        if self.runs is None:
            return
        names = [image.name for image in self.images]
        if self.words or not all(image.words for image in self.images):
            raise ValueError("words: either the run has words, for all images together, or each image has its own")
        if len(set(names)) < len(names):
            raise ValueError(f"images: files of different names are needed, which name the concepts; got {names}")
        if self.learn.isolation and self.learn.isolation.together:
            raise ValueError("learn.isolation.together needs images that are learned together, with `words` of the run")

    @property
    def runs(self) -> int | None:
        """How many images are learned side by side, each by itself; None: all together."""
        return len(self.images) if any(image.words for image in self.images) else None

    def files(self) -> list[str]:
        """Names of the concept files that are written."""
        return [CONCEPT_FILE] if self.runs is None else [f"{image.name}.safetensors" for image in self.images]


def learn(config: LearnRunConfig, workdir: str | os.PathLike) -> loop.Result:
    """Learns, or resumes, in `workdir`, and writes the concept files there unless a signal ends the run early.

    Errors in the config, the images, the words and the model's folder are found before anything is loaded onto a
    device. Then everything is encoded, and the text encoders are freed before the transformer is loaded.

    Raises:
      ValueError: config, images, words, model or checkpoint that do not fit.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many updates in a row were not finite.
    """
    how, total = config.learn, config.learn.total_steps
    loop_config = loop.LoopConfig(
        duration=Duration(steps=total),
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        preview_every=config.preview_every,
    )
    with only_writer(workdir, loop_config.min_free_bytes) as folder:
        images = [read_image(image.path, config.size) for image in config.images]
        mesh = make_mesh(config.mesh)
        sharding.check_batch("learn.batch_size", how.batch_size, mesh)
        files = {"transformer": config.transformer, "vae": config.vae}
        load = Loader(config.model, **files, dtype=config.dtype, mesh=mesh, compute=config.compute)
        load.check_size(config.size, config.size)
        bare = load()
        tokenizer = bare.tokenizer_2
        texts = [image.captions for image in config.images]
        groups = [(texts, config.words)]
        if config.runs is not None:
            groups = [([image.captions], image.words) for image in config.images]
        captions = [bind_captions(tokenizer, bare.text_length, *group, how.isolation) for group in groups]
        shown = [_shown_words(tokenizer, prompt, captions) for prompt in config.prompts]
        if config.prompts:
            text.encode(tokenizer, config.prompts, bare.text_length)
        must_match = ["weights", "pixels", "images", "words", "size", "dtype", "learn", "seed"]
        if how.isolation:
            must_match.append("sampling")  # of the pool

        with jax.set_mesh(mesh):
            ready = _prepare(config, load, np.stack(images), captions)
            learner = Learner(ready.pipeline, how, mesh, runs=config.runs, at_once=config.at_once)
            pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
            result = fit(
                learner.program,
                workdir=folder,
                config=loop_config,
                resolved_config=config_lib.to_dict(config) | {"weights": ready.weights, "pixels": pixels},
                total_steps=total,
                batch_size=how.batch_size,
                batches=lambda step: sharding.own_rows(_batches(config, ready.data, step), mesh),
                dtype=config.compute.dtype,
                variant=lambda step: learner.variant(step, config.seed, ready.data[0]),
                preview=functools.partial(ready.preview, shown) if config.prompts else None,
                init=functools.partial(learner.init, config.seed),
                must_match=must_match,
            )
            if result.stopped_by is None:
                first = images[: len(ready.data)]  # one for each file
                every = zip(config.files(), ready.params(result.state), ready.data, first, strict=True)
                for name, params, data, image in every:
                    file = ConceptFile(
                        concepts=make_concepts(params, data, how),
                        caption=data.captions.texts[0],
                        base=config.model,
                        base_hash=ready.weights["transformer"],
                        image=center_crop(image, min(config.size, KEPT_SIDE)),
                        params=params if config.keep_params else None,
                    )
                    if jax.process_index() == 0:
                        file.save(folder / name)
        return result


def _batches(config: LearnRunConfig, runs: Sequence[ConceptData], start: int) -> Iterator[loop.Batch]:
    """From step `start` on; prints a line where the second stage begins. Those of several runs are stacked."""
    for step in range(start, config.learn.total_steps):
        if step == config.learn.stage_1.steps:
            low = 1 - config.learn.stage_2.high_share
            if jax.process_index() == 0:
                tqdm.write(f"stage 2 begins after step {step}, {low:.0%} at low noise: the loss jumps")
        drawn = [draw(data, config.learn, config.seed, step) for data in runs]
        yield drawn[0] if config.runs is None else jax.tree.map(lambda *parts: np.stack(parts, axis=1), *drawn)


Shown = tuple[int, str]  # a run and one of its words


def _shown_words(tokenizer: Tokenizer, prompt: str, captions: Sequence[Captions]) -> list[Shown]:
    """The words to learn that a prompt has, in as many tokens, each with the number of the first run that learns it."""
    words, missing = {}, None
    for run, own in enumerate(captions):
        for word, ids in own.word_ids.items():
            try:
                words.setdefault(find_word(tokenizer, prompt, word, num_tokens=len(ids)), (run, word))
            except ValueError as error:
                missing = error
    if not words:
        raise ValueError(f"prompts: one of them contains none of the words to learn: {missing}")
    return list(words.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """The model without its text encoders, and everything that was encoded with them."""

    config: LearnRunConfig
    pipeline: Pipeline
    weights: dict[str, str]  # fingerprints of all parts
    data: Sequence[ConceptData]  # of each run
    prompts: PromptEncoding | None
    negative: PromptEncoding | None

    def params(self, state: LearnState) -> list[Params]:
        """Concept-Mod's parameters of each run, on the host."""
        params = sharding.to_host(state.params)
        if self.config.runs is None:
            return [params]
        return [jax.tree.map(lambda x, run=run: x[run], params) for run in range(self.config.runs)]

    def preview(self, shown: Sequence[Sequence[Shown]], state: LearnState, step: int) -> dict[str, np.ndarray]:
        """The base model's pictures of the prompts above those with the learned words; `shown`: each prompt's words."""
        prompts, tokenizer = self.config.prompts, self.pipeline.tokenizer_2
        made = [make_concepts(*run, self.config.learn) for run in zip(self.params(state), self.data, strict=True)]
        concepts = {(run, concept.word): concept for run, own in enumerate(made) for concept in own}
        placed = [
            [place_stored(concepts[key], tokenizer, prompt, key[1]) for key in keys]
            for prompt, keys in zip(prompts, shown, strict=True)
        ]
        length = 1 + max(position for row in placed for item in row for position in item.positions)
        offsets = jax.tree.map(lambda *parts: jnp.stack(parts), *(compose(row, length) for row in placed))
        rows = [list(self._base_images), list(self._draw(offsets))]
        return {"prompts": image_grid(rows, row_labels=("base", f"step {step}"), column_labels=prompts)}

    @functools.cached_property
    def _base_images(self) -> np.ndarray:
        return self._draw()

    def _draw(self, offsets: Offsets = NO_OFFSETS) -> np.ndarray:
        config = self.config
        settings = vars(config.sampling) | {"height": config.size, "width": config.size, "seed": config.seed}
        images = self.pipeline.generate(self.prompts, negative_prompt=self.negative, offsets=offsets, **settings)
        return sharding.to_host(images)


def _prepare(config: LearnRunConfig, load: Loader, images: np.ndarray, captions: Sequence[Captions]) -> _Prepared:
    isolation = config.learn.isolation
    pipeline = load("vae", "clip", "t5")
    groups = [images] if config.runs is None else np.split(images, config.runs)
    data = alike([encode_concept(pipeline, config.learn, *run) for run in zip(groups, captions, strict=True)])
    prompts = encode_prompts(pipeline, config.prompts) if config.prompts else None
    negative = encode_prompts(pipeline, [""]) if config.sampling.cfg_scale != 1.0 else None
    pool_prompts = encode_prompts(pipeline, isolation.captions) if isolation else None
    weights = {name: fingerprint(getattr(pipeline, name).params) for name in ("vae", "clip", "t5")}
    pipeline = replace(pipeline, clip=None, t5=None)
    pipeline = replace(pipeline, transformer=load("transformer").transformer)
    weights["transformer"] = pipeline.base_hash()
    if isolation:
        pool = make_pool(
            pipeline,
            pool_prompts,
            isolation,
            size=config.size,
            sampling=config.sampling,
            cache=path_of(config.cache).expanduser(),
            weights=weights,
            negative=negative,
        )
        pool_latents = encode_images(pipeline, pool)
        _warn_unfamiliar(config, pipeline, data, (pool_latents, pool_prompts))
        data = [replace(run, pool_latents=pool_latents) for run in data]
    return _Prepared(config=config, pipeline=pipeline, weights=weights, data=data, prompts=prompts, negative=negative)


def _warn_unfamiliar(
    config: LearnRunConfig,
    pipeline: Pipeline,
    runs: Sequence[ConceptData],
    own: tuple[np.ndarray, PromptEncoding],
) -> None:
    """Warns of images that the model cannot draw, each under its first caption."""
    first = [(run, run.captions.image.index(number)) for run in runs for number in range(len(run.latents))]
    latents = np.concatenate([run.latents[:, 0] for run in runs])
    captions = PromptEncoding(*(np.stack([getattr(run, name)[row] for run, row in first]) for name in ("txt", "vec")))
    ratios = loss_ratios(pipeline, (latents, captions), own, runs[0].grid, config.learn.guidance)
    if jax.process_index() == 0:
        warn_unfamiliar(ratios.tolist(), [image.path for image in config.images])
