"""The report of an evaluation: table.md, results.json, images.png, and requests.jsonl for a judge outside."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from runtime_jax.data import center_crop
from runtime_jax.files import AnyPath, write_json, write_text
from runtime_jax.pictures import image_grid, save_png
from tokenverse_jax.evaluate.benchmark import Benchmark
from tokenverse_jax.evaluate.draw import Job
from tokenverse_jax.evaluate.items import units
from tokenverse_jax.evaluate.requests import make_requests
from tokenverse_jax.evaluate.samples import Samples
from tokenverse_jax.evaluate.table import Record, markdown, summarize, to_json

FORMAT = "tokenverse-evaluation"
FORMAT_VERSION = 1
ROWS, SIDE = 8, 128  # rows of images.png, of images' prompts and of each task, and their images' side
Image = UInt8[np.ndarray, "H W 3"]


class Section(NamedTuple):
    """One way of scoring: the figures of each image, and what they were computed with."""

    title: str
    figures: Sequence[Mapping[str, float]]
    protocol: Mapping[str, Any]


def write_report(
    folder: AnyPath,
    benchmark: Benchmark,
    jobs: Sequence[Job],
    samples: Samples,
    sections: Sequence[Section],
    protocol: Mapping[str, Any],
) -> str:
    """Writes all files and returns the tables.

    Args:
      jobs: all images; of each a line of figures in every section.
      protocol: how the images were made.
    """
    requests = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in make_requests(jobs, benchmark))
    write_text(folder / "requests.jsonl", requests)
    items = [job.item for job in jobs]
    tables, results = [], {}
    for section in sections:
        each = zip(items, units(items), section.figures, strict=True)
        records = [Record(item.task, unit, item.prompt_number, figures) for item, unit, figures in each]
        summary = summarize(records)
        tables.append(markdown(section.title, summary))
        results[section.title] = {"protocol": section.protocol, "means": to_json(summary)}
    text = "\n".join(tables)
    write_text(folder / "table.md", text)
    tasks = list(dict.fromkeys(item.task for item in items))
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **protocol,
        "counts": {
            "images": len(benchmark.pictures),
            "prompts": len({item.number for item in items}),
            "drawn": len(jobs),
            "drawn_by_task": {task: sum(item.task == task for item in items) for task in tasks},
        },
        "drawn_sha256": _digest(jobs, samples),
        "requests_sha256": hashlib.sha256(requests.encode()).hexdigest(),
        "interval": "95 %, Student's t over units: images, or in tasks groups of prompts that share images",
        "sections": results,
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "pillow")},
    }
    write_json(folder / "results.json", fields)
    save_png(folder / "images.png", _picture(benchmark, jobs, samples))
    return text


def _digest(jobs: Sequence[Job], samples: Samples) -> str:
    digest = hashlib.sha256()
    for job in jobs:
        digest.update(samples.pixels(job.item, job.image).tobytes())
    return digest.hexdigest()


def _picture(benchmark: Benchmark, jobs: Sequence[Job], samples: Samples) -> Image:
    """The first images of each prompt: a row for each image of the benchmark, then one for each prompt of a task."""
    rows: dict[tuple, tuple[list[Image], list[str]]] = {}
    for job in jobs:
        item = job.item
        key = (item.task, item.images if item.prompt_number is not None else item.number)
        if job.image or (key not in rows and sum(other[0] == item.task for other in rows) == ROWS):
            continue
        if key not in rows:
            uses = list(dict.fromkeys((use.image, use.word) for use in item.uses))
            rows[key] = [benchmark.reference(*use) for use in uses], [word for _, word in uses]
        rows[key][0].append(samples.pixels(item, 0))
        rows[key][1].append(item.prompt)
    side = min(samples.pixels(jobs[0].item, 0).shape[0], SIDE)
    shown = [[center_crop(image, side) for image in images] for images, _ in rows.values()]
    return image_grid(
        shown, row_labels=[task for task, _ in rows], captions=[texts for _, texts in rows.values()], scale=SIDE // side
    )
