"""`mergevq reconstruct`: any picture through a tokenizer and back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mergevq_jax.evaluate import report
from mergevq_jax.evaluate.reconstruction import psnr
from mergevq_jax.pretrained import load_tokenizer
from mergevq_jax.tokenizer.config import ratio_keep
from runtime_jax.data import decode_image
from runtime_jax.pictures import save_png


def read_picture(path: Path, multiple: int, size: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A picture, its shorter side resized to `size` if given, centre-cropped to multiples of `multiple`.

    Raises:
      ValueError: no such file, not an image, or smaller than one token in a side.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        pixels = decode_image(path.read_bytes())
    except Exception as error:  # Pillow raises errors of many kinds for broken files
        raise ValueError(f"{path}: not a readable image ({error})") from error
    if size is not None:
        if size < multiple:
            raise ValueError(f"--size {size}: at least {multiple} pixels, one token, are needed")
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
    path: Path, tokenizer: str, *, keeps: Sequence[int] | None = None, size: int | None = None, out: Path
) -> str:
    """Writes `out/NAME_kK.png` for each K and `out/NAME_comparison.png`; returns a line for each K.

    `keeps` counts tokens of this picture; by default three shares of its raw tokens: a quarter, the model's, all.

    Raises:
      ValueError: picture or K not possible.
    """
    loaded = load_tokenizer(tokenizer)
    image = read_picture(path, loaded.config.downsampling, size)[None]
    grid = loaded.config.grid(*image.shape[1:3])
    raw = grid[0] * grid[1]
    keeps = sorted({max(1, raw // 4), ratio_keep(loaded.config, raw), raw}) if keeps is None else keeps
    for keep in keeps:
        loaded.config.merge_counts(raw, keep)
    lines = [f"{path}: {image.shape[2]} x {image.shape[1]} pixels, {raw} raw tokens"]
    for keep in keeps:
        rebuilt = np.asarray(loaded.reconstruct(image, keep=keep))
        save_png(out / f"{path.stem}_k{keep}.png", rebuilt[0])
        bits = keep * loaded.config.z_channels
        lines.append(
            f"  K = {keep}: {psnr(rebuilt, image)[0]:.2f} dB with {bits} code bits ({bits / image[0].size:.3f} a value)"
        )
    save_png(
        out / f"{path.stem}_comparison.png",
        report.picture(loaded, image, keeps, batch_size=1, scale=max(1, 256 // max(image.shape[1:3]))),
    )
    return "\n".join([*lines, f"  pictures are in {out}"])
