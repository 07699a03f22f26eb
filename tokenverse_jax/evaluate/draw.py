"""Draws items in batches of one program."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from runtime_jax.sharding import to_host
from runtime_jax.training.stop import Stop
from tokenverse_jax.concepts.compose import compose
from tokenverse_jax.concepts.draw import Sampling
from tokenverse_jax.evaluate.concepts import Concepts
from tokenverse_jax.evaluate.items import Item
from tokenverse_jax.evaluate.samples import Samples
from tokenverse_jax.flux.offsets import Offsets
from tokenverse_jax.flux.pipeline import Pipeline, PromptEncoding
from tokenverse_jax.flux.words import Tokenizer, find_word


class Job(NamedTuple):
    """An image of an item; `example`: its number in the whole evaluation."""

    item: Item
    image: int
    example: int


def make_batches(items: Sequence[Item], num: int, batch_size: int) -> list[list[Job]]:
    """All images, `num` of each item; a batch that is drawn again has the same images in it."""
    jobs = [Job(item, image, item.number * num + image) for item in items for image in range(num)]
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]


def missing(batches: Sequence[Sequence[Job]], samples: Samples) -> list[Sequence[Job]]:
    """The batches of which an image is not on disk."""
    return [batch for batch in batches if not all(samples.has(job.item, job.image) for job in batch)]


def draw(
    pipeline: Pipeline,
    batches: Sequence[Sequence[Job]],
    concepts: Concepts,
    samples: Samples,
    stop: Stop,
    *,
    sampling: Sampling,
    length: int,
) -> None:
    """Draws the batches that are missing; a shorter one is filled up with its last image.

    Args:
      length: see `offset_length`.

    Raises:
      ValueError: concepts that do not fit the model or the prompts.
      NotFiniteError: values that are not finite.
      StoppedError: by a signal, between two batches.
    """
    concepts.check_base(pipeline.base_hash())
    negative = None if sampling.cfg_scale == 1.0 else pipeline.encode_prompts([""])
    settings = vars(sampling) | {"negative_prompt": negative}
    batch_size = settings.pop("batch_size")
    for batch in tqdm(missing(batches, samples), desc="batches of images", disable=None):
        stop.check()
        full = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        encoded = pipeline.encode_prompts([job.item.prompt for job in full])
        images = pipeline.generate(
            encoded,
            examples=np.asarray([job.example for job in full]),
            offsets=_offsets(pipeline, full, encoded, concepts, length),
            **settings,
        )
        for job, pixels in zip(batch, to_host(images)[: len(batch)], strict=True):
            samples.save(job.item, job.image, pixels)


def offset_length(items: Sequence[Item], tokenizer: Tokenizer) -> int:
    """Text tokens up to the last one with a concept in any prompt, so that all batches share a program."""
    found = (find_word(tokenizer, item.prompt, use.target) for item in items for use in item.uses)
    return 1 + max(max(positions) for positions in found)


def _offsets(
    pipeline: Pipeline, batch: Sequence[Job], encoded: PromptEncoding, concepts: Concepts, length: int
) -> Offsets:
    """One for each image; zeros for each block where a concept has none, so that all batches share a program."""
    flux = pipeline.transformer.config
    none = jnp.zeros((flux.num_blocks, length, flux.width))
    each = []
    for job, txt in zip(batch, encoded.txt, strict=True):
        offsets = compose(concepts.place(job.item, pipeline.tokenizer_2, txt), length)
        each.append(offsets if offsets.per_block is not None else offsets.replace(per_block=none))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *each)
