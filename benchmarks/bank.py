"""A bank of concepts: one run of `tokenverse learn` for all images against one run for each; time, and quality.

python benchmarks/bank.py --out runs/bank

The images are the first of `tokenverse bench`. Either way is what a user would type, with the settings of
configs/tokenverse_tiny.py and no compiled programs on disk. The pictures of the isolation loss's pool are on disk after
the first run. Quality is the benchmark's: the same prompts and noise, drawn with either way's files.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime_jax.config import build, load
from runtime_jax.cost import table
from runtime_jax.estimate import estimate
from runtime_jax.pictures import save_png
from tokenverse_jax.bench.cases import ConceptImage, make_images
from tokenverse_jax.bench.rows import FULL
from tokenverse_jax.bench.run import Bench, BenchConfig
from tokenverse_jax.concepts.bank import load_concepts

SIZE = 64


def entry(image: ConceptImage, folder: Path) -> dict[str, Any]:
    """Writes the picture; what `images` of a config says of it."""
    path = folder / f"{image.number:03}.png"
    save_png(path, image.pixels(SIZE))
    return {"path": str(path), "captions": list(image.captions), "words": list(image.words)}


def learn(images: Sequence[dict[str, Any]], workdir: Path, pool: Path) -> float:
    """Seconds of a run that learns these images side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "tokenverse_jax.cli", "learn", "--config", "tokenverse_tiny"]
    options = ["--workdir", str(workdir), f"--config.cache={pool}", f"--config.images={images!r}"]
    start = time.perf_counter()
    subprocess.run([*command, *options], check=True, env=environment)
    return time.perf_counter() - start


def difference(one: Path, other: Path) -> float:
    """The largest difference of a word's offset, relative to its norm."""
    file = load_concepts(other)
    pairs = ((mine.offset, file.concept(mine.word).offset) for mine in load_concepts(one).concepts)
    return max(float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)) for mine, theirs in pairs)


def quality(files: Sequence[Path], out: Path) -> np.ndarray:
    """CP, PF and CP·PF of the benchmark's cases [cases, 3] with these files, one for each image."""
    config = build(BenchConfig, load("tokenverse_bench", [f"images={len(files)}", f"rows=('{FULL}',)"]))
    bench = Bench.open(config, out)
    for number, file in enumerate(files):
        copy = bench.files.concept(FULL, number)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    bench.draw([case for case in bench.cases if case.images])
    bench.measure()
    cases = [record["seeds"] for record in bench.files.records() if record["row"] == FULL]
    return np.asarray([[np.mean([seed[name] for seed in case]) for name in ("cp", "pf", "cp_pf")] for case in cases])


def main() -> None:
    """Prints the times, the largest difference of the offsets, and the table of quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bank"), help="a new folder")
    parser.add_argument("--images", type=int, default=16, help="a multiple of four")
    args = parser.parse_args()
    out = args.out
    entries = [entry(image, out / "images") for image in make_images(args.images, seed=0)]
    names = [Path(each["path"]).stem for each in entries]
    together = learn(entries, out / "together", out / "pool")
    alone = [learn([each], out / "alone" / name, out / "pool") for each, name in zip(entries, names, strict=True)]
    print(f"one run: {together:.0f} s; {len(alone)} runs: {sum(alone):.0f} s; ratio {together / sum(alone):.2f}")
    ways = {
        "in one run": [out / "together" / f"{name}.safetensors" for name in names],
        "in runs of their own": [out / "alone" / name / f"{name}.safetensors" for name in names],
    }
    largest = max(difference(*pair) for pair in zip(*ways.values(), strict=True))
    print(f"largest relative difference of an offset: {largest:.1e}")
    values = [quality(files, out / f"bench_{i}") for i, files in enumerate(ways.values())]
    rows = [(name, *map(str, map(estimate, own.T))) for name, own in zip(ways, values, strict=True)]
    rows.append(("difference", *map(str, map(estimate, (values[0] - values[1]).T))))
    print("\n".join(table(("learned", "CP", "PF", "CP·PF"), rows)))


if __name__ == "__main__":
    main()
