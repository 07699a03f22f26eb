"""Encoded pictures of any kind as 8-bit RGB: every mode and range that Pillow reads, or an error that says why not."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Num, UInt8
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112  # EXIF tag; from 5 on, the sides are exchanged
BITS, PHOTOMETRIC = 258, 262  # TIFF tags: bits of a sample; 0 where white is zero
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integers beyond 8 bits, of mode "I", are of 0 to 65535


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as uint8 [H, W, 3]: upright by its EXIF tag, transparency over white, of several frames the first.

    Samples of more than 8 bits are brought to 0..255 by what white is. The file says so for 16 bits (and 12 in TIFF).
    For 32 bits it does not: integers up to 255 are taken as 8 bits and up to 65535 as 16; floats up to 1 as 0..1, and
    whole ones as integers.

    Raises:
        ValueError: not a picture, a damaged one, or one whose range is not known.
    """
    with _readable(), Image.open(io.BytesIO(data)) as image:
        _check_transparency(image, data)
        white, negative = _white(image), _is_negative(image)
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F" or upright.mode.startswith("I"):
            return _from_samples(np.asarray(upright), white, negative, upright.info.get("transparency"))
        return _from_eight_bits(upright)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, upright; only what comes before the pixels is read.

    So `decode_image` may turn a PNG whose EXIF data come after them.

    Raises:
        ValueError: not a picture.
    """
    with _readable(), Image.open(path) as image:
        width, height = image.size
        exif = Image.Exif()
        if image.format != "TIFF":  # its size is that of the upright picture
            exif.load(image.info.get("exif", b""))
        return (width, height) if exif.get(ORIENTATION, 1) >= 5 else (height, width)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise errors of any kind, from struct.error to SyntaxError
        raise ValueError(f"not a readable image ({error})") from error


def _check_transparency(image: Image.Image, data: bytes) -> None:
    """Refuses a transparent colour of 16 bits a channel: Pillow reads such channels with 8 bits, and many are alike."""
    if image.format == "PNG" and image.mode == "RGB" and "transparency" in image.info and data[24] == 16:
        raise ValueError("a transparent colour of 16 bits a channel: save it with an alpha channel, or with 8 bits")


def _white(image: Image.Image) -> int | None:
    """The largest sample that the file can have, beyond 8 bits; None: it does not say."""
    if image.format == "TIFF" and image.tag_v2.get(BITS, (0,))[0] == 12:
        return 4095
    return 65535 if image.mode.startswith("I;16") or (image.format in SIXTEEN_BITS and image.mode == "I") else None


def _is_negative(image: Image.Image) -> bool:
    """Whether white is zero and Pillow has not turned it, as it does for samples of 8 bits."""
    return image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC) == 0


def _from_samples(
    samples: Num[np.ndarray, "H W"], white: int | None, negative: bool, transparent: int | None
) -> UInt8[np.ndarray, "H W 3"]:
    white = _largest(samples) if white is None else white
    gray = np.round(samples.astype(np.float64) * (255 / white)).astype(np.uint8)
    gray = 255 - gray if negative else gray
    if transparent is not None:
        gray[samples == transparent] = 255
    return np.repeat(gray[..., None], 3, axis=-1)


def _largest(samples: Num[np.ndarray, "H W"]) -> int:
    """What is taken for white by the samples themselves."""
    low, high = samples.min(), samples.max()
    if np.isfinite(low) and np.isfinite(high) and low >= 0:
        is_float = samples.dtype.kind == "f"
        if is_float and high <= 1:
            return 1
        if high <= 65535 and not (is_float and _has_fractions(samples).any()):
            return 255 if high <= 255 else 65535
    kind = "floats from 0 to 1, or whole ones" if samples.dtype.kind == "f" else "integers"
    raise ValueError(f"samples of {low} to {high}: {kind} from 0 to 255 or 65535 are needed")


def _has_fractions(samples: Num[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    return samples != np.floor(samples)


def _from_eight_bits(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
