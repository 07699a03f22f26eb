"""Prompts to token ids, and words to their places among the tokens."""

import functools
import itertools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from runtime_jax.messages import cut

Tokenizer = Any  # transformers' PreTrainedTokenizerFast, which is imported only where one is loaded

_LOG = logging.getLogger(__name__)
SHOWN = 80  # characters of a prompt in a warning

# Signs that people type, or programs put, for one another.
ALIKE = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u2035", "'")  # quotes and primes
    | dict.fromkeys("\u02b9\u02bb\u02bc\u0374\u00b4\u1ffd", "'")  # modifier letters and acute accents
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u2036", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")  # hyphens, dashes as wide as a digit or an n, minus
)
# Unicode's Default_Ignorable_Code_Point (soft hyphens, zero-width characters, variation selectors and so on), and
# control characters other than spaces.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# How Unicode's names of characters begin in the scripts that put no spaces between words.
WITHOUT_SPACES = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a pipeline's tokenizer/ (CLIP) or tokenizer_2/ (T5).

    Raises:
      ValueError: no such folder, no tokenizer in it, or one that does not tell where in the text its tokens are.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (a tokenizer is looked for here)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # missing and broken files give errors of many kinds
        found = sorted(path.name for path in folder.iterdir())
        if "spiece.model" in found and "tokenizer.json" not in found:
            raise ValueError(
                f"{folder}: tokenizer.json is missing. FLUX.1's own tokenizer_2 has it; from spiece.model alone it is "
                'made once where sentencepiece is installed: python -c "from transformers import AutoTokenizer; '
                f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
            ) from error
        raise ValueError(
            f"{folder}: no tokenizer that can be read ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
            f"the folder holds {cut(found) or 'nothing'}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: {type(tokenizer).__name__} has no offsets of its tokens; tokenizer.json is needed")
    return tokenizer


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], length: int, *, truncate: bool = False
) -> Int32[np.ndarray, "B T"]:
    """Token ids of `length` tokens a prompt, end token included, padded at the end.

    Args:
      truncate: cut longer prompts (the end token stays) instead of refusing them.

    Raises:
      ValueError: a prompt has more than `length` tokens, and `truncate` is not set.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts: a list of texts, got the single text {prompts!r}")
    counts = [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
    for prompt, count in zip(prompts, counts, strict=True):
        if count > length and not truncate:
            raise ValueError(f"{count} tokens, but the text length is {length}: shorten the prompt {prompt!r}")
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32)


class _Segment(NamedTuple):
    """A character and its combining marks, text[start:end]; invisible characters may be between them."""

    folded: str
    start: int
    end: int
    in_word: bool  # a letter, a digit or "_", as opposed to a space or a sign


def _segments(text: str) -> list[_Segment]:
    """A text cut where no change of letter case or Unicode form goes across, without invisible characters."""
    parts: list[tuple[str, int, int]] = []
    for place, char in enumerate(text.translate(ALIKE)):
        if INVISIBLE.match(char):
            continue
        plain = unicodedata.normalize("NFKC", char)
        last, start, _ = parts[-1] if parts else ("", place, place)
        joins = unicodedata.normalize("NFKC", last + char) != unicodedata.normalize("NFKC", last) + plain
        if parts and (joins or unicodedata.category(plain[0]).startswith("M")):
            parts[-1] = (last + char, start, place + 1)
        else:
            parts.append((char, place, place + 1))
    return [
        _Segment(_fold_segment(part), start, end, any(char.isalnum() or char == "_" for char in part))
        for part, start, end in parts
    ]


def _fold_segment(part: str) -> str:
    plain = unicodedata.normalize("NFKC", part).translate(ALIKE)
    folded = unicodedata.normalize("NFKC", plain.casefold())
    # Turkish has an i with and one without a dot, each with a capital of its own.
    folded = folded.replace("i\u0307", "i").replace("\u0131", "i")
    # NFKC makes some signs a space and a mark: this space would end a word.
    return "".join(folded.split()) or folded


def fold(text: str) -> str:
    """What is compared of words: texts that look the same, or differ in letter case only, have the same.

    Unicode's NFKC and case folding, typographic quotes, primes, hyphens and dashes as their ASCII counterparts, and no
    invisible characters. Tokenizers get the text as it is.
    """
    return "".join(segment.folded for segment in _segments(text))


def split_number(word: str) -> tuple[str, int]:
    """A word and which of its occurrences: ("dog", 2) for "dog#2", ("dog", 1) for "dog"."""
    name, number = re.fullmatch(r"(.*?)(?:[#\uff03](\d+))?", word, re.DOTALL).groups(default="1")
    return name, int(number)


def word_key(word: str) -> str:
    """The same for words that `find_word` takes for the same: "dog" for "DOG#1", "teddy bear#2" for "Teddy  bear#2"."""
    name, number = split_number(word)
    name = " ".join(fold(name).split())
    return name if number == 1 else f"{name}#{number}"


class _Token(NamedTuple):
    """A token of a prompt: prompt[start:end]."""

    place: int
    piece: str
    start: int
    end: int

    def overlaps(self, start: int, end: int) -> bool:
        return max(self.start, start) < min(self.end, end)


def _tokens(tokenizer: Tokenizer, prompt: str) -> list[_Token]:
    """The tokens that stand for something in a prompt: not start and end, nor the space before a word."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return [
        _Token(place, piece, start, end)
        for place, (piece, (start, end)) in enumerate(zip(pieces, encoded["offset_mapping"], strict=True))
        # A lone "▁" is SentencePiece's space, although its offsets are those of the letter that follows.
        if start < end and piece != "▁"
    ]


def find_word(tokenizer: Tokenizer, prompt: str, word: str, *, num_tokens: int | None = None) -> tuple[int, ...]:
    """Places of a word's tokens in the token sequence of a prompt.

    Letter case, Unicode form and the kind of quotes do not matter (see `fold`), nor does punctuation around the word:
    "dog" is in "Dog, run!", in "the dog's hat" and in "dog-like", but not in "dogs". Several words ("teddy bear") are
    found where they stand in a row. A token that holds a part of the word and something else belongs to the word; a
    token for the space before it does not.

    Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words. A word of these, or beside these, may
    begin and end anywhere, but counts only where it is made of whole tokens. Korean has spaces, and a word is found
    with its particles only, as it stands in the prompt.

    Args:
      word: "dog" for the first occurrence, "dog#2" for the second.
      num_tokens: how many tokens the word must have, where something is stored for each of them.

    Raises:
      ValueError: the word is not there (the message lists those that are), has no tokens of its own in a text without
        spaces, or has another number of tokens.
    """
    name, number = split_number(word)
    if not fold(name).strip() or number == 0:
        raise ValueError(f"{word!r}: give a word of the prompt, or word#n for its n-th occurrence, counted from 1")
    segments, tokens = _segments(prompt), _tokens(tokenizer, prompt)
    found, partial = _occurrences(prompt, segments, tokens, name)
    if number > len(found):
        there = f"its words are {', '.join(_words(prompt, segments, tokens)) or 'none'}"
        if not partial:
            raise ValueError(f"{word!r} is not in the prompt {prompt!r}; {there}")
        token, whole = partial[0]
        raise ValueError(
            f"{word!r} is only a part of the token {token.piece!r} ({prompt[token.start : token.end].strip()!r}) in "
            f"the prompt {prompt!r}: put spaces around it, or take whole tokens: {whole!r}; {there}"
        )
    places = tuple(token.place for token in tokens if token.overlaps(*found[number - 1]))
    if not places or num_tokens not in (None, len(places)):
        wanted = "at least 1" if num_tokens is None else num_tokens
        shown = " ".join(token.piece for token in tokens if token.place in places)
        raise ValueError(f"{word!r} has {len(places)} tokens ({shown}) in the prompt {prompt!r}, but needs {wanted}")
    return places


def find_span(tokenizer: Tokenizer, prompt: str, start: int, end: int) -> tuple[int, ...]:
    """Places of the tokens of prompt[start:end], also of those that are in it only in part."""
    return tuple(token.place for token in _tokens(tokenizer, prompt) if token.overlaps(start, end))


def _occurrences(
    prompt: str, segments: Sequence[_Segment], tokens: Sequence[_Token], name: str
) -> tuple[list[tuple[int, int]], list[tuple[_Token, str]]]:
    """Where a word is in a prompt; and where it is only a part of a token: that token, and the text of whole tokens."""
    text = "".join(segment.folded for segment in segments)
    edges = itertools.accumulate((len(segment.folded) for segment in segments), initial=0)
    number_at = {edge: number for number, edge in enumerate(edges)}
    pattern = re.compile(r"\s+".join(map(re.escape, fold(name).split())))
    found, partial, position = [], [], 0
    while match := pattern.search(text, position):
        position = match.start() + 1
        first, stop = number_at.get(match.start()), number_at.get(match.end())
        if first is None or stop is None:  # a part of a character, as "s" of "ß"
            continue
        sides = [(segments[first], segments[first - 1] if first else None)]
        sides.append((segments[stop - 1], segments[stop] if stop < len(segments) else None))
        if any(beside and beside.in_word and not _without_space(own, beside) for own, beside in sides):
            continue
        start, end = segments[first].start, segments[stop - 1].end
        shared = []
        if any(_without_space(*filter(None, side)) for side in sides):
            shared = [
                token for token in tokens if token.overlaps(start, end) and _holds_more(token, prompt, start, end)
            ]
        if shared:
            whole = prompt[min(start, shared[0].start) : max(end, shared[-1].end)].strip()
            partial.append((shared[0], whole))
        else:
            found.append((start, end))
            position = match.end()
    return found, partial


def _holds_more(token: _Token, prompt: str, start: int, end: int) -> bool:
    """Whether a token has anything to see outside prompt[start:end]."""
    return bool(fold(prompt[token.start : start] + prompt[end : token.end]).strip())


def _without_space(*segments: _Segment) -> bool:
    """Whether one of these is a letter of a script without spaces between words."""
    return any(
        segment.in_word and unicodedata.name(char, "").startswith(WITHOUT_SPACES)
        for segment in segments
        for char in segment.folded
    )


def _words(prompt: str, segments: Sequence[_Segment], tokens: Sequence[_Token]) -> list[str]:
    """The words of a prompt as `find_word` takes them, tokens in scripts without spaces; the second dog is "dog#2"."""
    spans: list[tuple[int, int]] = []
    before = None
    for segment in segments:
        if segment.in_word and before is not None and before.in_word and _one_word(before, segment, tokens):
            spans[-1] = (spans[-1][0], segment.end)
        elif segment.in_word:
            spans.append((segment.start, segment.end))
        before = segment
    seen: Counter[str] = Counter()
    words = []
    for start, end in spans:
        word = prompt[start:end]
        seen[fold(word)] += 1
        count = seen[fold(word)]
        words.append(word if count == 1 else f"{word}#{count}")
    return words


def _one_word(left: _Segment, right: _Segment, tokens: Sequence[_Token]) -> bool:
    """Whether letters that are side by side are of one word, or of one token where words have no spaces."""
    if not _without_space(left, right):
        return True
    return any(token.overlaps(left.start, left.end) and token.overlaps(right.start, right.end) for token in tokens)


# What the text encoders do not see of a prompt.


def warn_unread(clip: Tokenizer, t5: Tokenizer, prompts: Sequence[str], clip_length: int) -> None:
    """Logs what the text encoders cannot read of prompts: a line for each prompt, once in a process.

    The empty prompt is what guidance leads away from, and is right as it is.

    Args:
      clip_length: how many tokens CLIP reads, start and end included.
    """
    for prompt in prompts:
        segments = [segment for segment in _segments(prompt) if not segment.folded.isspace()]
        if prompt and not segments:
            _warn_once(prompt, "it has only spaces or invisible characters, so nothing to draw")
            continue
        notes = [_unknown_to_t5(t5, prompt, segments), _unseen_by_clip(clip, prompt, segments, clip_length)]
        if any(notes):
            _warn_once(prompt, "; ".join(filter(None, notes)))


@functools.cache
def _warn_once(prompt: str, what: str) -> None:
    _LOG.warning("prompt %r: %s", prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}...", what)


def _unknown_to_t5(tokenizer: Tokenizer, prompt: str, segments: Sequence[_Segment]) -> str | None:
    """What becomes unknown tokens, or no tokens."""
    known, unknown = set(), set()  # places of characters
    for token in _tokens(tokenizer, prompt):
        (unknown if token.piece == tokenizer.unk_token else known).update(range(token.start, token.end))
    pieces: list[list[_Segment]] = []
    for segment in segments:
        own = range(segment.start, segment.end)
        if unknown.isdisjoint(own) and not known.isdisjoint(own):
            continue
        if pieces and pieces[-1][-1].end == segment.start:
            pieces[-1].append(segment)
        else:
            pieces.append([segment])
    if not pieces:
        return None
    if sum(map(len, pieces)) == len(segments):
        return "T5 knows none of it"
    return f"T5 does not know {', '.join(repr(prompt[piece[0].start : piece[-1].end]) for piece in pieces)}"


def _unseen_by_clip(tokenizer: Tokenizer, prompt: str, segments: Sequence[_Segment], length: int) -> str | None:
    """What comes after CLIP's last token, or from an unknown character on: that is its end token too."""
    for token in _tokens(tokenizer, prompt):
        is_end = token.piece == tokenizer.eos_token
        if not is_end and token.place < length - 1:
            continue
        unseen = [segment for segment in segments if segment.end > token.start]
        if not unseen:
            return None
        if len(unseen) == len(segments):
            return "CLIP sees none of it"
        text = prompt[unseen[0].start : unseen[-1].end]
        if is_end:
            return f"CLIP stops at a character that it does not know, and does not see {text!r}"
        return f"CLIP reads {length} tokens only, and does not see {text!r}, but T5 does"
    return None
