"""`mergevq compare`: a table and a picture of several generators' samples, from folders of `mergevq sample`."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Array, UInt8

from mergevq_jax.evaluate.frechet import Moments
from mergevq_jax.evaluate.generation import Labelled, Quality, measure
from mergevq_jax.evaluate.held_out import BATCH_SIZE, read_scenes
from mergevq_jax.generator.images import recovered_to_images
from mergevq_jax.generator.kinds.randar import Codes
from mergevq_jax.generator.kinds.table import KINDS
from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer, read_tokenizer_config
from mini_scenes import CLASSES, make_config
from mini_scenes.judge import Judge
from runtime_jax.cost import table
from runtime_jax.files import AnyPath, write_text
from runtime_jax.messages import cut
from runtime_jax.pictures import Points, image_grid, plot_lines, save_png
from runtime_jax.workdir import only_writer

Images = UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"]
REAL = "held-out scenes"
SEVERAL = ", of several objects (--single: of one)"
SHOWN = 12  # images of a row in the picture
# Fields of the protocol in which the folders of a row are equal.
SETTINGS = ("fingerprint", "keep", "sampling", "steps", "slots", "compute", "device", "mesh")


class Folder(NamedTuple):
    """A folder that `mergevq sample` wrote."""

    samples: Labelled
    protocol: Mapping[str, Any]


class Curve(NamedTuple):
    """The settings of sampling with a KV cache, without its size."""

    name: str  # policy and K
    digest: str  # of the others


class Row(NamedTuple):
    """One line of the table."""

    name: str
    quality: Quality
    sets: int
    curve: Curve | None = None  # of a KV cache that can be full
    slots: int | None = None
    cache_bytes: int | None = None  # keys and values for one image
    seconds: float | None = None  # for one image, in batches, of the fastest set


def compare(
    rows: Sequence[tuple[str, Sequence[AnyPath]]],
    *,
    out: AnyPath,
    data_dir: str,
    judge: Judge,
    tokenizer: str | None = None,
    keeps: Sequence[int] = (),
    single: bool = False,
) -> None:
    """Prints a table; writes it as compare.md, and the first images of every row as compare.png.

    Rows that differ only in the slots of the KV cache are also plotted, a line for each policy, as trade_off.png.

    The first rows are real validation scenes and, with a tokenizer, their reconstructions: no generator can be expected
    to do better. All rows are measured against test scenes.

    Args:
      rows: name, and a folder for each seed; the folders may differ in nothing else.
      tokenizer: shipped name, folder or hub id; it reconstructs from each K in `keeps`.
      single: real scenes have one object, as in the generators' training data.

    Raises:
      ValueError: folders without samples or with different numbers of images, different settings in one row, a missing
        dataset or tokenizer.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: what the judge sees, or a reconstruction, is not finite.
    """
    with only_writer(out):
        folders = {name: [read_samples(path) for path in paths] for name, paths in rows}
        if len(folders) < len(rows):
            raise ValueError(f"rows {', '.join(name for name, _ in rows)}: every name once")
        for name, group in folders.items():
            _check_row(name, [folder.protocol for folder in group])
        shapes = {folder.samples.images.shape for group in folders.values() for folder in group}
        if len(shapes) != 1:
            there = [
                f"{name} {path}: {count} of {width} x {height} pixels"
                for name, paths in rows
                for path, (count, height, width, _) in zip(
                    paths, (folder.samples.images.shape for folder in folders[name]), strict=True
                )
            ]
            raise ValueError(f"equal numbers of images of one size are needed, there are {cut(there)}")
        count, size = shapes.pop()[:2]
        if tokenizer is not None:
            config = read_tokenizer_config(tokenizer)
            for keep in keeps:
                config.merge_counts(config.raw_tokens, keep)
        loaded = None if tokenizer is None else load_tokenizer(tokenizer)
        reconstructed = {} if loaded is None else _reconstructions(loaded, keeps, size)
        if taken := {REAL, *reconstructed} & folders.keys():
            raise ValueError(f"rows {', '.join(sorted(taken))}: these names are those of real scenes")
        scenes = functools.partial(read_scenes, size, count, data_dir, single=single)
        reference = Moments.of(judge.features(scenes(split="test").images))
        real = scenes(split="validation")
        sets = {REAL: [real]}
        sets |= {name: [_in_batches(reconstruct, real)] for name, reconstruct in reconstructed.items()}
        sets |= {name: [folder.samples for folder in group] for name, group in folders.items()}
        measured = [_row(name, group, folders.get(name), judge, reference) for name, group in sets.items()]
        dataset = f"mini_scenes/{make_config(size, single=single).name}" + ("" if single else SEVERAL)
        text = render(measured, count, dataset)
        print(text)
        write_text(out / "compare.md", text)
        shown = [list(group[0].images[:SHOWN]) for group in sets.values()]
        save_png(out / "compare.png", image_grid(shown, row_labels=list(sets)))
        written = ["compare.md", "compare.png"]
        if panels := trade_off(measured):
            plot_lines(panels, out / "trade_off.png", x_label="slots of the KV cache")
            written.append("trade_off.png")
        print(f"{', '.join(written)}: in {out}")


def read_samples(path: AnyPath) -> Folder:
    """A folder that `mergevq sample` wrote: samples.npz (arr_0 images, arr_1 labels) and protocol.json.

    Raises:
      ValueError: a file is missing or not readable, or the images are not uint8 [N, H, W, 3] with a label each.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    try:
        protocol = json.loads((path / "protocol.json").read_text())
        if "merge_number" in protocol:  # the name of K in older protocols
            protocol["keep"] = protocol.pop("merge_number")
        with (path / "samples.npz").open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
    except (OSError, KeyError, BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a folder of mergevq sample ({error})") from error
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: images {images.dtype} {images.shape} with labels {labels.shape}")
    return Folder(Labelled(images, labels), protocol)


def cache_bytes(protocol: Mapping[str, Any]) -> int:
    """Bytes of the KV cache for one image; under guidance, of both its rows."""
    architecture, scale = protocol["generator"]["architecture"], protocol["sampling"]["cfg_scale"]
    rows = 1 + any(value != 1 for value in np.atleast_1d(scale))
    width = {"float32": 4, "bfloat16": 2}[protocol["compute"]["dtype"]]
    return 2 * architecture["num_layers"] * rows * protocol["slots"] * architecture["dim"] * width


def _reconstructions(tokenizer: Tokenizer, keeps: Sequence[int], size: int) -> dict[str, Callable[[Images], Images]]:
    """Ways to reconstruct: from codes and source map, and from codes and the starts of their groups, as RandAR does.

    The latter needs images of the tokenizer's training size, the only one that source recovery knows.
    """

    def recovered(images: Images, *, keep: int) -> Images:
        tokens = tokenizer.encode(images, keep=keep)
        return recovered_to_images(tokenizer, Codes(tokens.indices, tokens.group_starts))

    ways = {f"reconstructed, K = {keep}": functools.partial(tokenizer.reconstruct, keep=keep) for keep in keeps}
    if tokenizer.config.recovery is None or tokenizer.config.resolution != size:
        return ways
    return ways | {f"from codes and starts, K = {keep}": functools.partial(recovered, keep=keep) for keep in keeps}


def _in_batches(reconstruct: Callable[[Images], Images], real: Labelled) -> Labelled:
    parts = [real.images[start : start + BATCH_SIZE] for start in range(0, len(real.images), BATCH_SIZE)]
    return Labelled(np.concatenate([np.asarray(reconstruct(part)) for part in parts]), real.labels)


def _check_row(name: str, protocols: Sequence[Mapping[str, Any]]) -> None:
    """Checks that the folders of a row differ in the seed alone and can be judged."""
    for protocol in protocols:
        known = protocol | protocol.get("measured", {})
        if missing := [key for key in (*SETTINGS, "seed", "generator", "seconds_per_image") if key not in known]:
            raise ValueError(f"{name}: its protocol has no {', '.join(missing)}; draw the samples again")
        if differing := [key for key in SETTINGS if protocol[key] != protocols[0][key]]:
            raise ValueError(f"{name}: its folders differ in {', '.join(differing)}, not in the seed alone")
    if len(seeds := [protocol["seed"] for protocol in protocols]) > len(set(seeds)):
        raise ValueError(f"{name}: seeds {seeds}: every folder needs its own")
    if (classes := protocols[0]["generator"]["classes"]) != list(CLASSES):
        raise ValueError(f"{name}: its generator's classes are {classes}, not those of mini_scenes")


def _row(
    name: str, sets: Sequence[Labelled], folders: Sequence[Folder] | None, judge: Judge, reference: Moments
) -> Row:
    quality = measure(judge, sets, reference)
    if folders is None:
        return Row(name, quality, len(sets))
    protocols = [folder.protocol for folder in folders]
    timed = [protocol["measured"]["seconds_per_image"] for protocol in protocols]
    seconds = [value for value in timed if value is not None]
    return Row(
        name,
        quality,
        len(sets),
        curve=_curve(protocols[0]),
        slots=protocols[0]["slots"],
        cache_bytes=max(map(cache_bytes, protocols)),
        seconds=min(seconds, default=None),
    )


def _curve(protocol: Mapping[str, Any]) -> Curve | None:
    if not KINDS[protocol["generator"]["kind"]].compresses:
        return None
    sampling = {name: value for name, value in protocol["sampling"].items() if name != "capacity"}
    rest = json.dumps([protocol["fingerprint"], sampling, protocol["compute"]], sort_keys=True)
    digest = hashlib.sha256(rest.encode()).hexdigest()[:4]
    keep = "" if protocol["keep"] is None else f", K = {protocol['keep']}"
    return Curve(sampling["policy"] + keep, digest)


def trade_off(rows: Sequence[Row]) -> dict[str, dict[str, Points]]:
    """Panels of a plot: quality against slots, a line for each curve with several numbers of slots."""
    groups = {curve: [row for row in rows if row.curve == curve] for curve in {row.curve for row in rows} - {None}}
    groups = {curve: group for curve, group in sorted(groups.items()) if len({row.slots for row in group}) > 1}
    names = Counter(curve.name for curve in groups)
    lines = {
        curve.name if names[curve.name] == 1 else f"{curve.name}, settings {curve.digest}": sorted(
            group, key=lambda row: row.slots
        )
        for curve, group in groups.items()
    }
    measures = {
        "right class, %": lambda row: (100 * row.quality.accuracy.mean, 100 * row.quality.accuracy.half_width),
        "Fréchet distance": lambda row: (row.quality.frechet.mean, row.quality.frechet.half_width or np.nan),
    }
    return {
        quantity: {
            name: Points([row.slots for row in group], *zip(*map(measure_of, group), strict=True))
            for name, group in lines.items()
        }
        for quantity, measure_of in measures.items()
        if lines
    }


def render(rows: Sequence[Row], count: int, dataset: str) -> str:
    """The table in Markdown; `dataset`: of the real scenes."""
    head = ("images", "seeds", "right class, %", "Fréchet distance", "cache, kB an image", "seconds an image")
    lines = []
    for row in rows:
        accuracy = row.quality.accuracy
        lines.append(
            (
                row.name,
                str(row.sets),
                f"{100 * accuracy.mean:.1f} ± {100 * accuracy.half_width:.1f}",
                f"{row.quality.frechet:.3f}",
                "" if row.cache_bytes is None else f"{row.cache_bytes / 1000:.0f}",
                "" if row.seconds is None else f"{row.seconds:.3f}",
            )
        )
    note = f"{count} images a seed, against as many test scenes of {dataset}; "
    note += "intervals of 95 %, of the distance over seeds."
    return "\n".join([*table(head, lines), "", note]) + "\n"
