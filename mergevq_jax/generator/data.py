"""What a generator learns from: images, which the train step tokenizes, or codes that `mergevq tokenize` wrote to disk.

All images of a step keep the same number K of tokens, which the caller draws for each step. Batch s is a pure function
of (config, s) and the draw, for any number of hosts.

Axes: B batch, L raster tokens, K kept tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from safetensors.numpy import load as from_bytes

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.tokenizer.model import Tokenizer
from mergevq_jax.tokens_folder import TokensFolder, open_tokens
from runtime_jax import data as image_data
from runtime_jax.config import config_changes
from runtime_jax.data import DataConfig, check_same_classes, classes_of, read_batches
from runtime_jax.files import path_of
from runtime_jax.prng import Stream, host_rng


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Codes on disk: the folders that `mergevq tokenize` wrote from one source, one for each K.

    Codes cannot be flipped or cropped: an image is always as it was tokenized. If it has several views (`mergevq
    tokenize --views`), an example is one of them, drawn from the seed and the example's number.
    """

    folders: tuple[str, ...]
    batch_size: int  # over all hosts
    seed: int = 0
    shuffle: bool = True
    num_workers: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(f"codes: batch_size={self.batch_size} (from 1), num_workers={self.num_workers} (from 0)")


def num_examples(config: DataConfig | TokensConfig) -> int:
    """Examples in one epoch."""
    return image_data.num_examples(config) if isinstance(config, DataConfig) else len(_Tokens(config.folders))


def make_batches(
    config: DataConfig | TokensConfig,
    draw: Callable[[int], int],
    start_step: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless iterator of this host's part of the batches start_step, start_step + 1, ...

    Batches have "label" int32 [B], "example" int64 [B], the example's number in the endless stream, and
    from images: "image" uint8 [B, H, W, 3]; from codes on disk: "indices" int32 [B, L], the code at each raster token,
    and "source_map" int32 [B, L].

    Args:
      draw: step -> K; codes are read from that K's folder. Images do not depend on it.

    Raises:
      ValueError: as `runtime_jax.data.make_batches`, or folders that do not belong together.
    """
    hosts = {"process_index": process_index, "process_count": process_count}
    if isinstance(config, DataConfig):
        return image_data.make_batches(config, start_step, **hosts)
    tokens = _Tokens(config.folders)
    numbers = grain.MapDataset.range(len(tokens))
    if config.shuffle:
        numbers = numbers.shuffle(int(host_rng(config.seed, Stream.DATA, 0).integers(2**32)))
    stream = numbers.repeat().map_with_index(_Read(tokens, draw, config.batch_size, config.seed))
    return read_batches(stream, _stack, config.batch_size, start_step, num_workers=config.num_workers, **hosts)


class _Tokens:
    """Random access to images tokenized at several K."""

    def __init__(self, paths: Sequence[str]):
        opened = {path: open_tokens(path_of(path)) for path in paths}
        self.infos = {path: folder.info for path, folder in opened.items()}
        _require_one_source(self.infos)
        self.folders = {folder.info["keep"]: _records(folder) for folder in opened.values()}
        lengths = {path: len(self.folders[info["keep"]]) for path, info in self.infos.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"folders of tokens hold different numbers of images: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.folders.values())))

    def read(self, keep: int, number: int) -> dict[str, np.ndarray]:
        """Image `number` at K = `keep`."""
        return from_bytes(self.folders[keep][number])


def _records(folder: TokensFolder) -> grain.sources.ArrayRecordDataSource:
    return grain.sources.ArrayRecordDataSource([str(path) for path in folder.shards])


def _require_one_source(infos: dict[str, dict[str, Any]]) -> None:
    if not infos:
        raise ValueError("data.folders is empty: name the folders that mergevq tokenize wrote")
    (first, info), *others = infos.items()
    for path, other in others:
        keys = ("source", "images", "tokenizer", "views")
        if differing := config_changes(*({key: one.get(key) for key in keys} for one in (info, other))):
            raise ValueError(f"{path} and {first} do not belong together: they differ in {', '.join(differing)}")
    keeps = [info["keep"] for info in infos.values()]
    if len(set(keeps)) < len(keeps):
        raise ValueError(f"data.folders: one folder for each number of kept tokens is needed, these have {keeps}")


@dataclass(frozen=True)
class _Read:
    """An example of the endless stream, from image `number`."""

    tokens: _Tokens
    draw: Callable[[int], int]
    batch_size: int
    seed: int

    def __call__(self, example: int, number: int) -> dict[str, Any]:
        record = self.tokens.read(self.draw(example // self.batch_size), int(number))
        indices, source_map = record["indices"], record["source_map"]
        if source_map.ndim == 2:
            view = host_rng(self.seed, Stream.AUGMENT, example).integers(len(source_map))
            indices, source_map = indices[view], source_map[view]
        return {
            "indices": indices[source_map],
            "source_map": source_map,
            "label": record["label"],
            "example": example,
        }


def _stack(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    dtypes = {"indices": np.int32, "source_map": np.int32, "label": np.int32, "example": np.int64}
    return {name: np.asarray([example[name] for example in examples], dtype) for name, dtype in dtypes.items()}


def check_tokenizer(config: GeneratorConfig, tokenizer: Tokenizer) -> None:
    """Checks that a generator fits a tokenizer.

    Raises:
      ValueError: another number of codes or another grid.
    """
    side = tokenizer.config.resolution
    grid, codes = tokenizer.config.grid(side, side), tokenizer.config.vocab_size
    if config.vocab_size != codes or config.grid != grid:
        raise ValueError(
            f"the tokenizer has {codes} codes on a grid {grid}, the generator {config.vocab_size} "
            f"(vocab_sizes={config.vocab_sizes}) on a grid {config.grid}"
        )


def check_data(
    config: DataConfig | TokensConfig, model: GeneratorConfig, tokenizer: Tokenizer, keeps: Sequence[int]
) -> tuple[str, ...]:
    """Checks that the data fit a generator and its tokenizer; returns the names of the classes.

    Args:
      keeps: all K that will be drawn.

    Raises:
      ValueError: missing data, images of another size, codes of another tokenizer, a K without codes, another number
        of classes.
    """
    if isinstance(config, DataConfig):
        side = tokenizer.config.resolution
        if config.image_size != side:
            raise ValueError(f"data.image_size={config.image_size}: the tokenizer's images have {side} pixels a side")
        classes = classes_of(config.sources)
    else:
        classes = list(_check_tokens(_Tokens(config.folders), tokenizer, keeps).items())
    for where, names in classes:
        if names is None or len(names) != model.num_classes:
            have = "no labels" if names is None else f"{len(names)} classes"
            raise ValueError(f"{where} has {have}, the generator model.num_classes={model.num_classes}")
    check_same_classes(classes)
    return tuple(names)


def _check_tokens(tokens: _Tokens, tokenizer: Tokenizer, keeps: Sequence[int]) -> dict[str, list[str] | None]:
    """The classes of each folder; all folders must hold codes of this tokenizer."""
    for path, info in tokens.infos.items():
        if not tokenizer.made(info["tokenizer"]):
            raise ValueError(
                f"{path} holds codes of another tokenizer ({info['bits']} bits, grid {info['grid']}, fingerprint "
                f"{info['tokenizer'][:12]}) than this run's ({tokenizer.config.bits} bits, fingerprint "
                f"{tokenizer.code_fingerprint()[:12]})"
            )
    if missing := sorted(set(keeps) - tokens.folders.keys()):
        raise ValueError(
            f"no folder of tokens with K = {', '.join(map(str, missing))}; there are K = "
            f"{', '.join(map(str, sorted(tokens.folders)))}"
        )
    return {path: info.get("classes") for path, info in tokens.infos.items()}
