"""`mergevq tokenize`: codes and source maps of a whole dataset on disk, in shards of array_record files.

The layout is that of `tokens_folder`. A shard gets its final name when it is complete, so a
stopped run resumes at the first missing one.
"""

import contextlib
import json
from collections.abc import Iterator

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from safetensors.numpy import save as to_bytes
from tqdm import tqdm

from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer, read_tokenizer_config
from mergevq_jax.tokens_folder import INFO_NAME, Views, read_tokens
from runtime_jax import config as config_lib
from runtime_jax import hosts
from runtime_jax.data import SourceConfig, center_crop, open_source
from runtime_jax.files import AnyPath, replacing, write_json
from runtime_jax.messages import cut
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import only_writer

TEN_CROP_SCALE = 1.1  # side of the picture that is cropped, in sides of a crop


def tokenize(
    source: SourceConfig,
    tokenizer: str,
    out: AnyPath,
    *,
    keep: int | None,
    batch_size: int = 32,
    shard_size: int = 4096,
    views: Views = "one",
) -> str:
    """Tokenizes every image of a source, resized and centre-cropped to the training size; returns a summary line.

    With several `views`, each image has codes for each of them, see `views_of`. Unreadable images of a folder are left
    out and counted, in the summary and finally in tokens.json. Of several processes, which must share `out`, process i
    of n writes the shards i, i + n, ... SIGTERM and SIGINT end the work after the current batch.

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
            "tokenizer": loaded.code_fingerprint(),
            "bits": config.bits,
            "keep": keep,
            "grid": list(config.grid(config.resolution, config.resolution)),
            "classes": images.classes,
            "source": config_lib.to_dict(source),
            "images": len(images),
            "shard_size": shard_size,
            **({} if views == "one" else {"views": views}),  # the folder of one view is as it always was
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
                        views,
                        stop,
                    )
        # Counted from the shards, so that a resumed run gives the same number.
        count = sum(1 for _ in read_tokens(out))
        unreadable = len(images) - count
        if jax.process_index() == 0:
            write_json(out / INFO_NAME, info | {"unreadable": unreadable})
        return f"{count} images in {shards} shards under {out} ({unreadable} unreadable ones left out)"


def views_of(image: UInt8[np.ndarray, "H W 3"], size: int, views: Views) -> list[UInt8[np.ndarray, "{size} {size} 3"]]:
    """The views of an image that get codes.

    "one": the centre crop. "flip": also its mirror image. "ten-crop": corners and centre of a centre crop that is a
    tenth larger, in the order top left, top right, bottom left, bottom right, centre; then the mirror images of these.
    """
    if views == "ten-crop":
        large = center_crop(image, round(TEN_CROP_SCALE * size))
        end = len(large) - size
        starts = [(0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)]
        crops = [large[top : top + size, left : left + size] for top, left in starts]
    else:
        crops = [center_crop(image, size)]
    return crops if views == "one" else crops + [crop[:, ::-1] for crop in crops]


def _claim(out: AnyPath, info: dict) -> None:
    """Writes tokens.json, or checks that the existing one says the same."""
    path = out / INFO_NAME
    if path.exists():
        old, new = ({"views": "one"} | fields for fields in (json.loads(path.read_text()), info))
        if changes := config_lib.config_changes({key: old.get(key) for key in new}, new):
            raise ValueError(f"{out} holds other tokens; choose another folder\n  " + cut(changes.values(), "\n  "))
        return
    write_json(path, info)


def _write_shard(
    path: AnyPath,
    tokenizer: Tokenizer,
    images,
    indices: range,
    keep: int,
    batch_size: int,
    views: Views,
    stop: Stop,
) -> None:
    with replacing(path) as new, contextlib.closing(ArrayRecordWriter(str(new), "group_size:1")) as writer:
        for start in range(indices.start, indices.stop, batch_size):
            stop.check()
            chosen = list(indices[start - indices.start : start - indices.start + batch_size])
            for record in _records(tokenizer, images, chosen, keep, batch_size, views):
                writer.write(record)


def _records(
    tokenizer: Tokenizer, images, indices: list[int], keep: int, batch_size: int, views: Views
) -> Iterator[bytes]:
    # A source replaces a broken image by the next readable one; here the broken one is left out.
    examples = [(index, example) for index in indices if not (example := images[index]).get("skipped")]
    if not examples:
        return
    size = tokenizer.config.resolution
    codes, maps = [], []
    for pixels in zip(*(views_of(example["image"], size, views) for _, example in examples), strict=True):
        padded = np.stack([*pixels, *[pixels[-1]] * (batch_size - len(pixels))])
        tokens = tokenizer.encode(padded, keep=keep)
        codes.append(np.asarray(tokens.indices))
        maps.append(np.asarray(tokens.source_map))
    codes, maps = (np.stack(x, axis=1) if views != "one" else x[0] for x in (codes, maps))
    for row, (index, example) in enumerate(examples):
        yield to_bytes(
            {
                "indices": np.ascontiguousarray(codes[row]),
                "source_map": np.ascontiguousarray(maps[row]),
                "label": np.asarray(example["label"], np.int64),
                "index": np.asarray(index, np.int64),
            }
        )
