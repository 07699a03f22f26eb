"""Example images, each of two objects; configs/tokenverse_tiny.py has captions of them."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def example_path(name: str) -> Path:
    """The file of an example image.

    Raises:
        ValueError: no image of this name; lists those there are.
    """
    folder = Path(__file__).parent
    path = folder / f"{name}.png"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in folder.glob("*.png")))
        raise ValueError(f"no example image {name!r}; there are {names}")
    return path


def example_image(name: str) -> UInt8[np.ndarray, "64 64 3"]:
    """An example image: "star" (a star and a drop in the snow) or "heart" (a ring and a heart on the grass).

    Raises:
        ValueError: no image of this name; lists those there are.
    """
    return np.asarray(Image.open(example_path(name)).convert("RGB"))
