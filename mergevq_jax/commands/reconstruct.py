"""`mergevq reconstruct`: any picture through a tokenizer and back."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mergevq_jax.evaluate.pixels import psnr
from mergevq_jax.tokenizer import report
from mergevq_jax.tokenizer.config import TokenizerConfig, ratio_keep
from mergevq_jax.tokenizer.model import load_tokenizer, read_tokenizer_config
from runtime_jax.config import naming
from runtime_jax.data import decode_image, image_files, image_size
from runtime_jax.files import AnyPath, local
from runtime_jax.pictures import save_png
from runtime_jax.workdir import check_output

MAX_RAW_TOKENS = 8192  # the memory of attention grows with their square


class Picture(NamedTuple):
    """A picture to be reconstructed."""

    path: Path
    name: str  # of its results, without suffix


def find_pictures(paths: Sequence[AnyPath]) -> list[Picture]:
    """The pictures among paths and in folders; results of a folder keep its sub-folders. Copies those of a bucket.

    Raises:
      ValueError: no such file, a folder without pictures, or two results with the same name.
    """
    pictures = []
    for path in map(local, paths):
        if path.is_dir():
            found = image_files(path)
            if not found:
                raise ValueError(f"{path}: a folder without pictures")
            pictures += [Picture(path / file, str(file.with_suffix(""))) for file in found]
        elif path.is_file():
            pictures.append(Picture(path, path.stem))
        else:
            raise ValueError(f"{path}: no such file")
    twice = [name for name, count in Counter(picture.name for picture in pictures).items() if count > 1]
    if twice:
        raise ValueError(f"several pictures are named {', '.join(twice)}: their results would overwrite each other")
    return pictures


class Sides(NamedTuple):
    """Height and width of a picture, in pixels."""

    resized: tuple[int, int]
    cropped: tuple[int, int]  # from its middle


def plan_sides(sides: tuple[int, int], multiple: int, size: int) -> Sides:
    """Resizes a picture's shorter side to `size`, then crops both sides to multiples of `multiple`.

    Args:
      size: 0: no resizing.

    Raises:
      ValueError: a side is smaller than one token, or the resized picture has fewer than two.
    """
    if size:
        shape = sides

        def resized(size: int) -> tuple[int, int]:
            return round(shape[0] * size / min(shape)), round(shape[1] * size / min(shape))

        two_tokens = (least for least in range(multiple, 2 * multiple) if max(resized(least)) >= 2 * multiple)
        if size < (least := next(two_tokens, 2 * multiple)):
            raise ValueError(f"--size {size} is too small for two tokens: at least {least} (0: as it is)")
        sides = resized(size)
    cropped = sides[0] // multiple * multiple, sides[1] // multiple * multiple
    if not min(cropped):
        raise ValueError(f"{sides[1]} x {sides[0]} pixels, at least {multiple} x {multiple} needed")
    return Sides(sides, cropped)


def read_picture(path: Path, multiple: int, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """A picture, its shorter side resized to `size` (0: left as it is), centre-cropped to multiples of `multiple`.

    Raises:
      ValueError: as `plan_sides`, or a damaged image.
    """
    pixels = decode_image(path.read_bytes())
    (height, width), cropped = plan_sides(pixels.shape[:2], multiple, size)
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    top, left = (height - cropped[0]) // 2, (width - cropped[1]) // 2
    return pixels[top : top + cropped[0], left : left + cropped[1]]


def reconstruct(
    paths: Sequence[AnyPath],
    tokenizer: str,
    *,
    keeps: Sequence[int] | None = None,
    size: int | None = None,
    out: AnyPath,
) -> None:
    """Writes `out/NAME_kK.png` for each picture and K, and `out/NAME_comparison.png`; prints a line for each.

    Args:
      paths: pictures, and folders of them.
      tokenizer: shipped name, folder or hub id.
      keeps: kept tokens of a picture; None: a quarter of its raw tokens, the model's share of them, and all.
      size: pixels of the shorter side; None: the training size, 0: as the picture is.
      out: folder of the results.

    Raises:
      ValueError: a picture or K that is not possible, or two pictures of one name; before weights are loaded.
      WorkdirError: `out` cannot be written.
      NotFiniteError: features or pixels that are not finite.
    """
    pictures = find_pictures(paths)
    check_output(out)
    config = read_tokenizer_config(tokenizer)
    multiple, size = config.downsampling, config.resolution if size is None else size
    plans = []
    for picture in pictures:
        with naming(str(picture.path)):
            plans.append(_keeps(config, plan_sides(image_size(picture.path), multiple, size).cropped, keeps))
    for picture in pictures:
        with naming(str(picture.path)):
            decode_image(picture.path.read_bytes())  # not kept: a folder's pictures may not fit in memory
    loaded = load_tokenizer(tokenizer)
    for picture, plan in zip(pictures, plans, strict=True):
        image = read_picture(picture.path, multiple, size)[None]
        raw = math.prod(config.grid(*image.shape[1:3]))
        print(f"{picture.path}: {image.shape[2]} x {image.shape[1]} pixels, {raw} raw tokens")
        for keep in plan:
            rebuilt = np.asarray(loaded.reconstruct(image, keep=keep))
            save_png(out / f"{picture.name}_k{keep}.png", rebuilt[0])
            bits = keep * config.bits
            print(
                f"  K = {keep}: {psnr(rebuilt, image)[0]:.2f} dB with {bits} code bits "
                f"({bits / image[0].size:.3f} a value)"
            )
        scale = max(1, 256 // max(image.shape[1:3]))
        comparison = report.picture(loaded, image, plan, batch_size=1, scale=scale)
        save_png(out / f"{picture.name}_comparison.png", comparison)
    print(f"pictures are in {out}")


def _keeps(config: TokenizerConfig, sides: tuple[int, int], keeps: Sequence[int] | None) -> Sequence[int]:
    """The K of one picture, each of them possible."""
    raw = math.prod(config.grid(*sides))
    if raw > MAX_RAW_TOKENS:
        raise ValueError(
            f"{sides[1]} x {sides[0]} pixels are {raw} raw tokens, at most {MAX_RAW_TOKENS} are allowed: take a "
            "smaller --size"
        )
    keeps = sorted({max(1, raw // 4), ratio_keep(config, raw), raw}) if keeps is None else keeps
    for keep in keeps:
        config.merge_counts(raw, keep)
    return keeps
