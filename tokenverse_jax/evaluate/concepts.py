"""The concept files of an evaluation: FOLDER/live_subject/animal/00.safetensors for that image of the benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from runtime_jax.files import AnyPath, is_file, path_of
from runtime_jax.messages import cut
from runtime_jax.training.stop import Stop
from tokenverse_jax.concepts.bank import ConceptFile, load_concepts
from tokenverse_jax.concepts.captions import bind_captions
from tokenverse_jax.concepts.compose import PlacedConcept, place_recomputed, place_stored
from tokenverse_jax.concepts.concept_data import encode_prompts, read_image
from tokenverse_jax.concepts.learn import LearnConfig
from tokenverse_jax.concepts.learner import Learner, learn_concepts
from tokenverse_jax.concepts.pool import make_pool
from tokenverse_jax.evaluate.benchmark import Benchmark, Picture
from tokenverse_jax.evaluate.items import Item
from tokenverse_jax.flux.fingerprint import fingerprint
from tokenverse_jax.flux.pipeline import PARTS, Pipeline
from tokenverse_jax.flux.sampling import SamplingConfig
from tokenverse_jax.flux.words import Tokenizer, find_word

Mode = Literal["stored", "recomputed"]


def concept_path(folder: AnyPath, name: str) -> AnyPath:
    """The file of the image `name`."""
    return folder / f"{name}.safetensors"


def needed(items: Sequence[Item]) -> list[str]:
    """The images whose concepts the items use."""
    return list(dict.fromkeys(image for item in items for image in item.images))


@dataclass(frozen=True, kw_only=True, eq=False)
class Concepts:
    """Loaded concept files, by image; those that hold a Concept-Mod are read again where it is needed."""

    files: Mapping[str, ConceptFile]
    folder: AnyPath
    mode: Mode
    strength: float

    @classmethod
    def load(cls, folder: AnyPath, items: Sequence[Item], mode: Mode, strength: float) -> "Concepts":
        """Those of the items.

        Raises:
          ValueError: files or words that are missing; files of different models; no Concept-Mod where directions are to
            be recomputed.
        """
        paths = {name: concept_path(folder, name) for name in needed(items)}
        if missing := [str(path) for path in paths.values() if not is_file(path)]:
            raise ValueError(f"{folder}: {len(missing)} of {len(paths)} concept files are missing: {cut(missing)}")
        files = {}
        for name, path in paths.items():
            file = load_concepts(path)
            if mode == "recomputed" and file.params is None:
                raise ValueError(f"{path}: holds no Concept-Mod, so its directions cannot be recomputed")
            files[name] = replace(file, params=None)
        bases = {file.base_hash: name for name, file in files.items()}
        if len(bases) > 1:
            one, other = list(bases.values())[:2]
            raise ValueError(f"{folder}: {paths[one]} and {paths[other]} were learned on different models")
        blocks = {concept.blocks for file in files.values() for concept in file.concepts}
        if len(blocks) > 1:
            raise ValueError(f"{folder}: concepts of different blocks, {' and '.join(sorted(blocks))}")
        for item in items:
            for use in item.uses:
                try:
                    files[use.image].concept(use.word)
                except ValueError as error:
                    raise ValueError(f"{paths[use.image]}: {error}") from error
        return cls(files=files, folder=folder, mode=mode, strength=strength)

    @property
    def base_hash(self) -> str:
        """Of the model that they were learned on."""
        return next(iter(self.files.values())).base_hash

    def check_base(self, base_hash: str) -> None:
        """Raises ValueError where they were learned on another model."""
        load_concepts(concept_path(self.folder, next(iter(self.files))), base_hash=base_hash)

    def place(
        self, item: Item, tokenizer: Tokenizer, txt: Float[Array, "T J"] | Float[np.ndarray, "T J"] | None
    ) -> list[PlacedConcept]:
        """An item's concepts on its words; `txt`: T5's outputs for its prompt, to recompute directions from."""
        placed = []
        for use in item.uses:
            concept = self.files[use.image].concept(use.word)
            where = tokenizer, item.prompt, use.target, self.strength
            if self.mode == "stored":
                placed.append(place_stored(concept, *where))
            else:
                params = load_concepts(concept_path(self.folder, use.image)).params
                placed.append(place_recomputed(concept, params, jax.numpy.asarray(txt), *where))
        return placed


def check_words(
    benchmark: Benchmark, items: Sequence[Item], tokenizer: Tokenizer, text_length: int, learn: LearnConfig, mode: Mode
) -> None:
    """Checks captions and prompts of concepts that are yet to be learned; needs only the tokenizer.

    Raises:
      ValueError: a caption without one of the words; a word with another number of tokens in a prompt than in the
        captions, unless directions are recomputed.
    """
    counts: dict[tuple[str, str], int] = {}
    for name in needed(items):
        picture = benchmark.pictures[name]
        words = [word.word for word in picture.words]
        try:
            bound = bind_captions(tokenizer, text_length, [picture.captions], words, learn.isolation)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        counts |= {(name, word): len(ids) for word, ids in bound.word_ids.items()}
    wrong = []
    for item in items if mode == "stored" else ():
        for use in item.uses:
            try:
                find_word(tokenizer, item.prompt, use.target, num_tokens=counts[use.image, use.word])
            except ValueError as error:
                wrong.append(f"{use.image}: {error}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(items)} prompts have a word in another number of tokens than the captions; change "
            f"them or tokenverse.json, or take --mode recomputed: {cut(wrong, '; ', most=3)}"
        )


def learn(
    pipeline: Pipeline,
    pictures: Sequence[Picture],
    folder: AnyPath,
    stop: Stop,
    *,
    mesh: Mesh,
    size: int,
    config: LearnConfig,
    seed: int,
    sampling: SamplingConfig,
    cache: str,
    keep_params: bool,
) -> None:
    """Learns the concepts of pictures, one after the other, where their files are missing.

    Args:
      mesh: of this process, on which the pipeline lies.
      size: side of the images, pixels.
      sampling: of the isolation loss's pool, which is kept in `cache`.
      keep_params: also store Concept-Mod's parameters.

    Raises:
      ValueError: an image that cannot be read or would lose more than half in a square.
      FloatingPointError: updates were not finite.
      StoppedError: by a signal, between two pictures.
    """
    pool = _pool(pipeline, config, size, sampling, cache) if config.isolation else None
    learner = Learner(pipeline, config, mesh)
    for picture in tqdm(pictures, desc="concepts", disable=None):
        path = concept_path(folder, picture.name)
        if is_file(path):
            continue
        stop.check()
        file = learn_concepts(
            pipeline,
            read_image(picture.path, size),
            picture.captions,
            [word.word for word in picture.words],
            config=config,
            seed=seed,
            pool=pool,
            learner=learner,
            keep_params=keep_params,
        )
        file.save(path)


def _pool(pipeline: Pipeline, config: LearnConfig, size: int, sampling: SamplingConfig, cache: str) -> Any:
    return make_pool(
        pipeline,
        encode_prompts(pipeline, config.isolation.captions),
        config.isolation,
        size=size,
        sampling=sampling,
        cache=path_of(cache).expanduser(),
        weights={part: fingerprint(getattr(pipeline, part).params) for part in PARTS},
    )
