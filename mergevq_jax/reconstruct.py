"""`mergevq reconstruct`: any picture through a tokenizer and back."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mergevq_jax.evaluate import report
from mergevq_jax.evaluate.reconstruction import psnr
from mergevq_jax.pretrained import load_tokenizer
from mergevq_jax.tokenizer.config import ratio_keep
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax.data import decode_image
from runtime_jax.pictures import save_png

MAX_RAW_TOKENS = 8192  # attention over all of them takes memory as their square


def read_picture(path: Path, multiple: int, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """A picture, its shorter side resized to `size` (0: left as it is), centre-cropped to multiples of `multiple`.

    Raises:
      ValueError: no such file, not an image, or smaller than one token in a side.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        pixels = decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if size:
        if size < multiple:
            raise ValueError(f"--size {size}: at least {multiple} pixels, one token, are needed (0: as it is)")
        height, width = pixels.shape[:2]
        scale = size / min(height, width)
        resized = Image.fromarray(pixels).resize(
            (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS
        )
        pixels = np.asarray(resized)
    height, width = (side // multiple * multiple for side in pixels.shape[:2])
    if not height or not width:
        raise ValueError(
            f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, at least {multiple} x {multiple} needed"
        )
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def reconstruct(
    paths: Sequence[Path], tokenizer: str, *, keeps: Sequence[int] | None = None, size: int | None = None, out: Path
) -> None:
    """Writes `out/NAME_kK.png` for each picture and K, and `out/NAME_comparison.png`; prints a line for each.

    `keeps` counts tokens of a picture; by default three shares of its raw tokens: a quarter, the model's, all. `size`
    is that of the shorter side; None: the training size, 0: as the picture is.

    Raises:
      ValueError: a picture or K that is not possible, or two pictures of one name; before anything is computed.
    """
    twice = [name for name, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise ValueError(f"several pictures are named {', '.join(twice)}: their results would overwrite each other")
    loaded = load_tokenizer(tokenizer)
    size = loaded.config.resolution if size is None else size
    images = [read_picture(path, loaded.config.downsampling, size)[None] for path in paths]
    plans = [_keeps(path, loaded, image, keeps) for path, image in zip(paths, images, strict=True)]
    for path, image, plan in zip(paths, images, plans, strict=True):
        print(f"{path}: {image.shape[2]} x {image.shape[1]} pixels, {_raw_tokens(loaded, image)} raw tokens")
        for keep in plan:
            rebuilt = np.asarray(loaded.reconstruct(image, keep=keep))
            save_png(out / f"{path.stem}_k{keep}.png", rebuilt[0])
            bits = keep * loaded.config.z_channels
            print(
                f"  K = {keep}: {psnr(rebuilt, image)[0]:.2f} dB with {bits} code bits "
                f"({bits / image[0].size:.3f} a value)"
            )
        scale = max(1, 256 // max(image.shape[1:3]))
        comparison = report.picture(loaded, image, plan, batch_size=1, scale=scale)
        save_png(out / f"{path.stem}_comparison.png", comparison)
    print(f"pictures are in {out}")


def _keeps(path: Path, loaded: Tokenizer, image: np.ndarray, keeps: Sequence[int] | None) -> Sequence[int]:
    """The K of one picture, each of them possible."""
    raw = _raw_tokens(loaded, image)
    if raw > MAX_RAW_TOKENS:
        raise ValueError(
            f"{path}: {image.shape[2]} x {image.shape[1]} pixels are {raw} raw tokens, at most {MAX_RAW_TOKENS} are "
            f"allowed: take a smaller --size"
        )
    keeps = sorted({max(1, raw // 4), ratio_keep(loaded.config, raw), raw}) if keeps is None else keeps
    for keep in keeps:
        try:
            loaded.config.merge_counts(raw, keep)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return keeps


def _raw_tokens(loaded: Tokenizer, image: np.ndarray) -> int:
    rows, columns = loaded.config.grid(*image.shape[1:3])
    return rows * columns
