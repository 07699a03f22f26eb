"""The drawn images in the layout that DreamBench++'s scripts read.

    src_image/COLLECTION/PROMPT_IMAGE.jpg   the concept's image, white outside of its mask
    tgt_image/COLLECTION/PROMPT_IMAGE.jpg   the drawn image
    text/COLLECTION/PROMPT_IMAGE.txt        the prompt
    negative_prompt.txt                     empty

An item with several concepts has a collection for each of them, with the same drawn image. Scores are of these files.
"""

import functools

import numpy as np
from jaxtyping import UInt8

from runtime_jax.data import decode_image
from runtime_jax.files import AnyPath, is_file, read_bytes, replacing, write_text
from runtime_jax.pictures import jpeg
from tokenverse_jax.evaluate.benchmark import Benchmark
from tokenverse_jax.evaluate.items import Item

SOURCE, TARGET, TEXT = "src_image", "tgt_image", "text"
NEGATIVE = "negative_prompt.txt"
Image = UInt8[np.ndarray, "H W 3"]


class Samples:
    """The files of one evaluation, each written atomically."""

    def __init__(self, folder: AnyPath, benchmark: Benchmark):
        self._folder = folder
        self._source = functools.lru_cache(maxsize=16)(lambda *which: jpeg(benchmark.reference(*which)))

    def has(self, item: Item, image: int) -> bool:
        """Whether all files of an image of an item are there."""
        names = (path(kind, name, image) for name in item.names for kind in (SOURCE, TARGET, TEXT))
        return all(is_file(self._folder / name) for name in names)

    def save(self, item: Item, image: int, pixels: Image) -> None:
        """Writes an image of an item."""
        data = jpeg(pixels)
        for name, use in zip(item.names, item.uses, strict=True):
            self._write(path(SOURCE, name, image), self._source(use.image, use.word))
            write_text(self._folder / path(TEXT, name, image), item.prompt)
            self._write(path(TARGET, name, image), data)

    def pixels(self, item: Item, image: int) -> Image:
        """A drawn image, as it is in its file."""
        return decode_image(read_bytes(self._folder / path(TARGET, item.names[0], image)))

    def _write(self, name: str, data: bytes) -> None:
        with replacing(self._folder / name) as new:
            new.write_bytes(data)


def path(kind: str, name: str, image: int) -> str:
    """The file of an image of a collection and prompt, below the output folder."""
    return f"{kind}/{name}_{image}.{'txt' if kind == TEXT else 'jpg'}"
