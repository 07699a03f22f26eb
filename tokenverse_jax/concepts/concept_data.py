"""A concept's images and captions: words bound to tokens, everything encoded once, and the batch of every step.

Axes: I images, F an image and its mirror image, V captions of all images, K images of the pool, S sides of a pair that
the concept's image may be on, B batch, N image tokens, C channels of an image token, T text tokens, R first text tokens
of a caption and M of a merged one, J and P widths of the text encoders.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from runtime_jax.data import center_crop, decode_image
from runtime_jax.files import is_file, path_of, read_bytes
from runtime_jax.prng import Stream, host_rng
from runtime_jax.sharding import to_host
from tokenverse_jax.concepts.bank import Concept
from tokenverse_jax.concepts.concept_mod import Params, word_directions
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.concepts.learn import LearnConfig
from tokenverse_jax.flux import text
from tokenverse_jax.flux.pipeline import Pipeline, PromptEncoding
from tokenverse_jax.flux.words import Tokenizer, find_span, find_word, word_key

MAX_ASPECT = 2.0  # images are cropped to a square; a longer one would lose more than half
ROWS = 16  # R and M are multiples of it, so that runs with captions of similar length share a program
ENCODED_AT_ONCE = 8  # prompts

Positions = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions whose words are bound to T5's tokens; needs only the tokenizer.

    Attributes:
      texts: of all images.
      image: number of each caption's image.
      tokens: positions of each caption's tokens, without the end token, which belongs to no word.
      words: by word, its positions in each caption.
      word_ids: by word, T5's ids of its tokens in the first caption.
      merged: for each caption its S K merges with the pool's captions, ordered by side; empty without isolation.
      merged_shifts: how far each merge moves the caption's tokens, in positions.
    """

    texts: tuple[str, ...]
    image: tuple[int, ...]
    tokens: tuple[Positions, ...]
    words: Mapping[str, tuple[Positions, ...]]
    word_ids: Mapping[str, tuple[int, ...]]
    merged: tuple[tuple[str, ...], ...] = ()
    merged_shifts: tuple[Positions, ...] = ()


def bind_captions(
    tokenizer: Tokenizer,
    text_length: int,
    captions: Sequence[Sequence[str]],
    words: Sequence[str],
    isolation: IsolationConfig | None,
) -> Captions:
    """Finds the words in every caption.

    Args:
      tokenizer: T5's.
      text_length: T.
      captions: those of each image.
      words: to learn, as `find_word` takes them.

    Raises:
      ValueError: no images, captions or words; a word that a caption lacks, or has in another number of tokens than
        the first one; a caption, by itself or merged with another, that is too long.
    """
    if not words or len({word_key(word) for word in words}) < len(words):
        raise ValueError(f"words: one or more different words of the captions are needed, got {list(words)}")
    if not captions or not all(captions):
        raise ValueError("images: at least one image is needed, and a caption for each")
    texts = tuple(caption for own in captions for caption in own)
    ids = text.encode(tokenizer, texts, text_length)
    found = {}
    for word in words:
        count = len(find_word(tokenizer, texts[0], word))
        found[word] = tuple(find_word(tokenizer, caption, word, num_tokens=count) for caption in texts)
    bound = Captions(
        texts=texts,
        image=tuple(i for i, own in enumerate(captions) for _ in own),
        tokens=tuple(find_span(tokenizer, caption, 0, len(caption)) for caption in texts),
        words=found,
        word_ids={word: tuple(map(int, ids[0, list(positions[0])])) for word, positions in found.items()},
    )
    if isolation is None:
        return bound
    merged, merged_shifts = [], []
    for caption, positions in zip(texts, bound.tokens, strict=True):
        both = [isolation.merge(caption, other, side) for side in isolation.sides for other in isolation.captions]
        merged.append(tuple(whole for whole, _ in both))
        text.encode(tokenizer, merged[-1], text_length)
        merged_shifts.append(tuple(_moved_by(tokenizer, caption, positions, *each) for each in both))
    return replace(bound, merged=tuple(merged), merged_shifts=tuple(merged_shifts))


def _moved_by(tokenizer: Tokenizer, caption: str, positions: Positions, both: str, start: int) -> int:
    """By how many positions a merged caption moves the tokens of the caption at its character `start`."""
    moved = find_span(tokenizer, both, start, start + len(caption))
    own, found = (
        np.asarray(tokenizer(whole, verbose=False)["input_ids"])[list(at)]
        for whole, at in ((caption, positions), (both, moved))
    )
    if not np.array_equal(own, found):
        raise ValueError(
            f"isolation.template: the caption {caption!r} has other tokens in {both!r} than by itself: put spaces, or "
            "nothing, before and after {left} and {right}"
        )
    return moved[0] - positions[0]


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
    shifts = np.asarray(captions.merged_shifts)[..., None]
    own = np.arange(_rows(last + 1 + int(shifts.max()), length)) - shifts
    own = np.where((own >= 0) & (own < rows), own, rows).astype(np.int32)
    return replace(data, pair_txt=txt, pair_vec=vec, pair_rows=own)


def _rows(tokens: int, length: int) -> int:
    return min(ROWS * math.ceil(tokens / ROWS), length)


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


def is_isolated(config: LearnConfig, seed: int, step: int) -> bool:
    """Whether a step has an isolation loss."""
    return config.isolation is not None and (
        host_rng(seed, Stream.AUGMENT, step).random() < config.isolation.probability
    )


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
    if is_isolated(config, seed, step):
        merged = rng.integers(data.pair_txt.shape[1], size=config.batch_size)
        side, other = np.divmod(merged, len(data.pool_latents))
        size, tokens, channels = latents.shape
        batch |= {
            "pool_latents": data.pool_latents[other],
            "on_right": np.asarray(config.isolation.sides)[side] == "right",
            "pair_noise": noise.standard_normal((size, 2 * tokens, channels), np.float32),
            "pair_txt": data.pair_txt[caption, merged],
            "pair_vec": data.pair_vec[caption, merged],
            "pair_rows": data.pair_rows[caption, merged],
        }
    return batch


def make_concepts(params: Params, data: ConceptData, config: LearnConfig) -> tuple[Concept, ...]:
    """The concept of each word, the mean over the captions."""
    txt, ids = jnp.asarray(data.txt), data.captions.word_ids

    def concept(word: str, positions: Sequence[Positions]) -> Concept:
        own = to_host(word_directions(params, txt, positions))
        offsets = {"offset": own.shared, "block_offset": own.per_block}
        return Concept(word=word, token_ids=ids[word], blocks=config.blocks, **offsets)

    return tuple(concept(*item) for item in data.captions.words.items())
