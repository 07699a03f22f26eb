"""The rows of the benchmark's table: methods that put a concept into an image, learned or not.

Axes: T text tokens of a prompt, J width of the text encoder, D width of the modulation vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenverse_jax.bench.cases import Case
from tokenverse_jax.concepts.bank import Concept
from tokenverse_jax.concepts.compose import compose, place_stored
from tokenverse_jax.concepts.learn import LearnConfig, steer
from tokenverse_jax.flux.model import direction
from tokenverse_jax.flux.offsets import Offsets, place_on_tokens
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.words import find_word

PROMPT = "prompt only"
RENDERED = "rendered"  # true scenes
FULL = "M+, per block, isolation"
DIRECTION_TASK = "direction"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method; without `learn` and `direction` the prompt alone.

    learn: how its concepts are learned.
    direction: from a case's pair of prompts, without learning: on all tokens (M) or on the word's (M+).
    strength: of the direction.
    """

    name: str
    learn: LearnConfig | None = None
    direction: Literal["M", "M+"] | None = None
    strength: float = 1.0

    def takes(self, task: str) -> bool:
        """Whether the row takes part in a task."""
        if self.learn is None and self.direction is None:
            return True
        return (task == DIRECTION_TASK) == (self.direction is not None)


def make_rows(full: LearnConfig, strengths: Sequence[float]) -> list[Row]:
    """All rows that the base model draws, from the config of the full method, with per_block and isolation.

    Every learned row has all steps of both stages, so that none is better for a longer training.
    """
    blocks = replace(full, isolation=None)
    tokens = replace(blocks, per_block=False)
    learned = {
        "M": replace(tokens, space="modulation_all"),
        "text embeddings": replace(tokens, space="text"),
        "M+": tokens,
        "M+, per block": blocks,
        FULL: full,
    }
    directions = [
        Row(name=f"{kind} direction x {strength:g}", direction=kind, strength=strength)
        for strength in strengths
        for kind in ("M", "M+")
    ]
    return [Row(name=PROMPT), *(Row(name=name, learn=learn) for name, learn in learned.items()), *directions]


def steer_case(
    pipeline: Pipeline,
    row: Row,
    case: Case,
    txt: Float[np.ndarray, "T J"],
    concepts: Mapping[tuple[int, str], Concept],
) -> tuple[Float[np.ndarray, "T J"] | Float[Array, "T J"], Offsets]:
    """T5's output and the offsets with which a row draws a case; zeros for none, so that all rows share a program.

    Args:
      txt: T5's output for the prompt.
      concepts: of the row, by number of the image and word.
    """
    flux = pipeline.transformer.config
    length = len(txt)
    none = Offsets(
        shared=np.zeros((length, flux.width), np.float32),
        per_block=np.zeros((flux.num_blocks, length, flux.width), np.float32),
        everywhere=np.zeros(flux.width, np.float32),
    )
    tokenizer = pipeline.tokenizer_2
    if row.direction is not None:
        vec = pipeline.encode_prompts([case.attribute, case.neutral]).vec
        offset = row.strength * np.asarray(direction(flux, pipeline.transformer.params, vec[:1], vec[1:]))[0]
        if row.direction == "M":
            return txt, none.replace(everywhere=offset)
        positions = find_word(tokenizer, case.prompt, case.uses[0].target)
        return txt, none.replace(shared=place_on_tokens(jnp.asarray(offset), positions, length))
    if row.learn is None:
        return txt, none
    placed = [place_stored(concepts[use.image, use.word], tokenizer, case.prompt, use.target) for use in case.uses]
    steered, added = steer(row.learn.space, jnp.asarray(txt)[None], compose(placed, length).repeat(1))
    given = {name: part[0] for name, part in vars(added).items() if name != "blocks" and part is not None}
    return steered[0], none.replace(**given)
