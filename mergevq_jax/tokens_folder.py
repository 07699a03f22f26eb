"""Folders of indices and source maps from `mergevq tokenize`: shards in the array_record format.

A record is one image as a small safetensors blob: `indices` int32 [K], `source_map` int32 [L], `label` and `index`
int64 []. `tokens.json` beside the shards describes them and, once all are written, counts `unreadable` images. If it
names `views`, a record has `indices` [V, K] and `source_map` [V, L] of the V views of its image.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors.numpy import load as from_bytes

from runtime_jax.files import AnyPath, is_file, local

INFO_NAME = "tokens.json"
SHARDS = "tokens-*.array_record"
Views = Literal["one", "flip", "ten-crop"]  # what of an image has codes, see commands.tokenize.views_of


def read_tokens(folder: AnyPath) -> Iterator[dict[str, np.ndarray]]:
    """The records of a folder from `tokenize`, in order.

    Raises:
      ValueError: as `open_tokens`.
    """
    for path in open_tokens(folder).shards:
        reader = ArrayRecordReader(str(path))
        for blob in reader.read_all():
            yield from_bytes(blob)
        reader.close()


class TokensFolder(NamedTuple):
    """A folder from `tokenize`."""

    info: dict[str, Any]  # tokens.json
    shards: list[Path]


def open_tokens(folder: AnyPath) -> TokensFolder:
    """Finds the files in a folder from `tokenize`; of a bucket, copies them to the local disk first.

    Raises:
      ValueError: not such a folder, or shards are missing.
      BucketError: the bucket cannot be read.
    """
    if not is_file(folder / INFO_NAME):
        raise ValueError(f"{folder}: not a folder from mergevq tokenize, no {INFO_NAME}")
    info = json.loads((folder / INFO_NAME).read_text())
    count = -(-info["images"] // info["shard_size"])
    shards = sorted(local(folder, (INFO_NAME, SHARDS)).glob(SHARDS))
    if len(shards) != count:
        raise ValueError(f"{folder} has {len(shards)} of {count} shards: run mergevq tokenize again")
    return TokensFolder(info, shards)
