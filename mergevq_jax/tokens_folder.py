"""Folders of codes and source maps that `mergevq tokenize` wrote, in shards of array_record files.

A record is one image as a small safetensors blob: `indices` int32 [K], `source_map` int32 [L], `label` and `index`
int64 []. `tokens.json` beside the shards says what they are and, at the end, how many images were `unreadable`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors.numpy import load as from_bytes

INFO_NAME = "tokens.json"


def read_tokens(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The records of a folder that `tokenize` wrote, in order.

    Raises:
      ValueError: as `open_tokens`.
    """
    for path in open_tokens(folder).shards:
        reader = ArrayRecordReader(str(path))
        for blob in reader.read_all():
            yield from_bytes(blob)
        reader.close()


class TokensFolder(NamedTuple):
    """A folder that `tokenize` wrote."""

    info: dict[str, Any]  # tokens.json
    shards: list[Path]


def open_tokens(folder: Path) -> TokensFolder:
    """What a folder of tokens holds.

    Raises:
      ValueError: not such a folder, or shards missing.
    """
    if not (folder / INFO_NAME).is_file():
        raise ValueError(f"{folder}: no {INFO_NAME}; mergevq tokenize writes such folders")
    info = json.loads((folder / INFO_NAME).read_text())
    wanted = -(-info["images"] // info["shard_size"])
    shards = sorted(folder.glob("tokens-*.array_record"))
    if len(shards) != wanted:
        raise ValueError(f"{folder}: {len(shards)} of {wanted} shards are there; start mergevq tokenize again")
    return TokensFolder(info, shards)
