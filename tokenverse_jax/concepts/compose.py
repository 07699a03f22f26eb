"""Concepts in a new prompt: which one goes on which word, and several of them at once.

Axes: T text tokens, J width of the text encoder, n tokens of a word, D width.
"""

import functools
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenverse_jax.concepts.bank import Concept, ConceptFile
from tokenverse_jax.concepts.concept_mod import Params, word_directions
from tokenverse_jax.concepts.pretrained import SHIPPED
from tokenverse_jax.flux.offsets import Offsets, place_on_tokens
from tokenverse_jax.flux.words import Tokenizer, find_word, split_number, word_key

_LOG = logging.getLogger(__name__)
MAX_STRENGTH = 10.0  # beyond it, images tend to fall apart


@functools.cache
def warn_strength(strength: float, what: str) -> None:
    """Logs an absurd strength of `what` ("concept 'dog'"), once in a process."""
    if abs(strength) > MAX_STRENGTH:
        _LOG.warning(
            "%s: strength %g; usual is about 1, and beyond %g in absolute value images tend to fall apart",
            what,
            strength,
            MAX_STRENGTH,
        )


@dataclass(frozen=True, kw_only=True)
class ConceptRequest:
    """A concept for a word of a prompt.

    Attributes:
      target: word of the prompt; "doll#2" is its second "doll".
      path: of the concept file.
      word: of the file; None: the file's only word, or else the target: "doll#2" if the file has it, otherwise "doll".
      strength: factor on the concept's own.
    """

    target: str
    path: str
    word: str | None = None
    strength: float = 1.0

    def choose(self, file: ConceptFile) -> Concept:
        """The concept that is asked for; ValueError where the file has none of that word."""
        if self.word is None and len(file.concepts) == 1:
            return file.concepts[0]
        own = {word_key(concept.word) for concept in file.concepts}
        word = self.target if word_key(self.target) in own else split_number(self.target)[0]
        try:
            return file.concept(self.word or word)
        except ValueError as error:
            hint = "" if self.word else f"; name one of them: {self.target}={self.path}:WORD"
            raise ValueError(f"{self.path}: {error}{hint}") from error


def parse_request(text: str) -> ConceptRequest:
    """Reads TARGET=FILE[:WORD][@STRENGTH], FILE being a path or the name of a shipped file.

    "doll=bank/doll.safetensors" puts the file's "doll" (or its only word) on the prompt's "doll",
    "dawn=bank/street.safetensors:light@0.8" the file's "light", weakened, on the prompt's "dawn".

    Raises:
      ValueError: another form, or a strength that is not a finite number.
    """
    files = "|".join([r".+\.safetensors", *map(re.escape, SHIPPED)])
    match = re.fullmatch(rf"([^=]+)=({files})(?::([^@]+))?(?:@(.+))?", text)
    if match is None:
        shipped = ", ".join(SHIPPED)
        raise ValueError(
            f"{text!r}: not of the form TARGET=FILE.safetensors[:WORD][@STRENGTH]; shipped are the files {shipped}"
        )
    target, path, word, strength = match.groups()
    try:
        value = 1.0 if strength is None else float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r}: the strength {strength!r} is not a number")
    path = str(SHIPPED.get(path, path.strip()))
    return ConceptRequest(target=target.strip(), path=path, word=word and word.strip(), strength=value)


class PlacedConcept(NamedTuple):
    """A concept, the positions of its tokens in a prompt, and a factor on the concept's own strength."""

    concept: Concept
    positions: tuple[int, ...]
    strength: float = 1.0


def place_stored(
    concept: Concept, tokenizer: Tokenizer, prompt: str, target: str, strength: float = 1.0
) -> PlacedConcept:
    """Puts a concept on a word of a prompt, token by token.

    Raises:
      ValueError: the word is not in the prompt, or has another number of tokens than the concept.
    """
    try:
        positions = find_word(tokenizer, prompt, target, num_tokens=len(concept.token_ids))
    except ValueError as error:
        raise ValueError(f"concept {concept.word!r} ({len(concept.token_ids)} tokens): {error}") from error
    return PlacedConcept(concept, positions, strength)


def place_recomputed(
    concept: Concept,
    params: Params,
    txt: Float[Array, "T J"],
    tokenizer: Tokenizer,
    prompt: str,
    target: str,
    strength: float = 1.0,
) -> PlacedConcept:
    """Puts a concept on a word of a prompt, of any number of tokens, with directions recomputed from the prompt.

    Args:
      params: Concept-Mod's, of the concept's file.
      txt: T5's outputs for the prompt.

    Raises:
      ValueError: the word is not in the prompt.
    """
    positions = find_word(tokenizer, prompt, target)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    own = word_directions(params, txt[None], [positions])
    concept = replace(
        concept,
        token_ids=tuple(ids[position] for position in positions),
        offset=np.asarray(own.shared),
        block_offset=None if own.per_block is None else np.asarray(own.per_block),
    )
    return PlacedConcept(concept, positions, strength)


def compose(placed: Sequence[PlacedConcept], length: int | None = None) -> Offsets:
    """Adds up the concepts of one prompt, also those on the same token; their order changes no bit.

    Returns the prompt's offsets: shared [T, D], and per_block [blocks, T, D] where a concept has some. Warns of absurd
    strengths (a concept's own times the placed one's).

    Args:
      placed: one or more concepts, of one base model.
      length: T; None: up to the last token that has an offset.

    Raises:
      ValueError: no concepts; positions outside the text or not one for each token; concepts learned in different
        blocks, or of different widths or numbers of blocks.
    """
    if not placed:
        raise ValueError("no concepts to compose")
    if length is None:
        length = 1 + max((position for item in placed for position in item.positions), default=0)
    concepts = [item.concept for item in placed]
    for item in placed:
        warn_strength(float(item.strength * item.concept.strength), f"concept {item.concept.word!r}")
    with_blocks = [item for item in placed if item.concept.block_offset is not None]
    for kind, values in {
        "widths": {concept.offset.shape[-1] for concept in concepts},
        "numbers of blocks": {len(item.concept.block_offset) for item in with_blocks},
        "blocks": {concept.blocks for concept in concepts},
    }.items():
        if len(values) > 1:
            words = ", ".join(repr(concept.word) for concept in concepts)
            raise ValueError(f"concepts {words} do not go together: their {kind} are {sorted(values)}")
    return Offsets(
        shared=_sum_on_tokens([(item, item.concept.offset) for item in placed], length),
        per_block=_sum_on_tokens([(item, item.concept.block_offset) for item in with_blocks], length),
        blocks=concepts[0].blocks,
    )


def _sum_on_tokens(items: Iterable[tuple[PlacedConcept, np.ndarray]], length: int) -> Float[Array, "... T D"] | None:
    """The sum of the offsets on each token, zeros on the others; None for no items."""
    terms: dict[int, list[np.ndarray]] = defaultdict(list)
    for (concept, positions, strength), offset in items:
        count = len(concept.token_ids)
        if len(positions) != count or len(set(positions)) < count:
            raise ValueError(f"concept {concept.word!r}: {count} different positions are needed, got {positions}")
        scaled = np.moveaxis(offset, -2, 0) * np.float32(strength * concept.strength)
        for position, term in zip(positions, scaled, strict=True):
            terms[position].append(term)
    if not terms:
        return None
    # A sum of floats depends on the order of its terms: they are added in the order of their values.
    sums = [np.sort(np.stack(group), axis=0).sum(axis=0) for group in terms.values()]
    return place_on_tokens(jnp.asarray(np.stack(sums, axis=-2)), tuple(terms), length)
