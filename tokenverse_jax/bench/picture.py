"""A picture of a task: its concept images and what every row draws with them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from runtime_jax.pictures import image_grid, save_png
from tokenverse_jax.bench.cases import Case, ConceptImage

SHOWN = 8  # cases in a picture
Image = UInt8[np.ndarray, "H W 3"]


def write_picture(
    cases: Sequence[Case],
    images: Sequence[ConceptImage],
    rows: Sequence[str],
    concept: Callable[[ConceptImage], Image],
    drawn: Callable[[str, Case], Image],
    path: Path,
) -> None:
    """Draws some cases of one task, a column for each: the images of its concepts above each row's image.

    `concept` gives the pixels of a concept image, `drawn` a row's image of a case.
    """
    shown = cases[:SHOWN]
    sources = [case.images for case in shown]
    grid: list[list[Image | None]] = [
        [concept(images[own[i]]) if i < len(own) else None for own in sources] for i in range(max(map(len, sources)))
    ]
    labels = ["concepts from"] + ["and"] * (len(grid) - 1) if grid else []
    for row in rows:
        grid.append([drawn(row, case) for case in shown])
        labels.append(row)
    titles = [_wrapped(case.prompt) for case in shown]
    save_png(path, image_grid(grid, row_labels=labels, column_labels=titles, scale=2, font_size=11))


def _wrapped(prompt: str, width: int = 22) -> str:
    """The prompt in lines of at most `width` letters."""
    lines = [""]
    for word in prompt.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
