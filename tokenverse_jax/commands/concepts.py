"""`tokenverse concepts inspect`: the contents of concept files, and which of their words would blend in one picture."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.cost import table
from runtime_jax.files import AnyPath
from runtime_jax.finite import check_finite
from tokenverse_jax.concepts import bank
from tokenverse_jax.concepts.bank import Concept, ConceptFile
from tokenverse_jax.concepts.compose import PlacedConcept, compose
from tokenverse_jax.concepts.concept_data import encode_prompts
from tokenverse_jax.flux import autoencoder
from tokenverse_jax.flux.model import Flux
from tokenverse_jax.flux.model_folder import Params
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets
from tokenverse_jax.flux.pipeline import GUIDANCE, Loader, Pipeline, PromptEncoding
from tokenverse_jax.flux.words import find_span, split_number

GRID = (8, 8)  # of the noise that the keys are looked at with
# Two words are likely to blend above this mean cosine of their keys. With the tiny model, the fifth of the benchmark's
# pairs above it lost a third of CP (docs/benchmark.md); other models have not been measured.
PARALLEL = 0.47


class Pair(NamedTuple):
    """Two words of different files, and the mean cosine of their attention keys."""

    first: str
    second: str
    plain: float  # of the words themselves
    with_concepts: float


def inspect_bank(paths: Sequence[AnyPath], loader: Callable[[str], Loader], model: str | None) -> str:
    """Tables of files and words; with several files also of the similarity of their words' attention keys.

    Args:
      loader: of a model by its name.
      model: name of the base model; None: the one in the files.

    Raises:
      ValueError: a file that is not a concept file, or files of several bases.
    """
    files = {path: bank.load_concepts(path) for path in paths}
    names = shortest_names(files)
    file_rows, word_rows = [], []
    for path, file in files.items():
        has_params, size = "no" if file.params is None else "yes", f"{path.stat().st_size / 1e3:,.0f}"
        file_rows.append((str(path), file.caption, f"{file.base} ({file.base_hash[:8]})", has_params, size))
        word_rows += [_word_row(str(names[path]), concept) for concept in file.concepts]
    lines = [
        *table(("file", "caption", "base", "Concept-Mod", "kB"), file_rows),
        "",
        *table(("word", "file", "tokens", "blocks", "strength", "norm", "norm of what blocks add"), word_rows),
    ]
    if len(files) > 1:
        bases = {file.base_hash: file.base for file in files.values()}
        if len(bases) > 1:
            raise ValueError(f"learned on different models, so they cannot be composed: {', '.join(bases.values())}")
        ((base_hash, base),) = bases.items()
        pairs = key_similarities(loader(model or base), files, base_hash)
        rows = [(pair.first, pair.second, f"{pair.with_concepts:.3f}", f"{pair.plain:.3f}") for pair in pairs]
        lines += ["", *table(("word", "other word", "cosine of their keys", "without the concepts"), rows)]
        lines += [
            f"warning: {pair.first} and {pair.second} have similar attention keys "
            f"({pair.with_concepts:.3f} > {PARALLEL}): in one picture they tend to blend"
            for pair in pairs
            if pair.with_concepts > PARALLEL
        ]
    return "\n".join(lines)


def shortest_names(paths: Collection[AnyPath]) -> dict[AnyPath, Path]:
    """Each path's last parts, as few as tell it from the others."""
    tails = {path: [Path(*path.parts[-count:]) for count in range(1, len(path.parts) + 1)] for path in paths}
    shared = Counter(itertools.chain.from_iterable(tails.values()))
    return {path: next((tail for tail in parts if shared[tail] == 1), path) for path, parts in tails.items()}


def _word_row(file: str, concept: Concept) -> tuple[str, ...]:
    norm = lambda array: f"{np.linalg.norm(array, axis=-1).mean():.2f}"  # noqa: E731
    per_block = "-" if concept.block_offset is None else norm(concept.block_offset)
    cells = (concept.word, file, len(concept.token_ids), concept.blocks, concept.strength)
    return (*map(str, cells), norm(concept.offset), per_block)


def key_similarities(load: Loader, files: dict[AnyPath, ConceptFile], base_hash: str) -> list[Pair]:
    """The similarity of every two words of different files, each pair in its own prompt, on pure noise.

    The text encoders are freed before the transformer is loaded.

    Raises:
      ValueError: the model is not the files' base, or two concepts were learned in different blocks.
      NotFiniteError: keys that are not finite.
    """
    tokenizer = load().tokenizer_2
    words = [(path, concept) for path, file in files.items() for concept in file.concepts]
    paths = {path: short.with_suffix("") for path, short in shortest_names(files).items()}
    names, prompts, placed = [], [], []
    for (path, first), (other, second) in itertools.combinations(words, 2):
        if path != other:
            name, twin = (split_number(concept.word)[0] for concept in (first, second))
            prompt = f"a {name} and a {twin}"
            spans = (2, 2 + len(name)), (len(prompt) - len(twin), len(prompt))
            where = [find_span(tokenizer, prompt, *span) for span in spans]
            names.append((f"{paths[path]}:{first.word}", f"{paths[other]}:{second.word}"))
            prompts.append(prompt)
            placed.append([PlacedConcept(first, where[0]), PlacedConcept(second, where[1])])
    if not prompts:
        return []
    encoded = encode_prompts(load("clip", "t5"), prompts)
    pipeline = load("transformer")
    if pipeline.base_hash() != base_hash:
        raise ValueError(f"{pipeline.source}: not the model that the concepts were learned on ({base_hash})")
    keys = compiled_keys(pipeline)
    pairs = []
    for i, (two, concepts) in enumerate(zip(names, placed, strict=True)):
        one_prompt = PromptEncoding(*(part[i : i + 1] for part in encoded))
        pairs.append(Pair(*two, *cosine_in_prompt(keys, one_prompt, concepts)))
    finite = np.isfinite([pair[2:] for pair in pairs]).all(axis=1)
    check_finite({"the attention keys of pair": finite}, {"transformer": pipeline.transformer.params})
    return pairs


Keys = Callable[[PromptEncoding, Offsets], jax.Array]


def cosine_in_prompt(keys: Keys, encoded: PromptEncoding, placed: Sequence[PlacedConcept]) -> tuple[float, float]:
    """Similarity of the keys (see `compiled_keys`) of two words of a prompt, without and with their concepts."""
    where, composed = [item.positions for item in placed], compose(placed, encoded.txt.shape[1])
    plain, steered = (float(bank.key_similarity(keys(encoded, each), *where)) for each in (NO_OFFSETS, composed))
    return plain, steered


def compiled_keys(pipeline: Pipeline) -> Keys:
    """(prompt, concepts on it) -> attention keys [blocks, T, H, head] of its tokens."""
    part = pipeline.transformer
    flux = Flux(part.config, pipeline.compute)
    noise = jax.random.normal(jax.random.key(0), (1, GRID[0] * GRID[1], part.config.in_channels))

    @jax.jit
    def compiled(params: Params, txt: jax.Array, vec: jax.Array, offsets: Offsets) -> jax.Array:
        inputs = {
            "img": noise,
            "img_ids": autoencoder.image_ids(GRID),
            "txt": txt,
            "txt_ids": jnp.zeros((txt.shape[1], 3)),
            "timesteps": jnp.ones(1),
            "vec": vec,
            "guidance": jnp.full(1, GUIDANCE) if part.config.guidance_embeds else None,
        }
        return bank.text_keys(flux, params, inputs | {"offsets": offsets})[:, 0]

    def keys(encoded: PromptEncoding, offsets: Offsets) -> jax.Array:
        return compiled(part.params, encoded.txt, encoded.vec, offsets.repeat(1))

    return keys
