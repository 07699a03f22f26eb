"""What the parts of MergeVQ give, in miniature: variants trained with several seeds, measured, and written up.

python benchmarks/ablation.py --teacher runs/teacher/teacher --out runs/ablation     # resumes where it was stopped

Trains each variant of configs/mergevq_ablation.py with each seed, then measures reconstructions (`mergevq evaluate
reconstruction`) and features (`mergevq evaluate representation`) at each K, on test scenes of one object. The figures
of a variant stay in --out as VARIANT.json, and are not measured again. Writes tables and plots of all variants that
have some into --out: ablation.md, ablation.png and differences.png. With --variants and no name, it writes just these.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergevq_jax.cli import training
from mergevq_jax.commands.evaluate import reconstruction, representation
from mergevq_jax.commands.evaluate.reconstruction_task import RECOVERED, TRUE
from mergevq_jax.evaluate.representation.encoders import CLASS, MEAN
from mergevq_jax.evaluate.representation.rows import LINEAR, RepresentationConfig
from mergevq_jax.evaluate.results import RESULTS_NAME
from mergevq_jax.tokenizer.run import MODEL_FOLDER, TrainConfig, train
from runtime_jax.config import build, load
from runtime_jax.cost import table
from runtime_jax.data import SourceConfig
from runtime_jax.estimate import Estimate, estimate
from runtime_jax.files import write_json, write_text
from runtime_jax.networks.dinov2 import load_dinov2
from runtime_jax.pictures import Points, plot_intervals, plot_lines
from runtime_jax.weights.fingerprint import fingerprint

VARIANTS = {
    "g": "G",
    "gr": "G+R",
    "r": "R",
    "gr-unaligned": "G+R without alignment",
    "r-unaligned": "R without alignment",
    "gr-unmerged": "G+R without merging (K = L)",
    "gr-fixed": "G+R with one K in training",
    "gr-unplaced": "G+R with the released source recovery",
}
SCENES = "mini_scenes/64_probe"
NUM_REBUILT = 1024  # test scenes that are reconstructed
POOLINGS = (CLASS, MEAN)
PLOTTED = ("g", "gr", "r", "gr-unaligned", "r-unaligned")
QUANTITIES = {"psnr": "PSNR, dB", "recovered": "PSNR with recovered maps, dB"}  # with the true maps, and without
QUANTITIES |= {pooling: f"linear probe, {pooling}, %" for pooling in POOLINGS}
Cell = dict[str, tuple[float, ...]]  # by quantity: the figures of a variant at one K, one for each seed


class Trend(NamedTuple):
    """What the report compares: each side is a variant and its K."""

    cause: str
    one: tuple[str, int]
    other: tuple[str, int]


TRENDS = (
    Trend("fewer kept tokens", ("g", 64), ("g", 256)),
    Trend("fewer kept tokens", ("gr", 36), ("gr", 64)),
    Trend("fewer kept tokens", ("r", 9), ("r", 64)),
    Trend("merging in training", ("gr", 64), ("gr-unmerged", 64)),
    Trend("merging in training", ("gr-fixed", 64), ("gr-unmerged", 64)),
    Trend("alignment", ("gr", 36), ("gr-unaligned", 36)),
    Trend("alignment", ("r", 9), ("r-unaligned", 9)),
    Trend("source recovery with positions", ("gr", 36), ("gr-unplaced", 36)),
    Trend("several K in training", ("gr", 36), ("gr-fixed", 36)),
    Trend("several K in training", ("gr", 25), ("gr-fixed", 25)),
    Trend("several K in training", ("gr", 64), ("gr-fixed", 64)),
    Trend("variant, all tokens", ("gr", 64), ("g", 256)),
    Trend("variant, all tokens", ("r", 64), ("g", 256)),
    Trend("variant, the paper's K", ("gr", 36), ("g", 64)),
    Trend("variant, the paper's K", ("r", 9), ("g", 64)),
)


@dataclass(frozen=True)
class Measured:
    """Figures of one variant by K, and of what the probe is compared with."""

    raw: int  # tokens
    cells: dict[int, Cell]
    others: dict[tuple[str, str, str], float]  # accuracy of teacher, random weights and pixels, %: by name, K, pooling

    @classmethod
    def load(cls, path: Path) -> "Measured":
        """The inverse of `save`."""
        fields = json.loads(path.read_text())
        cells = {int(keep): {name: tuple(of) for name, of in cell.items()} for keep, cell in fields["cells"].items()}
        return cls(fields["raw"], cells, {tuple(key): value for *key, value in fields["others"]})

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        others = [[*key, value] for key, value in self.others.items()]
        write_json(path, {"raw": self.raw, "cells": self.cells, "others": others})

    @classmethod
    def read(cls, pixels: Path, features: Path, tokenizers: Sequence[str], config: TrainConfig) -> "Measured":
        """From the folders of both evaluations, over the tokenizers of all seeds."""
        rebuilt, probed = _entries(pixels), _entries(features)
        psnr = {(row["tokenizer"], row["keep"], row["source_map"]): row["psnr"]["mean"] for row in rebuilt}
        accuracy = {(row["name"], row["keep"], row["pooling"]): row[LINEAR]["mean"] for row in probed}
        found = {"psnr": (psnr, TRUE), "recovered": (psnr, RECOVERED)}
        found |= {pooling: (accuracy, pooling) for pooling in POOLINGS}

        def cell(keep: int) -> Cell:
            return {name: tuple(of[each, keep, key] for each in tokenizers) for name, (of, key) in found.items()}

        others = {
            (Path(row["name"]).name, str(row["keep"] or "-"), row["pooling"]): row[LINEAR]["mean"]
            for row in probed
            if row["name"] not in tokenizers
        }
        return cls(config.model.raw_tokens, {keep: cell(keep) for keep in config.evaluation.keeps}, others)


def _entries(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / RESULTS_NAME).read_text())["results"]


def measure(variant: str, seeds: int, *, teacher: str, out: Path, steps: int | None, data_dir: str) -> Measured:
    """The figures of a variant; trains and measures what is missing."""
    path = out / f"{variant}.json"
    if path.exists():
        return Measured.load(path)
    folders = []
    for seed in range(seeds):
        workdir = out / variant / f"seed_{seed}"
        config = read_config(variant, seed, teacher=teacher, steps=steps, data_dir=data_dir)
        if train(config, workdir).stopped_by is not None:
            raise SystemExit("stopped; the same command goes on from there")
        folders.append(str(workdir / MODEL_FOLDER))
    keeps = config.evaluation.keeps
    pixels, features = out / variant / "reconstruction", out / variant / "representation"
    scenes = SourceConfig(kind="tfds", name=SCENES, data_dir=data_dir)
    test = replace(scenes, split="test")
    rebuilt = reconstruction.Request(tokenizers=tuple(folders), keeps=keeps, source=test, num_images=NUM_REBUILT)
    reconstruction.evaluate(rebuilt, out=pixels)
    request = representation.Request(
        tokenizers=tuple(folders),
        teachers=(teacher,),
        train=replace(scenes, split="train"),
        test=test,
        methods=(LINEAR,),
        keeps=keeps,
        poolings=POOLINGS,
        seeds=1,
        config=build(RepresentationConfig, load("representation")),
    )
    representation.evaluate(request, out=features)
    found = Measured.read(pixels, features, folders, config)
    found.save(path)
    return found


def check_same(out: Path, teacher: str, steps: int | None, seeds: int | None) -> tuple[int | None, int]:
    """Steps and seeds of the ablation in `out`, or, where there is none, of this one, which is then the one in `out`.

    Raises ValueError if there is one with another teacher (given by its fingerprint), other steps or other seeds.
    """
    path = out / "ablation.json"
    if not path.exists():
        write_json(path, {"teacher": teacher, "steps": steps, "seeds": seeds or 3})
    there = json.loads(path.read_text())
    wanted = {"teacher": teacher, "steps": steps or there["steps"], "seeds": seeds or there["seeds"]}
    if there != wanted:
        raise ValueError(f"{out} holds an ablation with {there}, this one has {wanted}: choose another --out")
    return there["steps"], there["seeds"]


def read_config(variant: str, seed: int, *, teacher: str, steps: int | None, data_dir: str) -> TrainConfig:
    """The training of a variant; `steps`: None: the config's."""
    settings = [f"seed={seed}", f"data.seed={seed}", f"teacher={teacher}", f"data.sources.0.data_dir={data_dir}"]
    settings.append(f"evaluation.data.sources.0.data_dir={data_dir}")
    if steps is not None:
        settings += [f"{name}={steps}" for name in ("loop.duration.steps", "loop.eval_every", "loop.preview_every")]
        settings += [f"losses.discriminator_start={3 * steps // 4}", f"optimizer.warmup.steps={steps // 30}"]
    return training(f"mergevq_ablation:{variant}", settings)[0]


def _estimate(values: Sequence[float]) -> Estimate:
    return estimate(values, independent=len(values) > 1)


def _shown(quantity: str, value: Estimate) -> str:
    return f"{value:.1f}" if quantity in POOLINGS else f"{value:.2f}"


def report(measured: dict[str, Measured]) -> str:
    """The tables in Markdown: figures, differences with the same seeds, and what the probe is compared with."""
    head = ("variant", "kept", "of all, %", *QUANTITIES.values())
    rows = []
    for variant, found in measured.items():
        for keep, cell in found.cells.items():
            figures = [_shown(name, _estimate(values)) for name, values in cell.items()]
            rows.append((VARIANTS[variant], str(keep), f"{100 * keep / found.raw:.0f}", *figures))
    head_of_trends = ("what differs", "of", "less", *QUANTITIES.values())
    trends = [
        (
            trend.cause,
            *(f"{VARIANTS[variant]}, K = {keep}" for variant, keep in (trend.one, trend.other)),
            *("+" * (gain.mean > 0) + _shown(name, gain) for name, gain in gains.items()),
        )
        for trend, gains in differences(measured).items()
    ]
    others = {}  # the same for all variants, or for those with the same networks
    for variant, found in measured.items():
        for (name, keep, pooling), value in found.others.items():
            size = "-" if keep == "-" else VARIANTS[variant.partition("-")[0]]
            others[size, name, keep, pooling] = f"{value:.1f}"
    head_of_others = ("variant", "compared with", "kept", "tokens", "linear probe, %")
    compared = table(head_of_others, [(*key, value) for key, value in others.items()])
    return "\n".join([*table(head, rows), "", *table(head_of_trends, trends), "", *compared]) + "\n"


def differences(measured: dict[str, Measured]) -> dict[Trend, dict[str, Estimate]]:
    """What each of TRENDS that is measured makes of every quantity, from trainings with the same seeds."""
    found = {}
    for trend in TRENDS:
        if trend.one[0] in measured and trend.other[0] in measured:
            one, other = (measured[variant].cells[keep] for variant, keep in (trend.one, trend.other))
            found[trend] = {name: _estimate(np.subtract(one[name], other[name])) for name in QUANTITIES}
    return found


def interval_panels(found: dict[Trend, dict[str, Estimate]]) -> dict[str, dict[str, tuple[float, float]]]:
    """The differences of every quantity, for `plot_intervals`."""
    rows: dict[str, dict[str, tuple[float, float]]] = {label: {} for label in QUANTITIES.values()}
    for trend, gains in found.items():
        sides = [f"{VARIANTS[variant]} {keep}" for variant, keep in (trend.one, trend.other)]
        for name, gain in gains.items():
            rows[QUANTITIES[name]][f"{trend.cause}: {sides[0]} - {sides[1]}"] = gain.mean, gain.half_width or np.nan
    return rows


def panels(measured: dict[str, Measured]) -> dict[str, dict[str, Points]]:
    """Every quantity against the share of kept tokens, a line for each of PLOTTED."""
    lines: dict[str, dict[str, Points]] = {label: {} for label in QUANTITIES.values()}
    for variant, found in ((variant, measured[variant]) for variant in PLOTTED if variant in measured):
        share = [100 * keep / found.raw for keep in found.cells]
        for name, label in QUANTITIES.items():
            values = [_estimate(cell[name]) for cell in found.cells.values()]
            lines[label][VARIANTS[variant]] = Points(
                share, [value.mean for value in values], [value.half_width or np.nan for value in values]
            )
    return lines


def main() -> None:
    """Trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="DINOv2 folder of the alignment loss (docs/teacher.md); default: OUT/teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--variants", nargs="*", metavar="V", default=list(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, help="default: 3, or those of the ablation in --out")
    parser.add_argument("--steps", type=int, help="of each training (default: the config's, or those of --out)")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"no variants {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    teacher = args.teacher or str(args.out / "teacher")
    weights = fingerprint(load_dinov2(teacher)[1])
    steps, seeds = check_same(args.out, weights, args.steps, args.seeds)
    for variant in args.variants:
        measure(variant, seeds, teacher=teacher, out=args.out, steps=steps, data_dir=args.data_dir)
    paths = {variant: args.out / f"{variant}.json" for variant in VARIANTS}
    measured = {variant: Measured.load(path) for variant, path in paths.items() if path.exists()}
    text = report(measured)
    print(text)
    write_text(args.out / "ablation.md", text)
    plot_lines(panels(measured), args.out / "ablation.png", x_label="kept tokens, % of all")
    plot_intervals(interval_panels(differences(measured)), args.out / "differences.png", x_label="difference")


if __name__ == "__main__":
    main()
