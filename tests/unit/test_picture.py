"""Pixels of every kind that Pillow reads, against what they should be."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime_jax.data import decode_image, image_size

RAMP = np.linspace(0, 1, 48).reshape(6, 8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def gray(data: bytes) -> np.ndarray:
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def png(samples: np.ndarray, color: int, *chunks: tuple[bytes, bytes], bits: int = 16) -> bytes:
    """A PNG of 16 bits a channel: [H, W] with color 0, [H, W, C] with 2 (RGB), 4 (LA), 6 (RGBA). Fewer bits: gray."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = samples.shape[:2]
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        rows = [np.packbits(row[:, None] >> np.arange(bits)[::-1] & 1).tobytes() for row in samples]
    rows = b"".join(b"\0" + row for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(
    samples: np.ndarray,
    *,
    bits: int,
    order: str = "<",
    photometric: int = 1,
    kind: int = 1,
    compression: int = 1,
    tags: tuple[tuple[int, int], ...] = (),
) -> bytes:
    """A TIFF of one strip, [H, W] or [H, W, C]; `kind` 1: unsigned, 2: signed, 3: float; `compression` 8: deflate."""
    height, width, channels = *samples.shape[:2], samples[0, 0].size
    if bits == 12:
        flat = samples.reshape(-1, 2).astype(int)
        body = np.stack([flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255], axis=1)
        body = body.astype(np.uint8).tobytes()
    else:
        body = samples.astype(f"{order}{'uif'[kind - 1]}{bits // 8}").tobytes()
    body = zlib.compress(body) if compression == 8 else body
    entries = [(256, width), (257, height), (258, bits), (259, compression), (262, photometric), (273, 8)]
    entries += [(277, channels), (278, height), (279, len(body)), (339, kind), *tags]
    start = 8 + len(body)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    table = struct.pack(order + "H", len(entries))
    table += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(entries))
    return head + body + table + struct.pack(order + "I", 0)


def pgm(samples: np.ndarray, largest: int) -> bytes:
    height, width = samples.shape
    return f"P5 {width} {height} {largest}\n".encode() + samples.astype(">u2").tobytes()


def fits(samples: np.ndarray) -> bytes:
    """A FITS of 16 bits whose samples are those of the file plus 32768."""
    height, width = samples.shape
    fields = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height, "BZERO": 32768}
    header = "".join(f"{name:<8}= {value:>20}".ljust(80) for name, value in fields.items()) + "END"
    return header.ljust(2880).encode() + (samples - 32768).astype(">i2").tobytes()


FULL = np.round(RAMP * 65535).astype(np.uint16)
EXPECTED = np.round(FULL / 257).astype(np.uint8)
PLANES = ((284, 2),)  # a plane for each channel
PREMULTIPLIED = ((338, 1),)  # the last channel is an alpha that the others are multiplied by
TWELVE = np.round(RAMP * 4095).astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(FULL)), EXPECTED),
        (png(FULL, 0), EXPECTED),
        (pgm(FULL, 65535), EXPECTED),
        (pgm(TWELVE, 4095), np.round(TWELVE / 4095 * 255)),
        (tiff(FULL, bits=16), EXPECTED),
        (tiff(FULL, bits=16, order=">"), EXPECTED),
        (tiff(FULL, bits=16, order=">", compression=8), EXPECTED),
        (tiff(FULL, bits=16, photometric=0), 255 - EXPECTED),
        (tiff(RAMP.astype(np.float32), bits=32, kind=3, photometric=0), np.round(255 - RAMP * 255)),
        (tiff(TWELVE, bits=12), np.round(TWELVE / 4095 * 255)),
        (tiff(FULL.astype(np.int32), bits=32, kind=2), EXPECTED),
        (tiff(np.arange(48, dtype=np.int32).reshape(6, 8) * 5, bits=32, kind=2), np.arange(48).reshape(6, 8) * 5),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), np.round(RAMP * 255)),
        (tiff(RAMP.astype(np.float32), bits=32, kind=3, order=">"), np.round(RAMP * 255)),
        (encoded(Image.fromarray(EXPECTED.astype(np.float32)), "TIFF"), EXPECTED),
        (encoded(Image.fromarray(FULL.astype(np.float32)), "TIFF"), EXPECTED),
    ],
    ids=[
        "png", "png by hand", "pgm", "pgm of 12 bits", "tiff", "big-endian tiff", "compressed big-endian tiff",
        "white is zero", "white is zero, float", "12 bits", "int32", "int32 to 255", "float", "big-endian float",
        "float to 255", "float to 65535",
    ],
)  # fmt: skip
def test_more_than_8_bits(data, expected):
    np.testing.assert_allclose(gray(data).astype(int), expected, atol=1)
    assert gray(data).min() == expected.min() and gray(data).max() == expected.max()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(np.array([[0, 70000]]), bits=32, kind=2), "samples of 0 to 70000: integers from 0 to 255 or 65535"),
        (tiff(np.array([[-5, 9]]), bits=32, kind=2), "samples of -5 to 9: integers"),
        (tiff(np.array([[0, -9]]), bits=16, kind=2), "samples of -9 to 0: integers"),
        (tiff(np.array([[0.5, 1.5]]), bits=32, kind=3), "samples of 0.5 to 1.5: floats from 0 to 1, or whole ones"),
        (tiff(np.array([[-0.5, 1]]), bits=32, kind=3), "samples of -0.5 to 1.0: floats"),
        (tiff(np.array([[np.nan, 1]]), bits=32, kind=3), "samples of nan to nan: floats"),
        (tiff(np.array([[np.inf, 1]]), bits=32, kind=3), "samples of 1.0 to inf: floats"),
        (tiff(np.eye(2), bits=32, kind=3, order=">", compression=8), "a compressed big-endian TIFF of signed or float"),
        (tiff(np.eye(2), bits=16, kind=2, order=">", compression=8), "a compressed big-endian TIFF of signed or float"),
        (tiff(np.zeros((2, 2, 3)), bits=16, photometric=2, tags=PLANES), "a TIFF with a plane of 16 bits .* of RGB"),
        (tiff(np.zeros((2, 2, 3)), bits=8, photometric=8, tags=PLANES), "a TIFF with a plane of 8 bits .* of LAB"),
        (fits(FULL), "a FITS of 16 bits"),
        (png(np.zeros((2, 2, 3)), 2, (b"tRNS", struct.pack(">HHH", 0, 0, 0))), "a transparent colour of 16 bits"),
    ],
)
def test_what_is_refused_says_why(data, message):
    with pytest.raises(ValueError, match=f"not a readable image .{message}"):
        decode_image(data)


def test_colors_of_16_bits():
    color = np.stack([FULL, FULL[::-1], np.full_like(FULL, 0x8080)], axis=-1)
    expected = np.stack([EXPECTED, EXPECTED[::-1], np.full_like(EXPECTED, 128)], axis=-1).astype(int)
    for data in (png(color, 2), *(tiff(color, bits=16, order=order, photometric=2) for order in "<>")):
        np.testing.assert_allclose(decode_image(data).astype(int), expected, atol=1)
    clear = np.concatenate([color, np.zeros_like(FULL)[..., None]], axis=-1)
    assert (decode_image(png(clear, 6)) == 255).all()
    clear[..., 3] = 0xFFFF
    np.testing.assert_allclose(decode_image(png(clear, 6)).astype(int), expected, atol=1)
    half = np.stack([FULL, np.full_like(FULL, 0x8080)], axis=-1)
    np.testing.assert_allclose(gray(png(half, 4)).astype(int), np.round((EXPECTED * 128.0 + 255 * 127) / 255), atol=1)


def test_premultiplied_alpha_is_over_white():
    """White shows through by four fifths."""
    gray_alpha = np.stack([EXPECTED // 5, np.full_like(EXPECTED, 51)], axis=-1)
    expected = EXPECTED // 5 + 204
    np.testing.assert_allclose(gray(tiff(gray_alpha, bits=8, tags=PREMULTIPLIED)), expected, atol=1)
    for bits, scale in ((8, 1), (16, 257)):
        color = np.stack([EXPECTED // 5] * 3 + [np.full_like(EXPECTED, 51)], axis=-1) * np.uint16(scale)
        data = tiff(color, bits=bits, photometric=2, tags=PREMULTIPLIED)
        np.testing.assert_allclose(gray(data), expected, atol=1)


@pytest.mark.parametrize(
    ("bits", "transparent", "expected"),
    [
        (1, 0, [255, 255]),
        (1, 1, [0, 255]),
        (2, 1, [0, 255, 170, 255]),
        (4, 5, [*range(0, 85, 17), 255, *range(102, 256, 17)]),
    ],
)
def test_a_transparent_gray_of_few_bits_is_white(bits, transparent, expected):
    chunk = (b"tRNS", struct.pack(">H", transparent))
    assert gray(png(np.arange(2**bits)[None], 0, chunk, bits=bits)).tolist() == [expected]


def test_a_transparent_gray_of_16_bits_is_white():
    samples = np.array([[0x1234, 0x1235, 0x12FF]])
    transparent = (b"tRNS", struct.pack(">H", 0x1235))
    assert gray(png(samples, 0, transparent)).tolist() == [[0x12, 255, 0x13]]


@pytest.mark.parametrize(
    ("mode", "color", "kind", "rgb"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("1", 0, "TIFF", (0, 0, 0)),
        ("L", 90, "BMP", (90, 90, 90)),
        ("LA", (90, 51), "PNG", (222, 222, 222)),  # a fifth of 90, four fifths of white
        ("RGBA", (90, 0, 255, 51), "WEBP", (222, 204, 255)),
        ("RGBA", (90, 0, 255, 51), "TIFF", (222, 204, 255)),
        ("RGB", (9, 200, 30), "QOI", (9, 200, 30)),
        ("CMYK", (0, 255, 0, 0), "JPEG", (255, 0, 255)),  # as Adobe writes it, inverted
        ("CMYK", (0, 255, 0, 0), "TIFF", (255, 0, 255)),
        ("YCbCr", (76, 85, 255), "TIFF", (254, 0, 0)),
        ("LAB", (255, 128, 128), "TIFF", (255, 255, 255)),
        ("LAB", (138, 209, 198), "TIFF", (255, 0, 0)),  # L 54.3, a 80.8, b 69.9: red, by the white of D50
    ],
)
def test_every_mode_becomes_rgb(mode, color, kind, rgb):
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    decoded = decode_image(encoded(Image.new(mode, (8, 6), color), kind, **options))
    assert decoded.shape == (6, 8, 3) and decoded.dtype == np.uint8
    atol = 2 if mode in ("CMYK", "YCbCr") else 1
    np.testing.assert_allclose(decoded.astype(int), np.broadcast_to(rgb, decoded.shape), atol=atol)


def test_a_palette_becomes_its_colors():
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert (decode_image(encoded(image)) == (10, 200, 30)).all()
    assert (decode_image(encoded(image, transparency=1)) == 255).all()
    bands = image.convert("PA")
    bands.putalpha(51)
    for shade in (encoded(image, transparency=bytes([255, 51])), encoded(bands, "TIFF")):  # an opacity for each colour
        np.testing.assert_allclose(decode_image(shade).astype(int), np.broadcast_to((206, 244, 210), (6, 8, 3)), atol=1)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 6), (shade,) * 3) for shade in (200, 10)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(gray(data).astype(int), 200, atol=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_exif_turns_every_kind(dtype, tmp_path):
    samples = np.zeros((6, 8))
    samples[:3] = 1
    samples = (samples * {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]).astype(dtype)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    path = tmp_path / "turned.tif"
    Image.fromarray(samples).save(path, exif=exif)
    pixels = gray(path.read_bytes())
    assert pixels.shape == (8, 6) == image_size(path)
    assert (pixels[:, 3:] == 255).all() and (pixels[:, :3] == 0).all()


def test_exif_turns_a_big_endian_tiff():
    np.testing.assert_allclose(gray(tiff(FULL, bits=16, order=">", tags=((274, 6),))), np.rot90(EXPECTED, -1), atol=1)


def test_the_size_is_read_without_the_pixels(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(Image.fromarray(FULL))[:80])
    assert image_size(path) == (6, 8)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable image"):
        image_size(path)
