"""Words of a prompt, and the positions of their tokens.

Words are compared by what they look like (`fold`). A prompt is cut into segments (characters as Unicode sees them) and
into tokens, and a word's tokens are those that overlap its segments.
"""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

Tokenizer = Any  # transformers' PreTrainedTokenizerFast, which is imported only where one is loaded

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


class Segment(NamedTuple):
    """A character and its combining marks, text[start:end]; invisible characters may be between them."""

    folded: str
    start: int
    end: int
    in_word: bool  # a letter, a digit or "_", as opposed to a space or a sign


def segments_of(text: str) -> list[Segment]:
    """Cuts a text where neither case folding nor normalisation joins characters; drops invisible characters."""
    parts: list[tuple[str, int, int]] = []
    for position, char in enumerate(text.translate(ALIKE)):
        if INVISIBLE.match(char):
            continue
        plain = unicodedata.normalize("NFKC", char)
        last, start, _ = parts[-1] if parts else ("", position, position)
        joins = unicodedata.normalize("NFKC", last + char) != unicodedata.normalize("NFKC", last) + plain
        if parts and (joins or unicodedata.category(plain[0]).startswith("M")):
            parts[-1] = (last + char, start, position + 1)
        else:
            parts.append((char, position, position + 1))
    return [
        Segment(_fold_segment(part), start, end, any(char.isalnum() or char == "_" for char in part))
        for part, start, end in parts
    ]


def _fold_segment(part: str) -> str:
    plain = unicodedata.normalize("NFKC", part).translate(ALIKE)
    folded = unicodedata.normalize("NFKC", plain.casefold())
    # Turkish has an i with and one without a dot, each with a capital of its own.
    folded = folded.replace("i\u0307", "i").replace("\u0131", "i")
    # NFKC turns some signs into a space and a mark; this space would end a word.
    return "".join(folded.split()) or folded


def fold(text: str) -> str:
    """The form in which words are compared: the same for texts that look the same or differ in letter case only.

    Unicode's NFKC and case folding, typographic quotes, primes, hyphens and dashes as their ASCII counterparts, and no
    invisible characters. Tokenizers get the text as it is.
    """
    return "".join(segment.folded for segment in segments_of(text))


def split_number(word: str) -> tuple[str, int]:
    """A word and which of its occurrences: ("dog", 2) for "dog#2", ("dog", 1) for "dog"."""
    name, number = re.fullmatch(r"(.*?)(?:[#\uff03](\d+))?", word, re.DOTALL).groups(default="1")
    return name, int(number)


def word_key(word: str) -> str:
    """The same for words that `find_word` treats as the same: "dog" for "DOG#1", "teddy bear#2" for "Teddy  bear#2"."""
    name, number = split_number(word)
    name = " ".join(fold(name).split())
    return name if number == 1 else f"{name}#{number}"


class Token(NamedTuple):
    """A token of a prompt: prompt[start:end]."""

    position: int
    piece: str
    start: int
    end: int

    def overlaps(self, start: int, end: int) -> bool:
        """Whether the token covers a part of prompt[start:end]."""
        return max(self.start, start) < min(self.end, end)


def tokens_of(tokenizer: Tokenizer, prompt: str) -> list[Token]:
    """The tokens that cover visible text: neither start and end, nor the space before a word."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return [
        Token(position, piece, start, end)
        for position, (piece, (start, end)) in enumerate(zip(pieces, encoded["offset_mapping"], strict=True))
        # A lone "▁" is SentencePiece's space, although its offsets are those of the letter that follows.
        if start < end and piece != "▁"
    ]


def find_word(tokenizer: Tokenizer, prompt: str, word: str, *, num_tokens: int | None = None) -> tuple[int, ...]:
    """Positions of a word's tokens in the token sequence of a prompt.

    Letter case, Unicode form and the kind of quotes do not matter (see `fold`), nor does punctuation around the word:
    "dog" is in "Dog, run!", in "the dog's hat" and in "dog-like", but not in "dogs". Several words ("teddy bear") are
    found where they stand in a row. A token that covers a part of the word and something else belongs to the word; a
    token for the space before it does not.

    Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words. In these scripts, or beside them, a
    word may begin and end anywhere, but counts only where it consists of whole tokens. Korean has spaces, and a word is
    found only with its particles, as it stands in the prompt.

    Args:
      word: "dog" for the first occurrence, "dog#2" for the second.
      num_tokens: how many tokens the word must have; None: any number.

    Raises:
      ValueError: the word is not in the prompt (the message lists the words that are), has no whole tokens in a text
        without spaces, or has another number of tokens.
    """
    name, number = split_number(word)
    if not fold(name).strip() or number == 0:
        raise ValueError(f"{word!r}: give a word of the prompt, or word#n for its n-th occurrence, counted from 1")
    segments, tokens = segments_of(prompt), tokens_of(tokenizer, prompt)
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
    own = [token for token in tokens if token.overlaps(*found[number - 1])]
    if not own or num_tokens not in (None, len(own)):
        wanted = "at least 1" if num_tokens is None else num_tokens
        shown = " ".join(token.piece for token in own)
        raise ValueError(f"{word!r} has {len(own)} tokens ({shown}) in the prompt {prompt!r}, but needs {wanted}")
    return tuple(token.position for token in own)


def find_span(tokenizer: Tokenizer, prompt: str, start: int, end: int) -> tuple[int, ...]:
    """Positions of the tokens that cover prompt[start:end] or a part of it."""
    return tuple(token.position for token in tokens_of(tokenizer, prompt) if token.overlaps(start, end))


def _occurrences(
    prompt: str, segments: Sequence[Segment], tokens: Sequence[Token], name: str
) -> tuple[list[tuple[int, int]], list[tuple[Token, str]]]:
    """Spans of a word in a prompt; and where it is only a part of a token, that token and the text of whole tokens."""
    text = "".join(segment.folded for segment in segments)
    edges = itertools.accumulate((len(segment.folded) for segment in segments), initial=0)
    number_at = {edge: number for number, edge in enumerate(edges)}
    pattern = re.compile(r"\s+".join(map(re.escape, fold(name).split())))
    found, partial, search_from = [], [], 0
    while match := pattern.search(text, search_from):
        search_from = match.start() + 1
        first, stop = number_at.get(match.start()), number_at.get(match.end())
        if first is None or stop is None:  # a part of a character, as "s" of "ß"
            continue
        sides = [(segments[first], segments[first - 1] if first else None)]
        sides.append((segments[stop - 1], segments[stop] if stop < len(segments) else None))
        if any(beside and beside.in_word and not _without_space(own, beside) for own, beside in sides):
            continue
        start, end = segments[first].start, segments[stop - 1].end
        shared = []  # tokens with visible text outside the word
        if any(_without_space(*filter(None, side)) for side in sides):
            own = (token for token in tokens if token.overlaps(start, end))
            shared = [t for t in own if fold(prompt[t.start : start] + prompt[end : t.end]).strip()]
        if shared:
            partial.append((shared[0], prompt[min(start, shared[0].start) : max(end, shared[-1].end)].strip()))
        else:
            found.append((start, end))
            search_from = match.end()
    return found, partial


def _without_space(*segments: Segment) -> bool:
    """Whether one of these is a letter of a script without spaces between words."""
    return any(
        segment.in_word and unicodedata.name(char, "").startswith(WITHOUT_SPACES)
        for segment in segments
        for char in segment.folded
    )


def _words(prompt: str, segments: Sequence[Segment], tokens: Sequence[Token]) -> list[str]:
    """The words of a prompt as `find_word` takes them, tokens in scripts without spaces; the second dog is "dog#2"."""

    def is_one_word(left: Segment, right: Segment) -> bool:
        """Whether neighbouring letters are of one word, or of one token in scripts without spaces."""
        return not _without_space(left, right) or any(
            token.overlaps(left.start, left.end) and token.overlaps(right.start, right.end) for token in tokens
        )

    spans: list[tuple[int, int]] = []
    before = None
    for segment in segments:
        if segment.in_word and before is not None and before.in_word and is_one_word(before, segment):
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
