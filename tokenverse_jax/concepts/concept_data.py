"""A run's images and captions, encoded once, and the batch of every step.

Axes: I images, F an image and its mirror image, V captions of all images, K images of the pool, S sides of a pair that
the concept's image may be on, Q pairs of the run's own images, B batch, N image tokens, C channels of an image token, T
text tokens, R first text tokens of a caption and M of a merged one, J and P widths of the text encoders.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt8

from runtime_jax.data import center_crop, decode_image
from runtime_jax.files import is_file, path_of, read_bytes
from runtime_jax.prng import Stream, host_rng
from runtime_jax.sharding import to_host
from tokenverse_jax.concepts.bank import Concept
from tokenverse_jax.concepts.captions import Captions, Positions
from tokenverse_jax.concepts.concept_mod import Params, word_directions
from tokenverse_jax.concepts.learn import LearnConfig
from tokenverse_jax.flux.pipeline import Pipeline, PromptEncoding

MAX_ASPECT = 2.0  # images are cropped to a square; a longer one would lose more than half
ROWS = 16  # R and M are multiples of it, so that runs with captions of similar length share a program
ENCODED_AT_ONCE = 8  # prompts
Beside = Literal["nothing", "pool", "own"]  # what stands beside the concept's image at a step: another one of the run


def read_image(path: str | os.PathLike, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The centre of an image file, resized to a square.

    Raises:
      ValueError: no such file, not an image, or one side more than twice the other.
    """
    path = path_of(path)
    if not is_file(path):
        raise ValueError(f"{path}: no such file")
    try:
        image = decode_image(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"{path}: {width} x {height} pixels: one side is more than {MAX_ASPECT:g} times the other, so a square "
            "would lose more than half of it; crop it yourself"
        )
    return center_crop(image, size)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptData:
    """Everything that the steps of one concept need, on the host.

    Attributes:
      captions: what it was made from.
      grid: rows and columns of an image's tokens.
      latents: of the images, and with flips of their mirror images.
      txt, vec: T5's outputs and CLIP's pooled output for each caption.
      mask: tokens that have a direction.
      pool_latents: of the pool's images.
      pair_txt, pair_vec: like txt and vec, for the merged captions.
      pair_rows: which of the R rows belongs to each of their first M tokens, R for none.
      own_txt, own_vec, own_rows: the same for the captions of two of the run's images; of the rows of both, left first.
    """

    captions: Captions
    grid: tuple[int, int]
    latents: Float[np.ndarray, "I F N C"]
    txt: Float[np.ndarray, "V T J"]
    vec: Float[np.ndarray, "V P"]
    mask: Bool[np.ndarray, "V R"]
    pool_latents: Float[np.ndarray, "K N C"] | None = None
    pair_txt: Float[np.ndarray, "V merged T J"] | None = None
    pair_vec: Float[np.ndarray, "V merged P"] | None = None
    pair_rows: Int[np.ndarray, "V merged M"] | None = None
    own_txt: Float[np.ndarray, "Q T J"] | None = None
    own_vec: Float[np.ndarray, "Q P"] | None = None
    own_rows: Int[np.ndarray, "Q both"] | None = None


def encode_concept(
    pipeline: Pipeline, config: LearnConfig, images: UInt8[np.ndarray, "I H W 3"], captions: Captions
) -> ConceptData:
    """Runs the autoencoder and the text encoders, which can then be dropped. The caller adds `pool_latents`."""
    grid = pipeline.vae.config.token_grid(*images.shape[1:3])
    views = [images, images[:, :, ::-1]] if config.flip else [images]
    encoded = encode_prompts(pipeline, captions.texts)
    length = encoded.txt.shape[1]
    last = max(position for positions in captions.tokens for position in positions)
    rows = _rows(last + 1, length)
    mask = np.zeros((len(captions.texts), rows), bool)
    for i, positions in enumerate(captions.tokens):
        # In the space of all tokens, other tokens' directions would change the image without being stored.
        if config.tokens == "words" or config.space == "modulation_all":
            positions = [position for found in captions.words.values() for position in found[i]]
        mask[i, list(positions)] = True
    data = ConceptData(
        captions=captions,
        grid=grid,
        latents=np.stack([encode_images(pipeline, view) for view in views], axis=1),
        txt=encoded.txt,
        vec=encoded.vec,
        mask=mask,
    )
    if not captions.merged:
        return data
    pairs = encode_prompts(pipeline, [caption for row in captions.merged for caption in row])
    txt, vec = (array.reshape(len(captions.merged), -1, *array.shape[1:]) for array in (pairs.txt, pairs.vec))
    shifts = np.asarray(captions.merged_shifts)
    pair_rows = _moved_rows(shifts, rows, _rows(last + 1 + int(shifts.max()), length))
    data = replace(data, pair_txt=txt, pair_vec=vec, pair_rows=pair_rows)
    if not captions.together:
        return data
    own = encode_prompts(pipeline, [each.text for each in captions.together])
    shifts = np.asarray([each.shifts for each in captions.together])
    own_rows = np.full((len(shifts), _rows(last + 1 + int(shifts.max()), length)), 2 * rows, np.int32)
    for row, each in zip(own_rows, captions.together, strict=True):
        for half, (caption, shift) in enumerate(zip(each.captions, each.shifts, strict=True)):
            positions = np.asarray(captions.tokens[caption])
            row[positions + shift] = half * rows + positions
    return replace(data, own_txt=own.txt, own_vec=own.vec, own_rows=own_rows)


def _moved_rows(shifts: Int[np.ndarray, "..."], rows: int, tokens: int) -> Int32[np.ndarray, "... tokens"]:
    """Which of the rows belongs to each of the first tokens of captions that move them by `shifts`; `rows` for none."""
    own = np.arange(tokens) - shifts[..., None]
    return np.where((own >= 0) & (own < rows), own, rows).astype(np.int32)


def _rows(tokens: int, length: int) -> int:
    return min(ROWS * math.ceil(tokens / ROWS), length)


def alike(runs: Sequence[ConceptData]) -> list[ConceptData]:
    """The data of several runs, with as many R and M in each, so that batches of one step can be stacked."""
    rows = max(data.mask.shape[1] for data in runs)
    tokens = max(0 if data.pair_rows is None else data.pair_rows.shape[-1] for data in runs)
    found = []
    for data in runs:
        padded = replace(data, mask=_widened(data.mask, rows, False))
        if data.pair_rows is not None:
            # R is the row of no token; where R grows, the old R is a row without a direction.
            padded = replace(padded, pair_rows=_widened(data.pair_rows, tokens, rows))
        found.append(padded)
    return found


def _widened(array: np.ndarray, size: int, value: int) -> np.ndarray:
    """With the last axis filled up to `size`."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])], constant_values=value)


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> PromptEncoding:
    """Any number of prompts, a few at a time in one program; host arrays."""
    parts = []
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        some = list(prompts[start : start + ENCODED_AT_ONCE])
        full = some + some[-1:] * (min(ENCODED_AT_ONCE, len(prompts)) - len(some))
        encoded = pipeline.encode_prompts(full)
        parts.append([array[: len(some)] for array in to_host(encoded)])
    return PromptEncoding(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def encode_images(pipeline: Pipeline, images: UInt8[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B N C"]:
    """The means of images' latents, one image at a time; a host array."""
    return np.concatenate([to_host(pipeline.encode_images(image[None])) for image in images])


# The random part of a step, a pure function of seed and step.


def beside(config: LearnConfig, seed: int, step: int) -> Beside:
    """What stands beside the concept's image at a step, for the isolation loss or for pairs of the run's own images."""
    rng = host_rng(seed, Stream.AUGMENT, step)
    if config.isolation is None or rng.random() >= config.isolation.probability:
        return "nothing"
    return "own" if rng.random() < config.isolation.together else "pool"


def draw_times(config: LearnConfig, rng: np.random.Generator, step: int) -> Float[np.ndarray, " B"]:
    """Times for the step's stage, uniform above or below the boundary."""
    stage = config.stage_1 if config.stage(step) == 1 else config.stage_2
    high = rng.random(config.batch_size) < stage.high_share
    low, span = np.where(high, config.boundary, 0.0), np.where(high, 1.0 - config.boundary, config.boundary)
    return (low + span * rng.random(config.batch_size)).astype(np.float32)


def draw(data: ConceptData, config: LearnConfig, seed: int, step: int) -> dict[str, np.ndarray]:
    """The batch of a step, see `learn.learn_step`: captions, flips, times, noise and, at some steps, the pool's images.

    All captions are equally likely, so an image counts as often as it has captions.
    """
    rng = host_rng(seed, Stream.DATA, step)
    caption = rng.integers(len(data.txt), size=config.batch_size)
    view = rng.integers(data.latents.shape[1], size=config.batch_size)
    latents = data.latents[np.asarray(data.captions.image)[caption], view]
    noise = host_rng(seed, Stream.NOISE, step)
    batch = {
        "latents": latents,
        "times": draw_times(config, noise, step),
        "noise": noise.standard_normal(latents.shape, np.float32),
        "txt": data.txt[caption],
        "vec": data.vec[caption],
        "mask": data.mask[caption],
    }
    kind = beside(config, seed, step)
    if kind == "nothing":
        return batch
    size, tokens, channels = latents.shape
    batch["pair_noise"] = noise.standard_normal((size, 2 * tokens, channels), np.float32)
    if kind == "pool":
        merged = rng.integers(data.pair_txt.shape[1], size=config.batch_size)
        side, other = np.divmod(merged, len(data.pool_latents))
        return batch | {
            "pool_latents": data.pool_latents[other],
            "on_right": np.asarray(config.isolation.sides)[side] == "right",
            "pair_txt": data.pair_txt[caption, merged],
            "pair_vec": data.pair_vec[caption, merged],
            "pair_rows": data.pair_rows[caption, merged],
        }
    pairs = [
        rng.choice([i for i, pair in enumerate(data.captions.together) if pair.captions[0] == left]) for left in caption
    ]
    other = np.asarray([data.captions.together[pair].captions[1] for pair in pairs])
    view = rng.integers(data.latents.shape[1], size=config.batch_size)
    return batch | {
        "other_latents": data.latents[np.asarray(data.captions.image)[other], view],
        "other_txt": data.txt[other],
        "other_mask": data.mask[other],
        "pair_txt": data.own_txt[pairs],
        "pair_vec": data.own_vec[pairs],
        "pair_rows": data.own_rows[pairs],
    }


def make_concepts(params: Params, data: ConceptData, config: LearnConfig) -> tuple[Concept, ...]:
    """The concept of each word, the mean over the captions that have it."""
    txt, ids = jnp.asarray(data.txt), data.captions.word_ids

    def concept(word: str, positions: Sequence[Positions]) -> Concept:
        there = [row for row, own in enumerate(positions) if own]
        own = to_host(word_directions(params, txt[np.asarray(there)], [positions[row] for row in there]))
        offsets = {"offset": own.shared, "block_offset": own.per_block}
        return Concept(word=word, token_ids=ids[word], blocks=config.blocks, **offsets)

    return tuple(concept(*item) for item in data.captions.words.items())
