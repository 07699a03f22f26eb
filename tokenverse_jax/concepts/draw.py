"""Images of a prompt with concepts on its words.

Axes: N images, H W image.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from tokenverse_jax.concepts.bank import Concept
from tokenverse_jax.concepts.compose import compose, place_stored
from tokenverse_jax.flux.offsets import NO_OFFSETS, Offsets
from tokenverse_jax.flux.pipeline import Pipeline, PromptEncoding
from tokenverse_jax.flux.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """All that images of a prompt depend on, and how many are drawn at once, which changes none of them."""

    height: int
    width: int
    seed: int = 0
    batch_size: int = 4

    def __post_init__(self):
        if min(self.num_steps, self.batch_size) < 1:
            raise ValueError(f"num_steps={self.num_steps}, batch_size={self.batch_size}: at least 1 is needed")


def sample(
    pipeline: Pipeline,
    prompt: PromptEncoding,
    sampling: Sampling,
    examples: Int[np.ndarray, " N"],
    *,
    negative_prompt: PromptEncoding | None = None,
    offsets: Offsets = NO_OFFSETS,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Images of one encoded prompt, batch by batch in one program.

    Args:
      examples: numbers of the images; with the seed they determine the noise.
      offsets: of each image.
    """
    settings = dataclasses.asdict(sampling)
    batch = min(settings.pop("batch_size"), len(examples))
    repeated = PromptEncoding(*(jnp.repeat(jnp.asarray(part), batch, axis=0) for part in prompt))
    whole = np.resize(np.arange(len(examples)), math.ceil(len(examples) / batch) * batch)  # the last batch is filled up
    images = []
    for picks in whole.reshape(-1, batch):
        own = jax.tree.map(operator.itemgetter(picks), offsets)
        made = pipeline.generate(
            repeated, examples=examples[picks], negative_prompt=negative_prompt, offsets=own, **settings
        )
        images.append(np.asarray(made))
    return np.concatenate(images)[: len(examples)]


def generate(
    pipeline: Pipeline,
    prompt: str,
    concepts: Mapping[str, Concept] | None = None,
    *,
    num: int = 1,
    seed: int = 0,
    batch_size: int = 4,
    **settings: Any,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Images of a prompt with concepts on its words; without concepts the base model's, from the same noise.

    >>> images = generate(pipeline, "a star on the beach", {"a star": concepts.concept("a star")}, num=4)

    Args:
      pipeline: with all its parts.
      prompt: what is drawn.
      concepts: by the word of the prompt that each of them is put on; "dog#2" is its second "dog".
      num: N; image i is the same whatever N is.
      seed: of the noise.
      batch_size: images at once.
      settings: `height`, `width` (pixels), `num_steps`, `guidance`, `cfg_scale`; by default the model's own.

    Raises:
      ValueError: a word that is not in the prompt, or has another number of tokens there; impossible sizes.
      NotFiniteError: values that are not finite.
    """
    sampling = Sampling(**pipeline.usual.arguments(**settings, seed=seed, batch_size=batch_size))
    placed = [place_stored(concept, pipeline.tokenizer_2, prompt, word) for word, concept in (concepts or {}).items()]
    offsets = compose(placed).repeat(num) if placed else NO_OFFSETS
    negative = None if sampling.cfg_scale == 1.0 else pipeline.encode_prompts([""])
    encoded = pipeline.encode_prompts([prompt])
    return sample(pipeline, encoded, sampling, np.arange(num), negative_prompt=negative, offsets=offsets)
