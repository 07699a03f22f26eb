"""From each image's figures to tables: means over independent units, with 95 % intervals.

Images of one unit share concepts, so they are averaged first (`items.units`). CP·PF is the product of the means, as the
paper and DreamBench++ have it; its interval is that of the linearised product.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime_jax.estimate import Estimate, estimate

ALL = "all images"  # of every category, without the tasks
PRODUCT = "CP·PF"
# DreamBench++'s kinds of prompts, by their numbers, of nine.
KINDS = {"photorealistic": range(4), "style transfer": range(4, 7), "imaginative": range(7, 9)}
PROMPTS = 9


class Record(NamedTuple):
    """The figures of one drawn image; `prompt_number`: of its image's prompts, None in a task."""

    task: str
    unit: int
    prompt_number: int | None
    figures: Mapping[str, float]


def summarize(records: Sequence[Record]) -> dict[str, dict[str, Estimate]]:
    """By task, then by figure: the categories, all of them, kinds of prompts if each image has nine, and the tasks."""
    own = [record for record in records if record.prompt_number is not None]
    tasks: dict[str, list[Record]] = {}
    for record in own:
        tasks.setdefault(record.task, []).append(record)
    if len(tasks) > 1:
        tasks[ALL] = own
    if {record.prompt_number for record in own} == set(range(PROMPTS)):
        for kind, numbers in KINDS.items():
            tasks[f"prompts: {kind}"] = [record for record in own if record.prompt_number in numbers]
    for record in records:
        if record.prompt_number is None:
            tasks.setdefault(record.task, []).append(record)
    return {task: _estimates(some) for task, some in tasks.items()}


def _estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    units: dict[int, list[Mapping[str, float]]] = {}
    for record in records:
        units.setdefault(record.unit, []).append(record.figures)
    names = list(records[0].figures)
    means = {
        name: np.asarray([np.mean([figures[name] for figures in own]) for own in units.values()]) for name in names
    }
    found = {name: estimate(values) for name, values in means.items()}
    if {"CP", "PF"} <= found.keys():
        cp, pf = found["CP"].mean, found["PF"].mean
        found[PRODUCT] = estimate(means["CP"] * pf + means["PF"] * cp - cp * pf)
    return found


def markdown(title: str, summary: Mapping[str, Mapping[str, Estimate]]) -> str:
    """A table with a row for each task."""
    names = list(next(iter(summary.values())))
    lines = [f"### {title}", "", f"| task | units | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for task, found in summary.items():
        cells = [f"{found[name]:.3f}" for name in names]
        lines.append(f"| {task} | {found[names[0]].count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def to_json(summary: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """The same for results.json; an unknown half width is null."""

    def fields(value: Estimate) -> dict[str, Any]:
        half = value.half_width
        return {"mean": value.mean, "half_width": half if np.isfinite(half) else None, "units": value.count}

    return {task: {name: fields(value) for name, value in found.items()} for task, found in summary.items()}
