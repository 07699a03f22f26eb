"""`mergevq sample`: images of classes by a trained generator, and all that is needed to draw them again.

Axes: B batch, N images, H W image, L raster tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8
from tqdm import tqdm

from mergevq_jax.generator.model import GeneratorModel, codes_to_images, load_generator
from mergevq_jax.generator.plan import SamplingConfig, make_plan
from mergevq_jax.model_folder import write_json
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax import config as config_lib
from runtime_jax.compute import Compute
from runtime_jax.pictures import dim_tokens, image_grid, loss_curve, save_png

COLUMNS = 8
MAX_SHOWN = 64  # images in a picture


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for."""

    num: int = 64
    classes: tuple[str, ...] = ()  # names or numbers, in turn; none: all
    merge_number: int | None = None  # None: the middle one that the generator knows
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        if self.num < 1 or self.batch_size < 1:
            raise ValueError(f"--num {self.num} and --batch-size {self.batch_size}: at least 1")


@dataclass(frozen=True)
class Drawn:
    """Images, and what the sampler's store did for each."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, "N"]
    first_occurrence: Bool[np.ndarray, "N L"]
    occupancy: Int[np.ndarray, "N L"]  # slots
    overflows: Int[np.ndarray, "N"]
    seconds: tuple[float, ...]  # of each batch; the first compiles


def sample(
    source: str,
    request: Request,
    *,
    out: Path,
    tokenizer: str | None = None,
    compute: Compute = Compute(),
    show_cache: bool = False,
) -> str:
    """Writes samples.png, samples.npz and protocol.json, with `show_cache` cache.png and occupancy.png; a summary line.

    samples.npz is in ADM's layout: arr_0 uint8 [N, H, W, 3], and arr_1 int [N], the labels.

    Raises:
      ValueError: no such generator, tokenizer or class, or settings that are not possible; before anything is compiled.
    """
    model = load_generator(source, compute=compute)
    loaded = model.load_tokenizer(tokenizer)
    merge_number = _merge_number(model, request)
    settings = model.info.sampling(request.sampling)
    plan, _ = make_plan(model.config, settings, merge_number, compute)
    drawn = draw(model, loaded, request)
    names = [_class_name(model, label) for label in drawn.labels.tolist()]

    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", drawn.images, drawn.labels)
    protocol = {
        "model": source,
        "generator": config_lib.to_dict(model.info),
        "num": request.num,
        "labels": drawn.labels.tolist(),
        "merge_number": merge_number,
        "sampling": config_lib.to_dict(settings),
        "seed": request.seed,
        "batch_size": request.batch_size,
        "compute": config_lib.to_dict(compute),
        "slots": plan.slots,
        "measured": _measured(drawn),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    write_json(out / "protocol.json", protocol)
    save_png(out / "samples.png", _picture(list(drawn.images), names))
    if show_cache:
        save_png(out / "cache.png", _picture(_dimmed(drawn, model.config.grid), names))
        steps, used = np.arange(1, model.config.length + 1), drawn.occupancy
        curves = {"slots, mean": (steps, used.mean(axis=0)), "slots, largest": (steps, used.max(axis=0))}
        title = f"{plan.slots} slots for {model.config.prefix + model.config.length} tokens"
        loss_curve(curves, out / "occupancy.png", title=title)
    return f"{request.num} images are in {out}; the store overflowed {drawn.overflows.sum()} times"


def draw(model: GeneratorModel, tokenizer: Tokenizer, request: Request) -> Drawn:
    """The images; every batch is of one size, so that there is one program."""
    merge_number, size = _merge_number(model, request), request.batch_size
    classes = [model.class_number(name) for name in request.classes] or range(model.config.num_classes)
    batches = -(-request.num // size)
    labels = np.resize(np.asarray(classes, np.int32), batches * size)
    parts: list[tuple[np.ndarray, ...]] = []
    seconds = []
    for start in tqdm(range(0, len(labels), size), desc="batches", disable=None):
        begin = time.perf_counter()
        samples = model.sample(
            labels[start : start + size],
            merge_number,
            sampling=request.sampling,
            seed=request.seed,
            examples=np.arange(start, start + size, dtype=np.int32),
        )
        images = codes_to_images(tokenizer, samples.indices)
        parts.append(jax.device_get((images, samples.first_occurrence, samples.occupancy, samples.overflows)))
        seconds.append(time.perf_counter() - begin)
    images, first, occupancy, overflows = (np.concatenate(part)[: request.num] for part in zip(*parts, strict=True))
    return Drawn(images, labels[: request.num], first, occupancy, overflows, tuple(seconds))


def _merge_number(model: GeneratorModel, request: Request) -> int | None:
    known = model.config.merge_numbers
    if request.merge_number is None and model.config.merge_instruction:
        return known[len(known) // 2]
    return request.merge_number


def _class_name(model: GeneratorModel, label: int) -> str:
    return model.info.classes[label] if model.info.classes else str(label)


def _measured(drawn: Drawn) -> dict[str, Any]:
    """What the store did, and how long it took."""
    return {
        "first_occurrences_mean": float(drawn.first_occurrence.sum(axis=1).mean()),
        "slots_used_mean": float(drawn.occupancy.mean()),
        "slots_used_most": int(drawn.occupancy.max()),
        "overflows": int(drawn.overflows.sum()),
        "images_with_overflow": int((drawn.overflows > 0).sum()),
        "seconds_of_first_batch": drawn.seconds[0],  # compiles
        "seconds_of_other_batches": sum(drawn.seconds[1:]),
    }


def _dimmed(drawn: Drawn, grid: tuple[int, int]) -> list[np.ndarray]:
    """The images with the tokens that the store forgot dimmed."""
    shown = zip(drawn.images[:MAX_SHOWN], drawn.first_occurrence, strict=False)
    return [dim_tokens(image, kept, grid=grid) for image, kept in shown]


def _picture(images: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    rows = [slice(start, start + COLUMNS) for start in range(0, min(len(images), MAX_SHOWN), COLUMNS)]
    scale = max(1, 128 // images[0].shape[0])
    return image_grid([images[row] for row in rows], captions=[names[row] for row in rows], scale=scale)
