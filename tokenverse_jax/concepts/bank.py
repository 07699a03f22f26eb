"""Concepts and their files; whether two concepts would blend.

A concept file is a safetensors file of what was learned from one image (or several of the same things), for one or
more words of its caption:

    words/{i}/offset         float32  [n, D]          direction of each of the n tokens of word i
    words/{i}/block_offset   bfloat16 [blocks, n, D]  what each block adds to it; absent if learned without
    image                    uint8    [h, w, 3]       what it was learned from, small, to look at; may be absent
    params/...               float32                  Concept-Mod's parameters, if kept for directions of other prompts

and metadata, all strings: `format` "tokenverse-concepts", `format_version`, `tool_version`, `caption` (the first one
of training), `base` (name of the model), `base_hash` (of its weights), and `words`, a JSON list in the order of i of
{"word", "token_ids", "blocks", "strength"}.

Axes: B batch, T text tokens, n tokens of a word, D width, H heads.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from runtime_jax.config import build
from runtime_jax.files import path_of
from runtime_jax.weights import read_safetensors, write_safetensors
from tokenverse_jax.concepts.concept_mod import Params
from tokenverse_jax.concepts.pretrained import SHIPPED
from tokenverse_jax.flux.layers import QKNorm
from tokenverse_jax.flux.model import Flux
from tokenverse_jax.flux.offsets import OffsetBlocks
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.words import word_key

FORMAT = "tokenverse-concepts"
FORMAT_VERSION = "1"
METADATA = ("tool_version", "caption", "base", "base_hash")  # of a file, besides its format and words
KEPT_SIDE = 128  # pixels of the image that goes into a file


@dataclass(frozen=True, kw_only=True, eq=False)
class Concept:
    """The directions of one word.

    Attributes:
      word: as in the caption of training; "dog#2" is its second "dog".
      token_ids: T5's, of its n tokens there.
      offset: [n, D] floats, direction of each token.
      block_offset: [blocks, n, D] floats, what each block adds to it, double blocks first; bfloat16 in files.
      blocks: "both", "double" or "single", those that it was learned with.
      strength: factor on the offsets, 1 by default.
    """

    word: str
    token_ids: tuple[int, ...]
    offset: np.ndarray
    block_offset: np.ndarray | None = None
    blocks: str = "both"
    strength: float = 1.0

    def __post_init__(self):
        arrays = [self.offset] if self.block_offset is None else [self.offset, self.block_offset]
        shapes = " and ".join(str(array.shape) for array in arrays)
        ranks = [array.ndim for array in arrays]
        if ranks != [2, 3][: len(arrays)] or {array.shape[-2:] for array in arrays} != {self.offset.shape}:
            raise ValueError(f"concept {self.word!r}: offsets of shapes {shapes}, not [n, D] and [blocks, n, D]")
        if not self.token_ids or len(self.token_ids) != len(self.offset):
            raise ValueError(f"concept {self.word!r}: {len(self.token_ids)} token ids for offsets of shapes {shapes}")
        if not all(np.isfinite(array).all() for array in (*arrays, self.strength)):
            raise ValueError(f"concept {self.word!r}: its offsets or strength are not finite numbers")
        if self.blocks not in get_args(OffsetBlocks):
            raise ValueError(f"concept {self.word!r}: blocks={self.blocks!r}, not {', '.join(get_args(OffsetBlocks))}")


def _tool_version() -> str:
    try:
        return importlib.metadata.version("tokenverse-mergevq-jax")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class _Word:
    """An entry of the metadata's `words`."""

    word: str
    token_ids: tuple[int, ...]
    blocks: OffsetBlocks
    strength: float


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    format: str
    format_version: str
    tool_version: str
    caption: str
    base: str
    base_hash: str
    words: tuple[_Word, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptFile:
    """The concepts of one image.

    Attributes:
      concepts: one for each word.
      caption: the first one of training.
      base: name of the model that they were learned on.
      base_hash: of its weights.
      image: uint8 [h, w, 3], a small copy of what it was learned from, for people to look at.
      params: Concept-Mod's, see `concept_mod.init_params`; needed to recompute directions for a prompt.
      tool_version: of the library that made it.
    """

    concepts: tuple[Concept, ...]
    caption: str
    base: str
    base_hash: str
    image: np.ndarray | None = None
    params: Params | None = None
    tool_version: str = field(default_factory=_tool_version)

    def __post_init__(self):
        words = [word_key(concept.word) for concept in self.concepts]
        if not words or len(set(words)) < len(words):
            raise ValueError(f"a concept file holds one or more different words, got {words}")
        image = self.image
        if image is not None and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            raise ValueError(f"a concept file's image is uint8 [h, w, 3], got {image.dtype} {list(image.shape)}")

    def concept(self, word: str) -> Concept:
        """The concept of a word, compared as in `words.find_word`; ValueError lists the words where there is none."""
        for concept in self.concepts:
            if word_key(concept.word) == word_key(word):
                return concept
        words = ", ".join(concept.word for concept in self.concepts)
        raise ValueError(f"no concept of {word!r} among those of the caption {self.caption!r}; there are: {words}")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file atomically, in the layout above; ValueError where the path does not end in .safetensors."""
        if path_of(path).suffix != ".safetensors":
            raise ValueError(f"{os.fspath(path)}: the name of a concept file ends in .safetensors")
        params = {} if self.params is None else {"params": jax.device_get(self.params)}
        tensors = traverse_util.flatten_dict(params, sep="/")
        if self.image is not None:
            tensors["image"] = self.image
        for i, concept in enumerate(self.concepts):
            tensors[f"words/{i}/offset"] = concept.offset.astype(np.float32)
            if concept.block_offset is not None:
                tensors[f"words/{i}/block_offset"] = concept.block_offset.astype(jnp.bfloat16)
        words = [{name: getattr(concept, name) for name in _Word.__dataclass_fields__} for concept in self.concepts]
        metadata = {name: getattr(self, name) for name in METADATA}
        metadata |= {"format": FORMAT, "format_version": FORMAT_VERSION, "words": json.dumps(words)}
        write_safetensors(path, tensors, metadata)


def load_concepts(
    path: str | os.PathLike, base: Pipeline | None = None, *, base_hash: str | None = None
) -> ConceptFile:
    """Reads a concept file.

    Args:
      path: of the file, or the name of a shipped one, such as "tiny-star".
      base: the model that the concepts are for; None: whatever they were learned on.
      base_hash: of `Pipeline.base_hash`, instead of `base`.

    Raises:
      ValueError: no such file, another format or version, damaged, or learned on another model.
    """
    base_hash = base_hash if base is None else base.base_hash()
    path = SHIPPED.get(os.fspath(path), path)
    tensors, fields = read_safetensors(path)
    if fields.get("format") != FORMAT:
        raise ValueError(f"{path}: not a concept file (its format is {fields.get('format')!r}, not {FORMAT!r})")
    if fields.get("format_version") != FORMAT_VERSION:
        version = fields.get("format_version")
        raise ValueError(f"{path}: a concept file of version {version!r}, but only {FORMAT_VERSION!r} can be read here")
    if "words" in fields:
        try:
            fields["words"] = json.loads(fields["words"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: its words are not JSON ({error})") from error
    metadata = build(_Metadata, fields, path=str(path))
    if base_hash not in (None, metadata.base_hash):
        raise ValueError(
            f"{path}: learned on {metadata.base} with weights {metadata.base_hash}, "
            f"but the loaded model's are {base_hash}: directions mean nothing to another model"
        )
    tree = traverse_util.unflatten_dict(tensors, sep="/")
    arrays, image, params = tree.pop("words", {}), tree.pop("image", None), tree.pop("params", None)
    unknown = sorted([*tree, *(f"words/{i}" for i in arrays if i not in map(str, range(len(metadata.words))))])
    kept = {name: getattr(metadata, name) for name in METADATA}
    try:
        if unknown:
            raise ValueError(f"unknown tensors {', '.join(unknown)}")
        concepts = tuple(_concept(word, arrays.get(str(i), {})) for i, word in enumerate(metadata.words))
        return ConceptFile(concepts=concepts, image=image, params=params, **kept)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _concept(word: _Word, arrays: Mapping[str, np.ndarray]) -> Concept:
    """The concept of an entry of `words` and its tensors."""
    if not {"offset"} <= arrays.keys() <= {"offset", "block_offset"}:
        got = ", ".join(sorted(arrays)) or "none"
        raise ValueError(f"concept {word.word!r} has tensors offset and maybe block_offset, got {got}")
    return Concept(**vars(word), **{name: array.astype(np.float32) for name, array in arrays.items()})


# Two concepts tend to blend where their tokens' attention keys are nearly parallel.


def text_keys(flux: Flux, params: Params, inputs: Mapping[str, Any]) -> Float[Array, "blocks B T H head"]:
    """Attention keys of the text tokens in every block, float32; rotary positions do not turn text tokens.

    Args:
      inputs: arguments of `flux`, offsets included.
    """
    _, state = flux.apply(
        {"params": params},
        **inputs,
        capture_intermediates=lambda module, _: isinstance(module, QKNorm),
        mutable="intermediates",
    )
    captured = state["intermediates"]
    ((_, double),) = captured["double_blocks"]["txt_attn"]["norm"]["__call__"]
    ((_, single),) = captured["single_blocks"]["norm"]["__call__"]
    return jnp.concatenate([double, single[:, :, : double.shape[2]]])


def key_similarity(
    keys: Float[Array, "blocks T H head"], first: Sequence[int], second: Sequence[int]
) -> Float[Array, ""]:
    """How nearly parallel the keys of two words' tokens are, from -1 to 1.

    The mean cosine over blocks and heads, of each token and the other word's nearest, averaged over the tokens of both.

    Args:
      keys: of one prompt that holds both concepts, see `text_keys`.
      first: positions of a word's tokens.
      second: positions of the other's.
    """
    unit = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    mine, other = unit[:, jnp.asarray(first)], unit[:, jnp.asarray(second)]
    cosines = jnp.einsum("lnhd,lmhd->lhnm", mine, other, precision=jax.lax.Precision.HIGHEST).mean(axis=(0, 1))
    return jnp.concatenate([cosines.max(axis=0), cosines.max(axis=1)]).mean()
