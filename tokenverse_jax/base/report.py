"""How well a pipeline follows unseen captions, by the judge of mini_scenes; and a picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from runtime_jax.files import write_text
from runtime_jax.pictures import image_grid, save_png
from runtime_jax.prng import Stream, host_rng
from tokenverse_jax.base.corpus import describe, rows
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.sampling import UsualSampling

Reader = Literal["both", "clip", "t5"]
BATCH_SIZE = 32
SHOWN = 32  # images in the picture


def held_out_captions(split: str, count: int, objects: int | None = None) -> list[str]:
    """Captions of the first scenes of "validation" or "test", or of the first with so many objects."""
    captions: list[str] = []
    for start in itertools.count(step=count):
        for i, scene in enumerate(rows(0, split, range(start, start + count)), start=start):
            if objects in (None, len(scene.objects)):
                captions.append(describe(scene, host_rng(0, Stream.EVAL, i)))
        if len(captions) >= count:
            return captions[:count]


def captioned_grid(
    images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Images in rows of eight, each over its caption."""
    rows = range(0, len(images), 8)
    return image_grid(
        [list(images[start : start + 8]) for start in rows],
        captions=[captions[start : start + 8] for start in rows],
        scale=2,
        font_size=11,
    )


def report(
    pipeline: Pipeline,
    out: Path,
    *,
    count: int,
    sampling: UsualSampling,
    reads: Reader = "both",
    objects: int | None = None,
) -> str:
    """Draws `count` test captions, writes follows.md (the table that is returned) and follows.png into `out`.

    Args:
      reads: which text encoder gets the captions; the other one reads nothing.
      objects: number of objects in each caption; None: one or two.
    """
    from mini_scenes.judge import accuracies, follows

    captions = held_out_captions("test", count, objects)
    batches = []
    for start in range(0, count, BATCH_SIZE):
        # The last batch is filled up, so that all are one program.
        examples = np.minimum(np.arange(start, start + BATCH_SIZE), count - 1)
        prompts = pipeline.encode_prompts([captions[i] for i in examples])
        if reads != "both":
            nothing = pipeline.encode_prompts([""] * BATCH_SIZE)
            prompts = prompts._replace(**({"txt": nothing.txt} if reads == "clip" else {"vec": nothing.vec}))
        batches.append(pipeline.generate(prompts, examples=examples, **sampling.arguments()))
    images = np.concatenate(batches)[:count]
    shares = accuracies(follows(captions, images))
    lines = [
        f"| {kind} | {100 * share.mean:.1f} ± {100 * share.half_width:.1f} % | {share.count} |"
        for kind, share in shares.items()
    ]
    table = "\n".join(["| what the caption names | in the image | cases |", "|---|---|---|", *lines]) + "\n"
    write_text(out / "follows.md", table)
    save_png(out / "follows.png", captioned_grid(images[:SHOWN], captions[:SHOWN]))
    return table
