"""CP and PF of mini_scenes' judge, as `tokenverse bench` measures them, for benchmarks of its words.

What a concept looks like is what the judge sees in the benchmark's image.
"""

from collections.abc import Sequence

import numpy as np

from mini_scenes import BACKGROUNDS, CLASSES
from mini_scenes.judge import Judge, Seen, compare, parse_caption
from mini_scenes.judge.captions import objects_in
from tokenverse_jax.bench.appearance import Appearance
from tokenverse_jax.bench.cases import Use as Bring
from tokenverse_jax.bench.metrics import likeness
from tokenverse_jax.concepts.concept_data import read_image
from tokenverse_jax.evaluate.benchmark import Benchmark
from tokenverse_jax.evaluate.draw import Job
from tokenverse_jax.evaluate.items import Item, Use
from tokenverse_jax.evaluate.samples import Samples
from tokenverse_jax.flux.words import split_number, word_key


def check(items: Sequence[Item], size: int) -> None:
    """Raises ValueError for a prompt or a word that is not of mini_scenes, or a side that is no multiple of 8."""
    if size % 8:
        raise ValueError(f"images of {size} pixels, but a multiple of 8 is needed")
    for item in items:
        parse_caption(item.prompt)
        for use in item.uses:
            _shape(use.word)
            object_number(item.prompt, use.target)


def measure(jobs: Sequence[Job], benchmark: Benchmark, samples: Samples, size: int) -> list[dict[str, float]]:
    """For each image CP and PF.

    Args:
      size: side at which the benchmark's images are looked at, pixels; a multiple of 8.

    Raises:
      ValueError: the judge does not find a concept in the benchmark's image.
    """
    judge = Judge.load()
    names = list(dict.fromkeys(image for job in jobs for image in job.item.images))
    pixels = np.stack([read_image(benchmark.pictures[name].path, size) for name in names])
    references = dict(zip(names, judge.look(pixels), strict=True))
    drawn = judge.look(np.stack([samples.pixels(job.item, job.image) for job in jobs]))
    figures = []
    for job, seen in zip(jobs, drawn, strict=True):
        verdict = compare(parse_caption(job.item.prompt), seen.scene)
        uses = [_bring(use, references[use.image], job.item.prompt) for use in job.item.uses]
        cp = np.mean([np.mean(list(likeness(use, seen, verdict).values())) for use in uses])
        figures.append({"CP": float(cp), "PF": verdict.score})
    return figures


def _bring(use: Use, reference: Seen, prompt: str) -> Bring:
    shape = _shape(use.word)
    if shape is None:
        return Bring(look=Appearance.of_light(reference.scene.light), target=use.target, object=None)
    _, number = split_number(use.word)
    found = [item for item in reference.scene.objects if item.shape == shape]
    if len(found) < number:
        raise ValueError(f"{use.image}: the judge does not find {use.word!r} in the image")
    item = sorted(found, key=lambda item: item.x)[number - 1]
    return Bring(look=Appearance.of_object(item), target=use.target, object=object_number(prompt, use.target))


def _shape(word: str) -> str | None:
    """The class of an object's word; None for a place, which stands for its light."""
    name, _ = split_number(word)
    if word_key(name) in map(word_key, BACKGROUNDS.values()):
        return None
    found = [shape for shape in CLASSES if shape in word_key(name).split()]
    if len(found) != 1:
        raise ValueError(f"{word!r} is neither an object nor a place of mini_scenes")
    return found[0]


def object_number(prompt: str, target: str) -> int | None:
    """Which object of `parse_caption(prompt)` the target names; None for a place."""
    shape, (_, number) = _shape(target), split_number(target)
    if shape is None:
        return None
    named = [wanted.shape for _, wanted in objects_in(prompt)]
    positions = [position for position, own in enumerate(named) if own == shape]
    if len(positions) < number:
        raise ValueError(f"{target!r} is not an object of the prompt {prompt!r}")
    position = positions[number - 1]
    # "a to the right of b" is parsed from left to right: b, a.
    return len(named) - 1 - position if " to the right of " in prompt.lower() else position
