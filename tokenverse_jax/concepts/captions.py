"""Captions of a run's images, with words bound to tokens; needs only the tokenizer.

Axes: T text tokens, S sides of a pair that the concept's image may be on, K captions of the pool.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.flux import text
from tokenverse_jax.flux.words import Tokenizer, find_span, find_word, word_key

Positions = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Together:
    """The caption of two of the run's images side by side.

    Attributes:
      text: the merged caption.
      captions: numbers of the left and of the right one.
      shifts: how far it moves the tokens of each, in positions.
    """

    text: str
    captions: tuple[int, int]
    shifts: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions whose words are bound to T5's tokens.

    Attributes:
      texts: of all images.
      image: number of each caption's image.
      tokens: positions of each caption's tokens, without the end token, which belongs to no word.
      words: by word, its positions in each caption; none in the captions of an image that does not show it.
      word_ids: by word, T5's ids of its tokens in the first caption that has it.
      merged: for each caption its S K merges with the pool's captions, ordered by side; empty without isolation.
      merged_shifts: how far each merge moves the caption's tokens, in positions.
      together: pairs of the run's own images; empty without `isolation.together`.
    """

    texts: tuple[str, ...]
    image: tuple[int, ...]
    tokens: tuple[Positions, ...]
    words: Mapping[str, tuple[Positions, ...]]
    word_ids: Mapping[str, tuple[int, ...]]
    merged: tuple[tuple[str, ...], ...] = ()
    merged_shifts: tuple[Positions, ...] = ()
    together: tuple[Together, ...] = ()


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
      words: to learn, as `find_word` takes them. An image may lack some of them, in all of its captions.

    Raises:
      ValueError: no images, captions or words; an image without any of the words; a word that no image has, that only
        some captions of an image have, or that differs in its number of tokens; a caption, by itself or merged with
        another, that is too long; `isolation.together` with a single image.
    """
    if not words or len({word_key(word) for word in words}) < len(words):
        raise ValueError(f"words: one or more different words of the captions are needed, got {list(words)}")
    if not captions or not all(captions):
        raise ValueError("images: at least one image is needed, and a caption for each")
    texts = tuple(caption for own in captions for caption in own)
    image = tuple(i for i, own in enumerate(captions) for _ in own)
    ids = text.encode(tokenizer, texts, text_length)
    found = {word: _positions(tokenizer, captions, word) for word in words}
    for number, caption in zip(image, texts, strict=True):
        if not any(found[word][texts.index(caption)] for word in words):
            raise ValueError(f"images[{number}]: none of the words {list(words)} is in its caption {caption!r}")
    bound = Captions(
        texts=texts,
        image=image,
        tokens=tuple(find_span(tokenizer, caption, 0, len(caption)) for caption in texts),
        words=found,
        word_ids={word: _ids(ids, positions) for word, positions in found.items()},
    )
    if isolation is None:
        return bound
    merged, merged_shifts = [], []
    for caption, positions in zip(texts, bound.tokens, strict=True):
        both = [isolation.merge(caption, other, side) for side in isolation.sides for other in isolation.captions]
        merged.append(tuple(whole for whole, _ in both))
        text.encode(tokenizer, merged[-1], text_length)
        merged_shifts.append(tuple(_moved_by(tokenizer, caption, positions, *each) for each in both))
    bound = replace(bound, merged=tuple(merged), merged_shifts=tuple(merged_shifts))
    if not isolation.together:
        return bound
    if len(captions) == 1:
        raise ValueError(f"isolation.together={isolation.together}: two images or more are needed, to stand in pairs")
    together = tuple(_together(tokenizer, bound, isolation))
    text.encode(tokenizer, [each.text for each in together], text_length)
    return replace(bound, together=together)


def _positions(tokenizer: Tokenizer, captions: Sequence[Sequence[str]], word: str) -> tuple[Positions, ...]:
    """A word's positions in each caption, none in those of an image that lacks it."""
    count, found, missing = None, [], None
    for number, own in enumerate(captions):
        errors = [error for error in (_why_missing(tokenizer, caption, word) for caption in own) if error]
        if errors and len(errors) < len(own):
            raise ValueError(f"images[{number}]: {errors[0]}; either all captions of an image have a word, or none")
        if errors:
            missing = missing or errors[0]
            found += [()] * len(own)
            continue
        count = len(find_word(tokenizer, own[0], word)) if count is None else count
        found += [find_word(tokenizer, caption, word, num_tokens=count) for caption in own]
    if count is None:
        raise ValueError(str(missing))
    return tuple(found)


def _why_missing(tokenizer: Tokenizer, caption: str, word: str) -> ValueError | None:
    try:
        find_word(tokenizer, caption, word)
    except ValueError as error:
        return error
    return None


def _ids(ids: Int[np.ndarray, "V T"], positions: Sequence[Positions]) -> tuple[int, ...]:
    """Those of a word's tokens in the first caption that has it."""
    row = next(row for row, own in enumerate(positions) if own)
    return tuple(map(int, ids[row, list(positions[row])]))


def _together(tokenizer: Tokenizer, bound: Captions, isolation: IsolationConfig) -> Iterator[Together]:
    """Every caption on the left, beside the caption of equal rank, or a following one, of each other image."""
    of_image = [[i for i, image in enumerate(bound.image) if image == number] for number in range(max(bound.image) + 1)]
    for one, mine in enumerate(of_image):
        for other, others in enumerate(of_image):
            for rank, left in enumerate(mine if one != other else ()):
                right = others[rank % len(others)]
                pair = bound.texts[left], bound.texts[right]
                whole, start = isolation.merge(*pair, "left")
                _, right_start = isolation.merge(*pair[::-1], "right")
                shifts = (
                    _moved_by(tokenizer, pair[0], bound.tokens[left], whole, start),
                    _moved_by(tokenizer, pair[1], bound.tokens[right], whole, right_start),
                )
                yield Together(text=whole, captions=(left, right), shifts=shifts)


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
