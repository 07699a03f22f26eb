"""Prompts as token ids, and warnings about the parts of a prompt that the text encoders cannot read."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from runtime_jax.messages import cut
from tokenverse_jax.flux.words import Segment, Tokenizer, segments_of, tokens_of

_LOG = logging.getLogger(__name__)
SHOWN = 80  # characters of a prompt in a warning


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a pipeline's tokenizer/ (CLIP) or tokenizer_2/ (T5).

    Raises:
      ValueError: no such folder, no tokenizer in it, or one without the offsets of its tokens in the text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (a tokenizer is needed)")
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


def warn_unread(clip: Tokenizer, t5: Tokenizer, prompts: Sequence[str], clip_length: int) -> None:
    """Logs what the text encoders cannot read of prompts: a line for each prompt, once in a process.

    No line for the empty prompt, which guidance needs.

    Args:
      clip_length: how many tokens CLIP reads, start and end included.
    """
    for prompt in prompts:
        segments = [segment for segment in segments_of(prompt) if not segment.folded.isspace()]
        if prompt and not segments:
            _warn_once(prompt, "it has only spaces or invisible characters, so nothing to draw")
            continue
        notes = [_unknown_to_t5(t5, prompt, segments), _unseen_by_clip(clip, prompt, segments, clip_length)]
        if any(notes):
            _warn_once(prompt, "; ".join(filter(None, notes)))


@functools.cache
def _warn_once(prompt: str, what: str) -> None:
    _LOG.warning("prompt %r: %s", prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}...", what)


def _unknown_to_t5(tokenizer: Tokenizer, prompt: str, segments: Sequence[Segment]) -> str | None:
    """What becomes unknown tokens, or no tokens."""
    known, unknown = set(), set()  # positions of characters
    for token in tokens_of(tokenizer, prompt):
        (unknown if token.piece == tokenizer.unk_token else known).update(range(token.start, token.end))
    pieces: list[list[Segment]] = []
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


def _unseen_by_clip(tokenizer: Tokenizer, prompt: str, segments: Sequence[Segment], length: int) -> str | None:
    """What follows CLIP's last token, or begins with an unknown character: CLIP's unknown token is its end token."""
    for token in tokens_of(tokenizer, prompt):
        is_end = token.piece == tokenizer.eos_token
        if not is_end and token.position < length - 1:
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
