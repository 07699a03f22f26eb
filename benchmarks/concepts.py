"""Two studies of the concepts that `tokenverse bench` has learned: four at once, and parallel attention keys.

python benchmarks/concepts.py --bench runs/bench --out runs/concepts

four at once    four concepts of four images in one prompt of two pictures side by side, which the tiny base knows from
                the isolation loss's kind of captions; each half is measured as a case of the benchmark.
parallel keys   whether the cosine that `tokenverse concepts inspect` gives of two concepts tells how they get on.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from runtime_jax.config import build
from runtime_jax.data.mini_scenes import render_scene
from runtime_jax.estimate import estimate
from runtime_jax.judge import Judge
from runtime_jax.pictures import image_grid, save_png
from runtime_jax.prng import Stream, host_rng
from runtime_jax.sizes import table
from tokenverse_jax.bank import Concept, load
from tokenverse_jax.base.corpus import PAIR
from tokenverse_jax.bench.cases import Case, ConceptImage, Use, make_cases, make_images, make_pair
from tokenverse_jax.bench.metrics import View, measure
from tokenverse_jax.bench.rows import FULL
from tokenverse_jax.bench.run import BenchConfig
from tokenverse_jax.bench.workdir import Workdir
from tokenverse_jax.compose import compose, place_stored
from tokenverse_jax.concept_data import encode_prompts
from tokenverse_jax.inspect_bank import compiled_keys, cosine_in_prompt
from tokenverse_jax.pipeline import Pipeline, PromptEncoding


class Bench:
    """What a finished benchmark left, and what it was made with."""

    def __init__(self, folder: Path):
        record = json.loads((folder / "config.json").read_text())
        self.config = build(BenchConfig, {key: record[key] for key in record if key not in ("weights", "judge")})
        self.files = Workdir(folder, record)
        self.images = make_images(self.config.images, self.config.seed)
        self.cases = make_cases(self.images, self.config.seed)
        self.pipeline, self.judge = Pipeline.from_pretrained(self.config.model), Judge.load()

    def concept(self, image: int, word: str) -> Concept:
        """A word of an image, learned with the full method."""
        return load(self.files.concept(FULL, image), base_hash=self.pipeline.base_hash()).concept(word)

    def draw(self, prompt: str, number: int, uses: list[Use], strength: float) -> np.ndarray:
        """Images of two pictures side by side, [seeds, size, 2 size, 3], with concepts in the order of the prompt."""
        config, pipe = self.config, self.pipeline
        seen: dict[str, int] = {}
        placed = []
        for use in uses:
            word = use.target.split("#")[0]
            seen[word] = seen.get(word, 0) + 1
            concept, target = self.concept(use.image, use.word), f"{word}#{seen[word]}"
            placed.append(place_stored(concept, pipe.tokenizer_2, prompt, target, strength))
        composed = compose(placed, pipe.text_length)
        repeat = lambda array: jnp.asarray(np.repeat(np.asarray(array), config.seeds, axis=0))  # noqa: E731
        images = pipe.generate(
            PromptEncoding(*map(repeat, encode_prompts(pipe, [prompt]))),
            height=config.size,
            width=2 * config.size,
            seed=config.seed,
            indices=number * config.seeds + np.arange(config.seeds),
            offsets=repeat(composed.offsets[None]),
            block_offsets=repeat(composed.block_offsets[None]),
            blocks=composed.blocks,
            **vars(config.sampling),
        )
        return np.asarray(images)


def four_at_once(bench: Bench, out: Path) -> Iterator[str]:
    """A table of CP, PF and CP·PF with and without the four; writes a picture of the first seed of every prompt."""
    rows: dict[str, list[list[float]]] = {"without": [], "with four": []}
    size, columns = bench.config.size, []
    for number in range(0, len(bench.images) // 2, 4):
        group = bench.images[len(bench.images) // 2 + number :][:4]
        halves = _halves(group, number)
        prompt = PAIR.format(left=halves[0].prompt, right=halves[1].prompt)
        uses = [use for half in halves for use in half.uses]
        drawn = {name: bench.draw(prompt, number, uses, float(name != "without")) for name in rows}
        for name, images in drawn.items():
            measured = []
            for place, half in enumerate(halves):
                views, base = (
                    [View(*pair) for pair in zip(part, bench.judge.look(part), strict=True)]
                    for part in (each[:, :, place * size :][:, :, :size].copy() for each in (images, drawn["without"]))
                )
                found = [measure(half, *pair) for pair in zip(views, base, strict=True)]
                measured.append([np.mean([getattr(m, field) for m in found]) for field in ("cp", "pf", "cp_pf")])
            rows[name].append([*np.mean(measured, axis=0), measured[0][0], measured[1][0]])
        sources = [render_scene(image.scene, size).image for image in group]
        columns.append([np.hstack(sources[:2]), np.hstack(sources[2:]), *(images[0] for images in drawn.values())])
    labels = ["left from", "right from", *rows]
    save_png(out / "four.png", image_grid(list(map(list, zip(*columns, strict=True))), row_labels=labels, scale=1))
    head = ("four at once", "CP", "PF", "CP·PF", "CP, left picture", "CP, right picture")
    yield from table(head, [(name, *map(str, map(estimate, np.transpose(row)))) for name, row in rows.items()])


def _halves(group: list[ConceptImage], number: int) -> list[Case]:
    """Two prompts with the first objects of two images each."""
    rng = host_rng(0, Stream.EVAL, 7, number)
    halves = [make_pair(rng, group[0], group[1]), make_pair(rng, group[2], group[3])]
    return [dataclasses.replace(half, prompt=half.prompt.replace(" to the left of ", " and ")) for half in halves]


def parallel_keys(bench: Bench) -> Iterator[str]:
    """Tables by fifths of the cosine, of all cases with two objects that have a concept."""
    measured = {(r["task"], r["case"]): r["seeds"] for r in bench.files.records() if r["row"] == FULL}
    keys, found = compiled_keys(bench.pipeline), []
    for case in bench.cases:
        if len(case.uses) != 2 or any(use.place is None for use in case.uses):
            continue
        placed = [
            place_stored(bench.concept(use.image, use.word), bench.pipeline.tokenizer_2, case.prompt, use.target)
            for use in case.uses
        ]
        _, cosine = cosine_in_prompt(bench.pipeline, keys, case.prompt, placed)
        seeds = measured[case.task, case.number]
        bleeding = [one["bleeding"] for one in seeds if one["bleeding"] is not None]
        if bleeding:
            found.append((cosine, np.mean([one["cp"] for one in seeds]), np.mean(bleeding)))
    values = np.asarray(sorted(found))
    lines = [
        (f"{part[0, 0]:.2f} to {part[-1, 0]:.2f}", str(len(part)), *map(str, map(estimate, part[:, 1:].T)))
        for part in np.array_split(values, 5)
    ]
    yield from table(("cosine of the keys", "cases", "CP", "bleeding"), lines)
    for name, column in (("CP", 1), ("bleeding", 2)):
        rank = spearmanr(values[:, 0], values[:, column])
        yield f"rank correlation of the cosine with {name}: {rank.statistic:.2f} (p = {rank.pvalue:.1g})"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("runs/bench"), help="workdir of a finished benchmark")
    parser.add_argument("--out", type=Path, default=Path("runs/concepts"))
    args = parser.parse_args()
    bench = Bench(args.bench)
    print("\n".join([*four_at_once(bench, args.out), "", *parallel_keys(bench)]))


if __name__ == "__main__":
    main()
