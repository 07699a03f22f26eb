"""From measurements to tables: means over independent units, with 95 % intervals.

Seeds and cases of one unit share concept images, so they are averaged first; the unit is what counts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime_jax.estimate import Estimate, estimate

# A line of measurements.jsonl: row, task, unit, case, and under "seeds" the fields of a `Measurement` for each seed.
Record = Mapping[str, Any]
FIGURES = {
    "cp": "CP",
    "pf": "PF",
    "cp_pf": "CP·PF",
    "locality": "locality",
    "inside": "change inside",
    "outside": "outside",
    "bleeding": "bleeding",
    "reached": "reached",
    "kept": "kept",
    "light": "light kept",
}
LEVELS = ("inside", "outside")  # figures in levels of 255, the others are shares


class Figures(NamedTuple):
    """Of one row in one task."""

    means: dict[str, Estimate | None]  # by name in FIGURES; None: no image has it
    parts: dict[str, Estimate]  # of CP and of what is reached, by the head of their column
    against: Estimate | None  # CP·PF minus the reference row's, unit by unit


def complete(records: Sequence[Record]) -> list[Record]:
    """The records of cases that all rows of their task have, so that rows can be compared."""
    cases: dict[tuple[str, int], set[str]] = {}
    tasks: dict[str, set[str]] = {}
    for record in records:
        cases.setdefault((record["task"], record["case"]), set()).add(record["row"])
        tasks.setdefault(record["task"], set()).add(record["row"])
    return [record for record in records if cases[record["task"], record["case"]] == tasks[record["task"]]]


def summarize(records: Sequence[Record], reference: str) -> dict[str, dict[str, Figures]]:
    """Figures by task and row, in the order of the records, see `complete`; `reference`: the row to compare with."""
    tasks: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        tasks.setdefault(record["task"], {}).setdefault(record["row"], []).append(record)
    return {
        task: {row: _figures(own, rows.get(reference) if row != reference else None) for row, own in rows.items()}
        for task, rows in tasks.items()
    }


def _figures(records: Sequence[Record], reference: Sequence[Record] | None) -> Figures:
    means = {name: _estimate(_by_unit(records, lambda measured, name=name: measured[name])) for name in FIGURES}
    kinds = sorted({kind for record in records for measured in record["seeds"] for kind in measured["parts"]})
    parts = {kind: _estimate(_by_unit(records, lambda m, kind=kind: m["parts"].get(kind))) for kind in kinds}
    against = None
    if reference:
        mine, other = (_by_unit(some, lambda measured: measured["cp_pf"]) for some in (records, reference))
        against = estimate([mine[unit] - other[unit] for unit in mine])
    return Figures(means, parts, against)


def _by_unit(records: Sequence[Record], value: Callable[[Mapping], float | None]) -> dict[int, float]:
    """The mean of each unit over the images that have the value."""
    values: dict[int, list[float]] = {}
    for record in records:
        numbers = [number for number in map(value, record["seeds"]) if number is not None]
        values.setdefault(record["unit"], []).extend(numbers)
    return {unit: float(np.mean(numbers)) for unit, numbers in values.items() if numbers}


def _estimate(by_unit: Mapping[int, float]) -> Estimate | None:
    return estimate(list(by_unit.values())) if by_unit else None


def markdown(records: Sequence[Record], rows: Sequence[str], reference: str) -> str:
    """A table for each task, in the order of `rows`; see `summarize`."""
    texts = []
    for task, found in summarize(records, reference).items():
        summary = {row: found[row] for row in rows if row in found}
        shown = [name for name in FIGURES if any(figures.means[name] for figures in summary.values())]
        kinds = sorted({kind for figures in summary.values() for kind in figures.parts})
        compared = any(figures.against for figures in summary.values())
        head = ["row", *(FIGURES[name] for name in shown)]
        head += [f"CP·PF less that of {reference}"] * compared + kinds
        units = max(figures.means["cp"].count for figures in summary.values())
        lines = [f"### {task} ({units} independent units)", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row, figures in summary.items():
            cells = [row, *(_cell(figures.means[name], levels=name in LEVELS) for name in shown)]
            cells += [_cell(figures.against, signed=True)] * compared
            cells += ["-" if kind not in figures.parts else f"{figures.parts[kind].mean:.2f}" for kind in kinds]
            lines.append(f"| {' | '.join(cells)} |")
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def _cell(value: Estimate | None, *, levels: bool = False, signed: bool = False) -> str:
    if value is None:
        return "-"
    digits = 1 if levels else 3
    return f"{value.mean:{'+' if signed else ''}.{digits}f} ± {value.half_width:.{digits}f}"
