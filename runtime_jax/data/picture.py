"""Encoded pictures of any kind as 8-bit RGB: every mode and range that Pillow reads, or an error that says why not."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112  # EXIF tag; from 5 on, the sides are exchanged
BITS, PHOTOMETRIC = 258, 262  # TIFF tags: bits of a sample; 0 where white is zero
PLANES = 284  # TIFF tag: 2 where each channel has a plane of its own
PNG_BITS = 24  # where a PNG has the bits of a sample
JPEG = b"\xff\xd8\xff"  # the first bytes of a file
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integers beyond 8 bits, of mode "I", are of 0 to 65535


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """`open_image` as uint8 [H, W, 3]."""
    return np.asarray(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """A picture as 8-bit RGB: upright by its EXIF tag, transparency over white, of several frames the first.

    Samples of more than 8 bits are scaled so that white is 255. Files of 16 bits (and TIFFs of 12) define white; for 32
    bits the values do: integers up to 255 count as 8 bits, up to 65535 as 16; floats up to 1 as 0..1, whole floats as
    integers.

    Raises:
        ValueError: not a picture, a damaged one, one of unknown range, or one that Pillow reads wrongly.
    """
    formats = ["JPEG"] if data.startswith(JPEG) else None  # None: Pillow asks each of its forty formats
    with _readable(), Image.open(io.BytesIO(data), formats=formats) as image:
        if reason := _misread(image, data):
            raise ValueError(reason)
        if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
            # Pillow scales samples of 2 and 4 bits to 8, but not the transparent one.
            image.info["transparency"] *= 255 // (2 ** data[PNG_BITS] - 1)
        white, negative = _white(image), _is_negative(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or image.mode.startswith("I"):
            gray = _from_samples(np.asarray(image), white, negative, image.info.get("transparency"))
            return Image.fromarray(gray).convert("RGB")
        return _from_eight_bits(image)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, upright.

    Only what precedes the pixels is read, so a turn that a PNG asks for in EXIF data behind them is missed.

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


def _misread(image: Image.Image, data: bytes) -> str | None:
    """Why Pillow would read other pixels than the file has; None if it would not."""
    if image.format == "PNG" and image.mode == "RGB" and "transparency" in image.info and data[PNG_BITS] == 16:
        # Pillow cuts the samples to 8 bits, where many look like the transparent colour.
        return "a transparent colour of 16 bits a channel: save it with an alpha channel, or with 8 bits"
    if image.format == "FITS" and image.mode == "I;16":
        # Signed samples with an offset in the header; Pillow ignores both.
        return "a FITS of 16 bits: save it as TIFF or PNG"
    return _misread_tiff(image) if image.format == "TIFF" else None


def _misread_tiff(image: Image.Image) -> str | None:
    codec, bits, mode = image.tile[0][0], image.tag_v2.get(BITS, (1,))[0], image.mode
    if codec == "libtiff" and image.tag_v2.prefix == b"MM" and mode in ("I", "F"):
        # Their bytes are swapped twice: by libtiff and by Pillow.
        return "a compressed big-endian TIFF of signed or float samples: save it without compression"
    planes = image.tag_v2.get(PLANES) == 2 and len(image.getbands()) > 1
    if planes and (mode not in ("RGB", "RGBA", "CMYK") or (bits == 16 and codec != "libtiff")):
        # Pillow reads such a plane as 8 unsigned bits.
        return f"a TIFF with a plane of {bits} bits for each channel of {mode}: save it with interleaved channels"
    return None


def _white(image: Image.Image) -> int | None:
    """The largest sample that a file of more than 8 bits can have; None: the file does not say."""
    if image.format == "TIFF" and image.tag_v2.get(BITS, (0,))[0] == 12:
        return 4095
    return 65535 if image.mode.startswith("I;16") or (image.format in SIXTEEN_BITS and image.mode == "I") else None


def _is_negative(image: Image.Image) -> bool:
    """Whether white is zero and Pillow has not inverted the samples, as it does those of 8 bits."""
    return image.format == "TIFF" and image.mode.startswith(("I;16", "F")) and image.tag_v2.get(PHOTOMETRIC) == 0


def _from_samples(
    samples: Num[np.ndarray, "H W"], white: int | None, negative: bool, transparent: int | None
) -> UInt8[np.ndarray, "H W"]:
    white = _largest(samples) if white is None else white
    gray = np.round(samples.astype(np.float64) * (255 / white)).astype(np.uint8)
    gray = 255 - gray if negative else gray
    if transparent is not None:
        gray[samples == transparent] = 255
    return gray


def _largest(samples: Num[np.ndarray, "H W"]) -> int:
    """White, judged by the samples themselves."""
    low, high = samples.min(), samples.max()
    if np.isfinite(low) and np.isfinite(high) and low >= 0:
        is_float = samples.dtype.kind == "f"
        if is_float and high <= 1:
            return 1
        if high <= 65535 and not (is_float and (samples != np.floor(samples)).any()):
            return 255 if high <= 255 else 65535
    kind = "floats from 0 to 1, or whole ones" if samples.dtype.kind == "f" else "integers"
    raise ValueError(f"samples of {low} to {high}: {kind} from 0 to 255 or 65535 are needed")


def _from_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        flags = ImageCms.Flags.NOOPTIMIZE  # the optimized table of colours errs by up to 5 of 255
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB", flags=flags)
    if image.mode == "La":  # Pillow converts it to "LA" only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
