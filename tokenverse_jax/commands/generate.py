"""`tokenverse generate`: images of a prompt with concepts on its words.

Axes: N images, H W image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array

from runtime_jax.files import AnyPath
from runtime_jax.pictures import image_grid, save_png
from tokenverse_jax.concepts.bank import Concept, load_concepts
from tokenverse_jax.concepts.compose import ConceptRequest, compose, place_recomputed, place_stored
from tokenverse_jax.concepts.concept_mod import Params
from tokenverse_jax.concepts.draw import Sampling, sample
from tokenverse_jax.flux import text
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets
from tokenverse_jax.flux.pipeline import Loader, Pipeline, PromptEncoding
from tokenverse_jax.flux.sampling import SamplingConfig
from tokenverse_jax.flux.words import Tokenizer, find_word

Mode = Literal["stored", "recomputed"]
Compare = Literal["base", "each"]
COLUMNS = 4  # images in a row of the overview
SHOWN_SIDE = 256  # smaller images are drawn larger


class _Chosen(NamedTuple):
    """A request, its concept, and the Concept-Mod in the concept's file."""

    request: ConceptRequest
    concept: Concept
    params: Params | None


def _choose(requests: Sequence[ConceptRequest], base: Pipeline | None, mode: Mode) -> list[_Chosen]:
    """The concepts that are asked for; without `base`, whatever model they were learned on."""
    base_hash = base.base_hash() if base is not None and requests else None
    files = {path: load_concepts(path, base_hash=base_hash) for path in {request.path for request in requests}}
    for path, file in files.items():
        if mode == "recomputed" and file.params is None:
            raise ValueError(f"{path}: holds no Concept-Mod, so its directions cannot be recomputed")
    return [_Chosen(request, request.choose(files[request.path]), files[request.path].params) for request in requests]


def _compose(chosen: Sequence[_Chosen], tokenizer: Tokenizer, prompt: str, txt: Array | None) -> Offsets:
    """The offsets of a prompt; `txt`: T5's outputs, to recompute directions from; None: directions as stored."""
    placed = []
    for request, concept, params in chosen:
        where = prompt, request.target, request.strength
        if txt is None:
            placed.append(place_stored(concept, tokenizer, *where))
        else:
            placed.append(place_recomputed(concept, params, txt, tokenizer, *where))
    return compose(placed) if placed else NO_OFFSETS


def encode(
    load: Loader, prompts: Sequence[str], sampling: SamplingConfig
) -> tuple[PromptEncoding, PromptEncoding | None]:
    """The prompts' encodings, and the empty prompt's if guidance needs it; loads the text encoders only for this."""
    encoders = load("clip", "t5")
    negative = None if sampling.cfg_scale == 1.0 else encoders.encode_prompts([""])
    return encoders.encode_prompts(prompts), negative


def generate(
    load: Loader,
    prompt: str,
    requests: Sequence[ConceptRequest],
    sampling: Sampling,
    *,
    num: int,
    mode: Mode = "stored",
    compare: Compare | None = None,
    out: AnyPath,
) -> None:
    """Writes `out/0000.png` and so on, and `out/overview.png`: the concepts' own images above the drawn ones.

    The text encoders are freed before the transformer is loaded.

    Args:
      load: gives parts of the model.
      requests: the concepts; none for the base model's images.
      num: of images.
      mode: "stored" takes directions from the files, "recomputed" computes them from the prompt with the Concept-Mod in
        the files.
      compare: "base": also the base model's images from the same noise, as `out/0000_base.png`; "each": also those with
        each concept alone, as `out/0000_only_1.png` for the first.

    Raises:
      ValueError: before anything is loaded: impossible sizes; a prompt that is too long; a file that cannot be read,
        has no such word or no Concept-Mod; a word that is not in the prompt, or has another number of tokens there.
        Once the transformer is loaded: a file that was learned on another model.
      NotFiniteError: values that are not finite, see `Pipeline.generate`.
    """
    if num < 1:
        raise ValueError(f"num={num}: at least 1 image is needed")
    if compare and not requests:
        raise ValueError("compare: without concepts there is nothing to compare the base model with")
    load.check_size(sampling.height, sampling.width)
    bare = load()
    tokenizer = bare.tokenizer_2
    text.encode(tokenizer, [prompt], bare.text_length)
    for request in requests:
        find_word(tokenizer, prompt, request.target)
    chosen = _choose(requests, None, mode)
    if mode == "stored":
        _compose(chosen, tokenizer, prompt, None)
    encoded, negative = encode(load, [prompt], sampling)
    pipeline = load("transformer", "vae")
    chosen = _choose(requests, pipeline, mode)
    chosen_of = {"": chosen}
    if compare == "each" and len(chosen) > 1:
        chosen_of |= {f"_only_{number}": [one] for number, one in enumerate(chosen, start=1)}
    if compare is not None:
        chosen_of["_base"] = []
    kinds, txt = {}, None if mode == "stored" else encoded.txt[0]
    for kind, some in chosen_of.items():
        offsets = _compose(some, tokenizer, prompt, txt).repeat(num)
        kinds[kind] = sample(pipeline, encoded, sampling, np.arange(num), negative_prompt=negative, offsets=offsets)
    for kind, images in kinds.items():
        for i, image in enumerate(images):
            save_png(out / f"{i:04}{kind}.png", image)
    notes = {kind: ", ".join(one.request.target for one in some) or "without" for kind, some in chosen_of.items()}
    save_png(out / "overview.png", _overview(kinds, notes, prompt, requests))


def _overview(
    kinds: dict[str, np.ndarray], notes: dict[str, str], prompt: str, requests: Sequence[ConceptRequest]
) -> np.ndarray:
    """Images that the concepts were learned from, then the drawn ones of each kind in turn, over the prompt."""
    num, side = len(kinds[""]), max(kinds[""].shape[1:3])
    starts = range(0, num, COLUMNS)
    rows = [list(images[i : i + COLUMNS]) for i in starts for images in kinds.values()]
    captions = [[prompt] * len(row) for row in rows]
    labels = [notes[kind] for _ in starts for kind in kinds]
    sources = _sources(requests)
    for i in reversed(range(0, len(sources), COLUMNS)):
        images, texts = zip(*sources[i : i + COLUMNS], strict=True)
        rows, captions, labels = [list(images), *rows], [list(texts), *captions], ["learned from", *labels]
    return image_grid(rows, row_labels=labels if requests else (), captions=captions, scale=max(1, SHOWN_SIDE // side))


def _sources(requests: Sequence[ConceptRequest]) -> list[tuple[np.ndarray, str]]:
    """The image of each file that has one, and its words with their targets."""
    sources = []
    for path in dict.fromkeys(request.path for request in requests):
        file = load_concepts(path)
        uses = [(request.choose(file).word, request.target) for request in requests if request.path == path]
        text = ", ".join(word if word == target else f"{word} as {target}" for word, target in uses)
        if file.image is not None:
            sources.append((file.image, f"{Path(path).stem}: {text}"))
    return sources
