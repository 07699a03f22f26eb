"""`mergevq tokenize`: codes and source maps of a whole dataset on disk, in shards of array_record files.

The layout is that of `tokens_folder`. A shard gets its final name when it is complete, so a
stopped run resumes at the first missing one.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import save as to_bytes
from tqdm import tqdm

from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer, read_tokenizer_config
from mergevq_jax.tokens_folder import INFO_NAME, read_tokens
from runtime_jax import config as config_lib
from runtime_jax import hosts
from runtime_jax.data import SourceConfig, center_crop, open_source
from runtime_jax.files import replacing, write_json
from runtime_jax.messages import cut
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import only_writer


def tokenize(
    source: SourceConfig, tokenizer: str, out: Path, *, keep: int | None, batch_size: int = 32, shard_size: int = 4096
) -> str:
    """Tokenizes every image of a source, resized and centre-cropped to the training size; returns a summary line.

    Unreadable images of a folder are left out and counted, in the summary and finally in tokens.json. Of several
    processes, which must share `out`, process i of n writes the shards i, i + n, ... SIGTERM and SIGINT end the work
    after the current batch.

    Raises:
      ValueError: no such source, an impossible K, or `out` holds codes of another tokenizer, source or K.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: features that are not finite, which have no codes.
      StoppedError: by a signal; complete shards are kept.
    """
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"--batch-size {batch_size} and --shard-size {shard_size}: at least 1")
    with only_writer(out), Stop() as stop:
        config = read_tokenizer_config(tokenizer)
        keep = config.keep if keep is None else keep
        config.merge_counts(config.raw_tokens, keep)
        images = open_source(source)
        loaded = load_tokenizer(tokenizer)
        shards = -(-len(images) // shard_size)
        info = {
            "tokenizer": loaded.fingerprint(),
            "bits": config.bits,
            "keep": keep,
            "grid": list(config.grid(config.resolution, config.resolution)),
            "classes": images.classes,
            "source": config_lib.to_dict(source),
            "images": len(images),
            "shard_size": shard_size,
        }
        hosts.check_same("what is to be tokenized", info)
        if jax.process_index() == 0:
            _claim(out, info)
        hosts.barrier("claimed")
        mine = range(jax.process_index(), shards, jax.process_count())
        with stop.parts(f"; complete shards are in {out}, and the same command writes the others"):
            for shard in tqdm(mine, desc="shards", disable=None if jax.process_index() == 0 else True):
                path = out / f"tokens-{shard:05d}-of-{shards:05d}.array_record"
                if not path.exists():
                    _write_shard(
                        path,
                        loaded,
                        images,
                        range(shard * shard_size, min(len(images), (shard + 1) * shard_size)),
                        keep,
                        batch_size,
                        stop,
                    )
        # Counted from the shards, so that a resumed run gives the same number.
        count = sum(1 for _ in read_tokens(out))
        unreadable = len(images) - count
        if jax.process_index() == 0:
            write_json(out / INFO_NAME, info | {"unreadable": unreadable})
        return f"{count} images in {shards} shards under {out} ({unreadable} unreadable ones left out)"


def _claim(out: Path, info: dict) -> None:
    """Writes tokens.json, or checks that the existing one says the same."""
    path = out / INFO_NAME
    if path.exists():
        old = json.loads(path.read_text())
        if changes := config_lib.config_changes({key: old.get(key) for key in info}, info):
            raise ValueError(f"{out} holds other tokens; choose another folder\n  " + cut(changes.values(), "\n  "))
        return
    write_json(path, info)


def _write_shard(
    path: Path, tokenizer: Tokenizer, images, indices: range, keep: int, batch_size: int, stop: Stop
) -> None:
    with replacing(path) as new, contextlib.closing(ArrayRecordWriter(str(new), "group_size:1")) as writer:
        for start in range(indices.start, indices.stop, batch_size):
            stop.check()
            chosen = list(indices[start - indices.start : start - indices.start + batch_size])
            for record in _records(tokenizer, images, chosen, keep, batch_size):
                writer.write(record)


def _records(tokenizer: Tokenizer, images, indices: list[int], keep: int, batch_size: int) -> Iterator[bytes]:
    # A source replaces a broken image by the next readable one; here the broken one is left out.
    examples = [(index, example) for index in indices if not (example := images[index]).get("skipped")]
    if not examples:
        return
    size = tokenizer.config.resolution
    pixels = np.stack([center_crop(example["image"], size) for _, example in examples])
    padded = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - len(pixels), axis=0)])
    tokens = tokenizer.encode(padded, keep=keep)
    codes, maps = np.asarray(tokens.indices), np.asarray(tokens.source_map)
    for row, (index, example) in enumerate(examples):
        yield to_bytes(
            {
                "indices": codes[row],
                "source_map": maps[row],
                "label": np.asarray(example["label"], np.int64),
                "index": np.asarray(index, np.int64),
            }
        )
