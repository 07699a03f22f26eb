"""A run that learns the concepts of an image: config, encoded data, loop, pictures on the way, and the concept file."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.config import Duration
from runtime_jax.data import center_crop
from runtime_jax.nn.compute import Compute
from runtime_jax.pictures import image_grid
from runtime_jax.training import loop
from runtime_jax.training.fit import fit
from runtime_jax.workdir import only_writer
from tokenverse_jax.concepts.bank import KEPT_SIDE, ConceptFile
from tokenverse_jax.concepts.compose import compose, place_stored
from tokenverse_jax.concepts.concept_data import (
    Captions,
    ConceptData,
    batches,
    bind_captions,
    encode_concept,
    encode_images,
    encode_prompts,
    make_concepts,
    read_image,
)
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
    """An image file and captions for it: several, in other words and orders, that all name the words to learn."""

    path: str
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LearnRunConfig:
    """A whole run; what configs/tokenverse_*.py return is built into this."""

    model: str  # a FLUX pipeline: folder, hub id, or the name of a shipped one
    transformer: str | None = None  # its weights in FLUX's own file, instead of the folder's
    vae: str | None = None  # the autoencoder's in FLUX's own file
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model's parameters
    compute: Compute = Compute()
    mesh: sharding.MeshConfig = sharding.MeshConfig(data=1, tensor=-1)  # batches are small: devices share the model
    images: tuple[ImageConfig, ...]
    words: tuple[str, ...]  # those to store; "dog#2" is the second "dog" of a caption
    size: int  # side of the images, pixels
    learn: LearnConfig = LearnConfig()
    seed: int = 0
    prompts: tuple[str, ...] = ()  # of the pictures on the way; each holds one of the words
    sampling: SamplingConfig = SamplingConfig()  # of these, and of the isolation loss' pool
    cache: str = "~/.cache/tokenverse_jax/pool"  # of the pool's images
    keep_params: bool = False  # write Concept-Mod's parameters too, for directions recomputed for each prompt
    log_every: int = 20
    checkpoint_every: int = 200
    preview_every: int = 200

    def __post_init__(self):
        if self.learn.space != "modulation":
            raise ValueError(
                f"learn.space={self.learn.space!r}: concept files are of 'modulation'; the benchmark has the others"
            )


class Learned(NamedTuple):
    """What a run leaves."""

    path: Path  # the concept file
    step: int
    stopped_by: str | None  # the signal that ended the run early; there is no concept file then


def learn(config: LearnRunConfig, workdir: str | Path) -> Learned:
    """Learns, or goes on learning, in `workdir`.

    What can be wrong with the config, the images, the words and the model's folder is found before anything is loaded
    onto a device. Then everything is encoded, and the text encoders go before the transformer comes.

    Raises:
      ValueError: config, images, words, model or checkpoint that do not fit.
      WorkdirError: the workdir cannot be written, or another run is writing it.
      FloatingPointError: too many updates in a row were not finite.
    """
    if jax.process_count() > 1:
        raise ValueError("a concept is learned by one process, on all of its devices")
    loop_config = loop.LoopConfig(
        duration=Duration(steps=config.learn.total_steps),
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        preview_every=config.preview_every,
    )
    with only_writer(workdir, loop_config.min_free_bytes) as folder:
        return _learn(config, loop_config, folder)


def _learn(config: LearnRunConfig, loop_config: loop.LoopConfig, workdir: Path) -> Learned:
    images = [read_image(image.path, config.size) for image in config.images]
    mesh = sharding.make_mesh(config.mesh)
    load = Loader(
        config.model,
        transformer=config.transformer,
        vae=config.vae,
        dtype=config.dtype,
        mesh=mesh,
        compute=config.compute,
    )
    load.check_size(config.size, config.size)
    bare = load()
    captions = bind_captions(
        bare.tokenizer_2,
        bare.text_length,
        [image.captions for image in config.images],
        config.words,
        config.learn.isolation,
    )
    shown = [_shown_words(bare.tokenizer_2, prompt, captions) for prompt in config.prompts]
    if config.prompts:
        text.encode(bare.tokenizer_2, config.prompts, bare.text_length)
    pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    # The pool of the isolation loss is sampled by the model.
    must_match = ("weights", "pixels", "images", "words", "size", "dtype", "learn", "seed")
    must_match += ("sampling",) if config.learn.isolation else ()

    with jax.set_mesh(mesh):
        ready = _prepare(config, load, np.stack(images), captions)
        learner = Learner(ready.pipeline, config.learn, mesh)
        result = fit(
            learner.program,
            workdir=workdir,
            config=loop_config,
            resolved_config=config_lib.to_dict(config) | {"weights": ready.weights, "pixels": pixels},
            total_steps=config.learn.total_steps,
            batch_size=config.learn.batch_size,
            batches=functools.partial(batches, ready.data, config.learn, config.seed),
            dtype=config.compute.dtype,
            variant=lambda step: learner.variant(step, config.seed, ready.data),
            preview=_Previews(config, ready, shown).draw if config.prompts else None,
            init=functools.partial(learner.init, config.seed),
            must_match=must_match,
        )
        path = workdir / CONCEPT_FILE
        if result.stopped_by is None:
            params = jax.device_get(result.state.params)
            ConceptFile(
                concepts=make_concepts(params, ready.data, config.learn),
                caption=captions.texts[0],
                base=config.model,
                base_hash=ready.weights["transformer"],
                image=center_crop(images[0], min(config.size, KEPT_SIDE)),
                params=params if config.keep_params else None,
            ).save(path)
    return Learned(path, result.step, result.stopped_by)


def _shown_words(tokenizer: Tokenizer, prompt: str, captions: Captions) -> list[str]:
    """The words to learn that a prompt has, in as many tokens."""
    words, missing = [], None
    for word, ids in captions.word_ids.items():
        try:
            find_word(tokenizer, prompt, word, num_tokens=len(ids))
            words.append(word)
        except ValueError as error:
            missing = error
    if not words:
        raise ValueError(f"prompts: none of the words to learn is in one of them: {missing}")
    return words


class _Prepared(NamedTuple):
    """The model without its text encoders, and everything that they were needed for."""

    pipeline: Pipeline
    weights: dict[str, str]  # fingerprints of all parts
    data: ConceptData
    prompts: PromptEncoding | None
    negative: PromptEncoding | None


def _prepare(config: LearnRunConfig, load: Loader, images: np.ndarray, captions: Captions) -> _Prepared:
    isolation = config.learn.isolation
    pipeline = load("vae", "clip", "t5")
    data = encode_concept(pipeline, config.learn, images, captions)
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
            cache=Path(config.cache).expanduser(),
            weights=weights,
            negative=negative,
        )
        data = replace(data, pool_latents=encode_images(pipeline, pool))
    return _Prepared(pipeline, weights, data, prompts, negative)


class _Previews:
    """Pictures of the prompts without and with what has been learned."""

    def __init__(self, config: LearnRunConfig, ready: _Prepared, shown: Sequence[Sequence[str]]):
        self._config, self._ready, self._shown = config, ready, shown
        self._base: np.ndarray | None = None

    def draw(self, state: LearnState, step: int) -> dict[str, np.ndarray]:
        """The base model's pictures above those with the words' directions."""
        config, tokenizer = self._config, self._ready.pipeline.tokenizer_2
        concepts = {c.word: c for c in make_concepts(state.params, self._ready.data, config.learn)}
        placed = [
            [place_stored(concepts[word], tokenizer, prompt, word) for word in words]
            for prompt, words in zip(config.prompts, self._shown, strict=True)
        ]
        length = 1 + max(place for row in placed for item in row for place in item.places)
        composed = [compose(row, length) for row in placed]
        if self._base is None:
            self._base = self._generate()
        images = self._generate(jax.tree.map(lambda *parts: jnp.stack(parts), *composed))
        labels = ("base", f"step {step}")
        return {
            "prompts": image_grid([list(self._base), list(images)], row_labels=labels, column_labels=config.prompts)
        }

    def _generate(self, offsets: Offsets = NO_OFFSETS) -> np.ndarray:
        config, ready = self._config, self._ready
        images = ready.pipeline.generate(
            ready.prompts,
            height=config.size,
            width=config.size,
            seed=config.seed,
            negative_prompt=ready.negative,
            offsets=offsets,
            **vars(config.sampling),
        )
        return np.asarray(images)
