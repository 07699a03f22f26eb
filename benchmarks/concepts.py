"""Three studies of concepts learned by `tokenverse bench`: four in one prompt, parallel attention keys, joint learning.

python benchmarks/concepts.py --bench runs/bench --out runs/concepts

four at once    One prompt asks for two pictures side by side, with four concepts from four images. The tiny base model
                knows such prompts: they have the form of the isolation loss's captions. Each half is measured as a
                benchmark case. Two sets of concepts are compared: those of the benchmark, learned from images alone,
                and others learned on either side of an image that the base model made (`IsolationConfig.sides` and
                `own_weight`), which takes a quarter of a minute each.
parallel keys   Does the cosine that `tokenverse concepts inspect` prints for two concepts predict how well they work in
                one image?
joint learning  The pairs with the most parallel keys, learned again: both images in one run of as many examples
                (`LearnRunConfig.words`), where half of the isolation loss's pairs are of the two images themselves
                (`IsolationConfig.together`). Do they come apart?
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from runtime_jax.config import build
from runtime_jax.cost import table
from runtime_jax.estimate import estimate
from runtime_jax.pictures import image_grid, save_png
from runtime_jax.prng import Stream, host_rng
from tokenverse_jax.base.corpus import PAIR
from tokenverse_jax.bench.cases import Case, ConceptImage, Use, make_pair
from tokenverse_jax.bench.metrics import View, measure
from tokenverse_jax.bench.rows import FULL, PROMPT
from tokenverse_jax.bench.run import Bench, BenchConfig
from tokenverse_jax.commands.concepts import compiled_keys, cosine_in_prompt
from tokenverse_jax.concepts.bank import Concept, load_concepts
from tokenverse_jax.concepts.captions import bind_captions
from tokenverse_jax.concepts.compose import compose, place_stored
from tokenverse_jax.concepts.concept_data import encode_concept, encode_prompts, make_concepts
from tokenverse_jax.concepts.learner import Learner
from tokenverse_jax.flux.pipeline import PromptEncoding


class Study:
    """A finished benchmark, and the same concepts learned again beside other images.

    Attributes:
      alone: the benchmark. Its concepts are learned from images alone, with the paper's isolation loss.
      beside: concepts whose image is on either side of the isolation pairs, with a loss on its own half.
    """

    def __init__(self, folder: Path, out: Path):
        record = json.loads((folder / "config.json").read_text())
        config = build(BenchConfig, {key: record[key] for key in record if key not in ("weights", "judge")})
        isolation = dataclasses.replace(config.learn.isolation, sides=("left", "right"), own_weight=1.0)
        changed = dataclasses.replace(config, learn=dataclasses.replace(config.learn, isolation=isolation))
        self.config, self.alone, self.beside = config, Bench.open(config, folder), Bench.open(changed, out / "beside")
        full = [row for row in self.beside.rows if row.name == FULL]
        self.beside = dataclasses.replace(self.beside, rows=full)
        self.pipeline, self.judge = self.alone.pipeline, self.alone.judge
        self.base_hash = self.pipeline.base_hash()

    def concept(self, bench: Bench, image: int, word: str) -> Concept:
        """The concept of a word of an image, learned with the full method."""
        return load_concepts(bench.files.concept(FULL, image), base_hash=self.base_hash).concept(word)

    def draw(self, bench: Bench, prompt: str, number: int, uses: list[Use], strength: float) -> np.ndarray:
        """Draws two pictures side by side, [seeds, size, 2 size, 3], with concepts in the order of the prompt."""
        config, pipe = self.config, self.pipeline
        seen: dict[str, int] = {}
        placed = []
        for use in uses:
            word = use.target.split("#")[0]
            seen[word] = seen.get(word, 0) + 1
            concept, target = self.concept(bench, use.image, use.word), f"{word}#{seen[word]}"
            placed.append(place_stored(concept, pipe.tokenizer_2, prompt, target, strength))
        composed = compose(placed, pipe.text_length)
        repeat = lambda array: jnp.asarray(np.repeat(np.asarray(array), config.seeds, axis=0))  # noqa: E731
        images = pipe.generate(
            PromptEncoding(*map(repeat, encode_prompts(pipe, [prompt]))),
            height=config.size,
            width=2 * config.size,
            seed=config.seed,
            examples=number * config.seeds + np.arange(config.seeds),
            offsets=composed.repeat(config.seeds),
            **vars(config.sampling),
        )
        return np.asarray(images)

    def views(self, images: np.ndarray) -> list[list[View]]:
        """What the judge sees in the left and the right pictures."""
        return [self.see(np.ascontiguousarray(part)) for part in np.split(images, 2, axis=2)]

    def see(self, images: np.ndarray) -> list[View]:
        """What the judge sees in each image."""
        return [View(*pair) for pair in zip(images, self.judge.look(images), strict=True)]


def four_at_once(study: Study, out: Path) -> Iterator[str]:
    """A table of CP, PF and CP·PF with and without the four concepts. Writes a picture of each prompt's first seed."""
    rows: dict[str, list[list[float]]] = {"without": [], "learned alone": [], "learned beside others": []}
    images, size, columns = study.alone.images, study.config.size, []
    for number in range(0, len(images) // 2, 4):
        group = images[len(images) // 2 + number :][:4]
        for image in tqdm(group, desc=f"images {group[0].number} to {group[-1].number}", disable=None):
            study.beside.learn(image)
        halves = _halves(group, number)
        prompt = PAIR.format(left=halves[0].prompt, right=halves[1].prompt)
        uses = [use for half in halves for use in half.uses]
        ways = zip(rows, (study.alone, study.alone, study.beside), (0.0, 1.0, 1.0), strict=True)
        drawn = {name: study.draw(bench, prompt, number, uses, strength) for name, bench, strength in ways}
        views = {name: study.views(images) for name, images in drawn.items()}
        for name in rows:
            measured = []
            for half, own, base in zip(halves, views[name], views["without"], strict=True):
                found = [measure(half, *pair) for pair in zip(own, base, strict=True)]
                measured.append([np.mean([getattr(m, field) for m in found]) for field in ("cp", "pf", "cp_pf")])
            rows[name].append([*np.mean(measured, axis=0), measured[0][0], measured[1][0]])
        sources = [image.pixels(size) for image in group]
        columns.append([np.hstack(sources[:2]), np.hstack(sources[2:]), *(images[0] for images in drawn.values())])
    labels = ["left from", "right from", *rows]
    save_png(out / "four.png", image_grid(list(map(list, zip(*columns, strict=True))), row_labels=labels, scale=1))
    head = ("four at once", "CP", "PF", "CP·PF", "CP, left picture", "CP, right picture")
    yield from table(head, [(name, *map(str, map(estimate, np.transpose(row)))) for name, row in rows.items()])


def _halves(group: list[ConceptImage], number: int) -> list[Case]:
    """Two cases, each with the first objects of two images."""
    rng = host_rng(0, Stream.EVAL, 7, number)
    halves = [make_pair(rng, group[0], group[1]), make_pair(rng, group[2], group[3])]
    return [dataclasses.replace(half, prompt=half.prompt.replace(" to the left of ", " and ")) for half in halves]


def cosines(study: Study) -> list[tuple[float, Case]]:
    """Of all cases with concepts on two objects, in the order of the cosine of the concepts' keys."""
    keys, tokenizer, found = compiled_keys(study.pipeline), study.pipeline.tokenizer_2, []
    for case in study.alone.cases:
        if len(case.uses) != 2 or any(use.object is None for use in case.uses):
            continue
        concepts = [(use, study.concept(study.alone, use.image, use.word)) for use in case.uses]
        placed = [place_stored(concept, tokenizer, case.prompt, use.target) for use, concept in concepts]
        _, cosine = cosine_in_prompt(keys, study.pipeline.encode_prompts([case.prompt]), placed)
        found.append((float(cosine), case))
    return sorted(found, key=lambda pair: pair[0])


def parallel_keys(study: Study, ordered: Sequence[tuple[float, Case]]) -> Iterator[str]:
    """A table by fifths of the cosine; then rank correlations."""
    measured = {(r["task"], r["case"]): r["seeds"] for r in study.alone.files.records() if r["row"] == FULL}
    found = []
    for cosine, case in ordered:
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


def joint_learning(study: Study, ordered: Sequence[tuple[float, Case]], count: int, out: Path) -> Iterator[str]:
    """A table of the `count` most parallel pairs, learned apart and together; writes a picture of their first seeds."""
    pairs = {}
    for _, case in reversed(ordered):
        first, second = case.uses
        if first.image != second.image and first.word != second.word:
            pairs.setdefault(frozenset((use.image, use.word) for use in case.uses), case)
    how = study.config.learn
    isolation = dataclasses.replace(how.isolation, together=0.5)
    first, second = (dataclasses.replace(stage, steps=2 * stage.steps) for stage in (how.stage_1, how.stage_2))
    how = dataclasses.replace(how, isolation=isolation, stage_1=first, stage_2=second)
    learner, tokenizer = Learner(study.pipeline, how), study.pipeline.tokenizer_2
    full = next(row for row in study.alone.rows if row.name == FULL)
    figures: dict[str, list[list[float]]] = {"learned apart": [], "learned together": []}
    columns = []
    for case in tqdm(list(pairs.values())[:count], desc="pairs", disable=None):
        images = [study.alone.images[use.image] for use in case.uses]
        words = [use.word for use in case.uses]
        texts = [image.captions for image in images]
        captions = bind_captions(tokenizer, study.pipeline.text_length, texts, words, isolation)
        pixels = np.stack([image.pixels(study.config.size) for image in images])
        data = study.alone.with_pool(encode_concept(study.pipeline, how, pixels, captions))
        together = make_concepts(learner.learn(data, study.config.seed), data, how)
        concepts = {(use.image, use.word): concept for use, concept in zip(case.uses, together, strict=True)}
        seeds = study.config.seeds
        drawn = {
            "learned apart": study.alone.files.images(FULL, case, seeds),
            "learned together": study.alone.generate(full, [case], [concepts]),
        }
        base = study.see(study.alone.files.images(PROMPT, case, seeds))
        for name, images_of in drawn.items():
            measured = [measure(case, *both) for both in zip(study.see(images_of), base, strict=True)]
            bleeding = [one.bleeding for one in measured if one.bleeding is not None]
            means = [np.mean([getattr(one, field) for one in measured]) for field in ("cp", "pf", "cp_pf")]
            figures[name].append([*means, np.mean(bleeding) if bleeding else np.nan])
        columns.append([*pixels, *(images_of[0] for images_of in drawn.values())])
    labels = ["from", "and", *figures]
    save_png(out / "joint.png", image_grid(list(map(list, zip(*columns, strict=True))), row_labels=labels, scale=2))
    apart, together = (np.asarray(rows) for rows in figures.values())
    rows = {**figures, "difference": together - apart}
    cells = [
        (name, *(str(estimate(column[~np.isnan(column)])) for column in np.transpose(values)))
        for name, values in rows.items()
    ]
    yield from table(("the most parallel pairs", "CP", "PF", "CP·PF", "bleeding"), cells)


def main() -> None:
    """Prints the tables of all studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("runs/bench"), help="workdir of a finished benchmark")
    parser.add_argument("--out", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--pairs", type=int, default=16, help="of joint learning")
    args = parser.parse_args()
    study = Study(args.bench, args.out)
    ordered = cosines(study)
    print("\n".join([*four_at_once(study, args.out), "", *parallel_keys(study, ordered), ""]))
    print("\n".join(joint_learning(study, ordered, args.pairs, args.out)))


if __name__ == "__main__":
    main()
