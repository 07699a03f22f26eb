"""`mergevq sample`: images of classes by a trained generator, with a protocol to draw them again.

Each batch is a file in `parts` until all are there; a stopped run resumes at the first missing one. Of n processes,
which share the folder, process i draws the batches i, i + n, ... on its own devices.

Axes: B batch, N images, H W image, L raster tokens.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt8
from tqdm import tqdm

from mergevq_jax.generator.kinds.kind import CacheUse
from mergevq_jax.generator.kinds.table import KINDS
from mergevq_jax.generator.model import GeneratorInfo, GeneratorModel, load_generator, read_info
from mergevq_jax.generator.sampling.plan import DrawPlan, SamplingConfig
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer, read_tokenizer_config
from runtime_jax import config as config_lib
from runtime_jax import hosts
from runtime_jax.files import AnyPath, remove_tree, replacing, write_json
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.pictures import dim_tokens, image_grid, loss_curve, save_png
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import check_free, only_writer

CLAIM_NAME = "samples.json"
COLUMNS = 8
MAX_SHOWN = 64  # images in a picture


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw."""

    num: int = 64
    classes: tuple[str, ...] = ()  # as `GeneratorInfo.class_number` takes them, in turn; none: all
    keep: int | None = None  # None: GeneratorConfig.usual_keep
    sampling: SamplingConfig = SamplingConfig()
    steps: int | None = None  # calls of the network by a generator in random order; None: 64
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        sizes = {"--num": self.num, "--batch-size": self.batch_size}
        if bad := [f"{name} {value}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"{' and '.join(bad)}: at least 1")


@dataclass(frozen=True)
class Drawn:
    """Images, what the KV cache did, and how long they took."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, "N"]
    cache: CacheUse | None  # None in random order, where every code is kept
    seconds: float
    seconds_per_image: float | None  # of the batches that did not compile; None: all did


def sample(
    source: str,
    request: Request,
    *,
    out: AnyPath,
    tokenizer: str | None = None,
    compute: Compute = Compute(),
    mesh: MeshConfig = MeshConfig(),
    show_cache: bool = False,
) -> str:
    """Writes samples.png, samples.npz and protocol.json, with `show_cache` cache.png and occupancy.png; a summary line.

    samples.npz is in ADM's layout: arr_0 uint8 [N, H, W, 3], and arr_1 int [N], the labels.

    Args:
      mesh: over the devices of each process; a batch is split over as many of its data axis as divide it.

    Raises:
      ValueError: no such generator, tokenizer or class, impossible settings, or `out` holds parts of other samples;
        before any compilation.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: logits or pixels that are not finite.
      StoppedError: by a signal; drawn batches are kept.
    """
    with only_writer(out), Stop() as stop:
        devices = make_mesh(mesh, jax.local_devices())
        info = read_info(source)  # what is impossible is found before the weights are read
        labels, parts = labels_of(info, request), out / "parts"
        plan = plan_of(info, request, compute, show_cache=show_cache)
        codes_of = info.tokenizer.name if tokenizer is None else tokenizer
        tokenizer_config = read_tokenizer_config_of(info, tokenizer)
        size = 2 * request.num * 3 * tokenizer_config.resolution**2  # in parts, and as a whole
        check_free(out, size, f"{request.num} images")
        model = load_generator(source, compute=compute)
        loaded = model.load_tokenizer(tokenizer)
        made_by = {"device": jax.devices()[0].device_kind, "mesh": dict(devices.shape), "jax": jax.__version__}
        wanted = {"fingerprint": model.fingerprint(), "compute": compute, "request": request, **made_by}
        hosts.check_same("what is to be drawn", config_lib.to_dict(wanted))
        if jax.process_index() == 0:
            _claim(parts, wanted)
        hosts.barrier("claimed")
        try:
            with jax.set_mesh(devices), stop.parts("; the same command draws the batches that are missing"):
                draw(model.place(devices), loaded, request, labels, parts, stop)
        except BaseException:
            if jax.process_index() == 0 and not any(parts.glob("[0-9]*.npz")):  # nothing to resume from
                remove_tree(parts)
            raise
        done = f"{request.num} images are in {out}"
        if jax.process_index() > 0:
            return done
        drawn = _joined(parts, labels, request.batch_size)
        names = [info.classes[label] if info.classes else str(label) for label in drawn.labels.tolist()]

        (out / "protocol.json").unlink(missing_ok=True)  # it describes the images beside it
        with replacing(out / "samples.npz") as new:
            np.savez(new, drawn.images, drawn.labels)
        protocol = {
            "model": source,
            "fingerprint": model.fingerprint(),
            "tokenizer": codes_of,
            "generator": config_lib.to_dict(info),
            "num": request.num,
            "labels": drawn.labels.tolist(),
            "keep": keep_of(info, request),
            "sampling": config_lib.to_dict(info.sampling(request.sampling)),
            "steps": KINDS[info.kind].calls(info.architecture, plan),
            "seed": request.seed,
            "batch_size": request.batch_size,
            "compute": config_lib.to_dict(compute),
            "slots": plan.slots,
            "measured": _measured(drawn),
            **made_by,
        }
        write_json(out / "protocol.json", protocol)
        save_png(out / "samples.png", _picture(list(drawn.images), names))
        if show_cache:
            save_png(out / "cache.png", _picture(_dimmed(drawn.images, drawn.cache, info.architecture.grid), names))
            steps, used = np.arange(1, info.architecture.length + 1), drawn.cache.occupancy
            curves = {"slots, mean": (steps, used.mean(axis=0)), "slots, largest": (steps, used.max(axis=0))}
            title = f"{plan.slots} slots for {info.architecture.prefix + info.architecture.length} tokens"
            loss_curve(curves, out / "occupancy.png", title=title)
        (parts / CLAIM_NAME).unlink()  # first: parts without it are deleted by the next run
        remove_tree(parts)
        if drawn.cache is None:
            return done
        evicted, length = drawn.cache.overflows.mean(), info.architecture.length
        evictions = f"on average {evicted:.3g} of an image's {length} tokens were evicted from the KV cache"
        return f"{done}; {evictions}"


def read_tokenizer_config_of(info: GeneratorInfo, tokenizer: str | None) -> TokenizerConfig:
    """The config of a generator's tokenizer, by default the one that it was trained with.

    Raises:
      ValueError: no such tokenizer, or source recovery is needed and it has none.
    """
    config = read_tokenizer_config(info.tokenizer.name if tokenizer is None else tokenizer)
    if KINDS[info.kind].recovers and config.recovery is None:
        raise ValueError("a generator in random order needs a tokenizer with source recovery, and this one has none")
    return config


def plan_of(info: GeneratorInfo, request: Request, compute: Compute, *, show_cache: bool = False) -> DrawPlan:
    """The static part of the sampler; ValueError for what this generator cannot do."""
    kind, sampling, number = KINDS[info.kind], info.sampling(request.sampling), keep_of(info, request)
    plan, _ = kind.plan(info.architecture, sampling, number, steps=request.steps, compute=compute)
    if show_cache and not kind.compresses:
        raise ValueError("--show-cache: a generator in random order keeps every code")
    return plan


def _claim(parts: AnyPath, wanted: Mapping[str, Any]) -> None:
    """Checks that existing parts belong to these samples, or starts new ones; parts without a claim are deleted."""
    path, wanted = parts / CLAIM_NAME, config_lib.to_dict(wanted)
    if not path.exists():
        remove_tree(parts)
        write_json(path, wanted)
    elif differing := [name for name, value in wanted.items() if json.loads(path.read_text()).get(name) != value]:
        raise ValueError(
            f"{parts} holds unfinished samples with another {', '.join(differing)}: give the same settings to resume "
            "them, choose another --out, or delete the folder"
        )


def labels_of(info: GeneratorInfo, request: Request) -> Int[np.ndarray, "N"]:
    """The class of each image; ValueError for one that the generator does not know."""
    classes = [info.class_number(name) for name in request.classes] or range(info.architecture.num_classes)
    return np.resize(np.asarray(classes, np.int32), request.num)


def draw(
    model: GeneratorModel,
    tokenizer: Tokenizer,
    request: Request,
    labels: Int[np.ndarray, "N"],
    parts: AnyPath,
    stop: Stop,
) -> None:
    """Draws this process's batches that are not in `parts`; they have one size, so there is one program."""
    size = request.batch_size
    paths = _paths(parts, request.num, size)
    padded = np.resize(labels, len(paths) * size)
    mine = range(jax.process_index(), len(paths), jax.process_count())
    missing = [number for number in mine if not paths[number].exists()]
    shown = {"desc": "batches", "disable": None if jax.process_index() == 0 else True}
    for number in tqdm(missing, initial=len(mine) - len(missing), total=len(mine), **shown):
        stop.check()
        examples = np.arange(number * size, (number + 1) * size, dtype=np.int32)
        begin = time.perf_counter()
        images, cache = jax.device_get(draw_batch(model, tokenizer, request, padded[examples], examples))
        seconds = {"seconds": time.perf_counter() - begin, "compiled": number == missing[0]}
        with replacing(paths[number]) as new:
            np.savez(new, images=images, **({} if cache is None else cache._asdict()), **seconds)


def _paths(parts: AnyPath, num: int, size: int) -> list[AnyPath]:
    return [parts / f"{number:06d}.npz" for number in range(-(-num // size))]


def _joined(parts: AnyPath, labels: Int[np.ndarray, "N"], size: int) -> Drawn:
    whole: dict[str, np.ndarray] = {}
    timed = []
    for start, path in zip(range(0, len(labels), size), _paths(parts, len(labels), size), strict=True):
        with path.open("rb") as file, np.load(file) as arrays:
            timed.append((float(arrays["seconds"]), bool(arrays["compiled"])))
            for name in ("images", *(CacheUse._fields if "kept" in arrays else ())):
                part = arrays[name]
                if name not in whole:
                    whole[name] = np.empty((len(labels), *part.shape[1:]), part.dtype)
                whole[name][start : start + size] = part[: len(labels) - start]
    images = whole.pop("images")
    others = [seconds for seconds, compiled in timed if not compiled]
    return Drawn(
        images,
        labels,
        CacheUse(**whole) if whole else None,
        sum(seconds for seconds, _ in timed),
        sum(others) / (len(others) * size) if others else None,
    )


def draw_batch(
    model: GeneratorModel,
    tokenizer: Tokenizer,
    request: Request,
    labels: Int[np.ndarray, "B"],
    examples: Int[np.ndarray, "B"],
) -> tuple[UInt8[Array, "B H W 3"], CacheUse | None]:
    """The images of these examples, which do not depend on their batch."""
    kind, number = KINDS[model.info.kind], keep_of(model.info, request)
    how = {"sampling": request.sampling, "steps": request.steps, "seed": request.seed, "examples": examples}
    drawn = model.sample(labels, number, **how)
    return kind.images(tokenizer, drawn), kind.use(drawn)


def keep_of(info: GeneratorInfo, request: Request) -> int | None:
    """K of a request."""
    return info.architecture.usual_keep if request.keep is None else request.keep


def _measured(drawn: Drawn) -> dict[str, Any]:
    """Times, and what the KV cache did."""
    seconds = {
        "seconds": drawn.seconds,
        "seconds_per_image": drawn.seconds_per_image,  # without the batches that compiled
    }
    if (cache := drawn.cache) is None:
        return seconds
    return seconds | {
        "first_occurrences_mean": float(cache.first_occurrence.sum(axis=1).mean()),
        "slots_used_mean": float(cache.occupancy.mean()),
        "slots_used_most": int(cache.occupancy.max()),
        "overflows": int(cache.overflows.sum()),
        "images_with_overflow": int((cache.overflows > 0).sum()),
    }


def _dimmed(
    images: UInt8[np.ndarray, "N H W 3"], cache: CacheUse, grid: tuple[int, int]
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The images, with the tokens dimmed that are not in the KV cache at the end."""
    shown = zip(images[:MAX_SHOWN], cache.kept[:MAX_SHOWN], strict=True)
    return [dim_tokens(image, kept, grid=grid) for image, kept in shown]


def _picture(images: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    rows = [slice(start, start + COLUMNS) for start in range(0, min(len(images), MAX_SHOWN), COLUMNS)]
    scale = max(1, 128 // images[0].shape[0])
    return image_grid([images[row] for row in rows], captions=[names[row] for row in rows], scale=scale)
