"""Small tokenizers of whole words, of the same kinds as FLUX's: byte pairs for CLIP, a unigram model for T5.

Other words are spelt out: every letter and digit is a token too. Case does not matter.
"""

import json
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mini_scenes import vocabulary
from tokenverse_jax.flux.text import load_tokenizer
from tokenverse_jax.flux.words import Tokenizer

SPACE = "▁"  # SentencePiece's sign for the space before a word
START, END = "<|startoftext|>", "<|endoftext|>"
SYMBOLS = string.ascii_lowercase + string.digits + string.punctuation
# Words of captions other than the names of classes, colours, textures, sizes, poses, places and light; and words for
# captions of two pictures side by side.
OTHER_WORDS = """
    a an and at between beside both by contains drawing drawings each first from half halves image images in is it left
    light lit main
    next of on one other part parts photo picture pictures right second shows side sides split that the there this three
    to two with
"""


class Tokenizers(NamedTuple):
    """CLIP's and T5's, under the names of their folders."""

    tokenizer: Tokenizer
    tokenizer_2: Tokenizer


def scene_words() -> tuple[str, ...]:
    """Every word that a caption of mini_scenes, or of two scenes side by side, may have."""
    texts = (
        *vocabulary.CLASSES,
        *vocabulary.COLORS,
        *vocabulary.TEXTURES,
        *vocabulary.SIZES,
        *vocabulary.POSES,
        *vocabulary.BACKGROUNDS.values(),
        *vocabulary.LIGHT_DIRECTIONS,
        *vocabulary.LIGHT_WARMTHS,
        OTHER_WORDS,
    )
    return tuple(sorted({word for text in texts for word in text.split()}))


def make_tokenizers(words: Sequence[str], text_length: int) -> Tokenizers:
    """Tokenizers with one token for each of `words`, for prompts of `text_length` tokens, end token included."""
    with tempfile.TemporaryDirectory() as folder:
        _write_clip(Path(folder) / "tokenizer", words, text_length)
        _write_t5(Path(folder) / "tokenizer_2", words, text_length)
        return Tokenizers(*(load_tokenizer(Path(folder) / name) for name in Tokenizers._fields))


def _write_t5(folder: Path, words: Sequence[str], text_length: int) -> None:
    # Scores are log-probabilities: a whole word is likelier than its letters.
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, SPACE: -8.0}
    pieces |= dict.fromkeys(SYMBOLS, -8.0) | {SPACE + word: -4.0 for word in words}
    tokenizer = tokenizers.Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    spaces = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    # Not T5's own class, which builds its own normalizer: that of T5 keeps capitals.
    _write_config(folder, names | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text_length})


def _write_clip(folder: Path, words: Sequence[str], text_length: int) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2**15,  # more than there is: merges go on until every word is one token
        # The ends of words are named here: left to the trainer, their numbers would differ from process to process.
        special_tokens=[START, END, *(symbol + "</w>" for symbol in SYMBOLS)],
        initial_alphabet=list(SYMBOLS),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, *SYMBOLS], trainer)
    folder.mkdir()
    tokenizer.model.save(str(folder))
    names = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_config(folder, names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": text_length})


def _write_config(folder: Path, fields: dict[str, object]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
