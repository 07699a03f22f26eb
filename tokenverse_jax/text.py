"""Prompts to token ids, and words to their places among the tokens."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

Tokenizer = Any  # transformers' PreTrainedTokenizerFast, which is imported only where one is loaded


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
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(
            f"{folder}: no tokenizer that can be read ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
            f"the folder holds {found}"
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


def find_word(tokenizer: Tokenizer, prompt: str, word: str, *, num_tokens: int | None = None) -> tuple[int, ...]:
    """Places of a word's tokens in the token sequence of a prompt.

    Letter case does not matter, nor does punctuation around the word: "dog" is in "Dog, run!", in "the dog's hat" and
    in "dog-like", but not in "dogs". Several words ("teddy bear") are found where they stand in a row. A token that
    holds a part of the word and something else belongs to the word; a token for the space before it does not.

    Args:
      word: "dog" for the first occurrence, "dog#2" for the second.
      num_tokens: how many tokens the word must have, where something is stored for each of them.

    Raises:
      ValueError: the word is not there (the message lists those that are), or has another number of tokens.
    """
    name, number = re.fullmatch(r"(.*?)(?:#(\d+))?", word, re.DOTALL).groups(default="1")
    if not name.strip() or int(number) == 0:
        raise ValueError(f"{word!r}: give a word of the prompt, or word#n for its n-th occurrence, counted from 1")
    pattern = r"\s+".join(map(re.escape, name.split()))
    found = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE))
    if int(number) > len(found):
        raise ValueError(f"{word!r} is not in the prompt {prompt!r}; its words are {', '.join(_words(prompt))}")
    places = find_span(tokenizer, prompt, *found[int(number) - 1].span())
    if not places or num_tokens not in (None, len(places)):
        wanted = "at least 1" if num_tokens is None else num_tokens
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(prompt, verbose=False)["input_ids"])
        shown = " ".join(pieces[place] for place in places)
        raise ValueError(f"{word!r} has {len(places)} tokens ({shown}) in the prompt {prompt!r}, but needs {wanted}")
    return places


def find_span(tokenizer: Tokenizer, prompt: str, start: int, end: int) -> tuple[int, ...]:
    """Places of the tokens of prompt[start:end], also of those that are in it only in part."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return tuple(
        place
        for place, (piece, (first, last)) in enumerate(zip(pieces, encoded["offset_mapping"], strict=True))
        # A lone "▁" is SentencePiece's space, although its offsets are those of the letter that follows.
        if max(first, start) < min(last, end) and piece != "▁"
    )


def _words(prompt: str) -> list[str]:
    """The words of a prompt as `find_word` takes them: the second "dog" is "dog#2"."""
    seen: Counter[str] = Counter()
    words = []
    for word in re.findall(r"\w+", prompt):
        seen[word.lower()] += 1
        count = seen[word.lower()]
        words.append(word if count == 1 else f"{word}#{count}")
    return words
