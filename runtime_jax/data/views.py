"""Square views of a picture: centre crops, random crops and random resized crops, each possibly mirrored.

The numbers of a view are drawn from a generator that the caller derives from the seed and the example's number.
"""

import dataclasses
import importlib.util
import math
import threading
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Picture = UInt8[np.ndarray, "H W 3"] | Image.Image
Resizer = Literal["pillow", "simd"]
_TRIES = 10  # at a random part that fits into the picture
_THREAD = threading.local()  # of the "simd" resizer: the thread's cykooz_resizer.Resizer, and its output by size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizedCropConfig:
    """A random part of a picture, stretched to a square: torchvision's RandomResizedCrop, with its defaults.

    area: bounds of the part's share of the picture's area, which is uniform.
    ratio: bounds of its width over its height, which is log-uniform.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area is {self.area}, allowed are 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio is {self.ratio}, allowed are 0 < low <= high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """One square view of each picture.

    name: its key in the batch.
    image_size: its side in pixels.
    random_crop: a square at a random position, sized by the source's `crop_scale`; False: the largest centred square.
    resized_crop: a random part of any shape instead.
    flip: mirror left and right in half of the examples.
    """

    name: str
    image_size: int
    random_crop: bool = True
    resized_crop: ResizedCropConfig | None = None
    flip: bool = False

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}, it must be at least 1")
        if self.resized_crop and not self.random_crop:
            raise ValueError("resized_crop is set, but random_crop is False: a resized crop is random")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture."""
        return self.image_size, self.image_size, 3


def check_resizer(resizer: Resizer) -> None:
    """Raises ValueError if the library behind a resizer is not installed."""
    if resizer == "simd" and importlib.util.find_spec("cykooz_resizer") is None:
        raise ValueError("resize='simd' needs cykooz-resizer; run: pip install 'tokenverse-mergevq-jax[simd]'")


def take_view(
    picture: Picture,
    view: ViewConfig,
    rng: np.random.Generator,
    *,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    resizer: Resizer = "pillow",
) -> UInt8[np.ndarray, "S S 3"]:
    """The view of a picture, uint8 [S, S, 3]; a pure function of the arguments and the generator's state.

    Args:
        picture: uint8 [H, W, 3], or an RGB image of Pillow, which saves copies.
        crop_scale: bounds of a random square's side relative to the shorter side of the picture.
        resizer: "simd" takes a sixth of Pillow's time. Its two passes, each rounded and clipped, are in another order:
            photos differ by 0.25 of 255 on average, single pixels at hard edges by more.
    """
    width, height = _size(picture)
    if view.resized_crop:
        box = _random_part(width, height, view.resized_crop, rng)
    elif view.random_crop:
        box = _random_square(width, height, crop_scale, rng)
    else:
        box = _centre(width, height)
    mirrored = view.flip and bool(rng.integers(2))
    return _resize(picture, box, view.image_size, resizer, mirrored=mirrored)


def center_crop(picture: Picture, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest centred square of a picture, resized to uint8 [size, size, 3]."""
    return _resize(picture, _centre(*_size(picture)), size)


def resize_and_crop(picture: Picture, side: int, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The centre of a picture whose shorter side was resized to `side` pixels, as classifiers and CLIP take it.

    Raises:
        ValueError: `size` is larger than `side`.
    """
    if size > side:
        raise ValueError(f"a square of {size} pixels does not fit into a picture of {side}")
    width, height = _size(picture)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    width, height = (int(side * length / min(width, height)) for length in (width, height))
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


class _Box(NamedTuple):
    """Part of a picture, in pixels."""

    left: float
    top: float
    width: float
    height: float


def _size(picture: Picture) -> tuple[int, int]:
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def _centre(width: int, height: int) -> _Box:
    side = float(min(height, width))
    return _Box((width - side) / 2, (height - side) / 2, side, side)


def _random_square(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> _Box:
    side = min(height, width) * float(np.exp(rng.uniform(*np.log(scale))))
    return _Box(rng.uniform() * (width - side), rng.uniform() * (height - side), side, side)


def _random_part(width: int, height: int, config: ResizedCropConfig, rng: np.random.Generator) -> _Box:
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*config.area)
        ratio = math.exp(rng.uniform(*np.log(config.ratio)))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left, top = rng.integers((width - part_width, height - part_height), endpoint=True)
            return _Box(float(left), float(top), part_width, part_height)
    low, high = config.ratio
    part_width, part_height = min(width, height * high), min(height, width / low)
    return _Box((width - part_width) / 2, (height - part_height) / 2, part_width, part_height)


def _resize(
    picture: Picture, box: _Box, size: int, resizer: Resizer = "pillow", *, mirrored: bool = False
) -> UInt8[np.ndarray, "S S 3"]:
    left, top, width, height = box
    if width == height == size and left == int(left) and top == int(top):
        part = np.asarray(picture)[int(top) : int(top) + size, int(left) : int(left) + size]
        return part[:, ::-1] if mirrored else part
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if resizer == "simd":
        resized = _simd(image, box, size)
    else:
        corners = (left, top, left + width, top + height)
        resized = image.resize((size, size), Image.Resampling.BICUBIC, corners)
    if mirrored:  # by Pillow, which takes a tenth of NumPy's time
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(resized)


def _simd(image: Image.Image, box: _Box, size: int) -> Image.Image:
    """The resized part of an image; the thread's next call overwrites it."""
    import cykooz_resizer as cykooz

    if not hasattr(_THREAD, "resizer"):
        _THREAD.resizer, _THREAD.resized = cykooz.Resizer(), {}
    if size not in _THREAD.resized:
        _THREAD.resized[size] = Image.new("RGB", (size, size))  # reused: new memory costs as much as half a resize
    bicubic = cykooz.ResizeAlg.convolution(cykooz.FilterType.catmull_rom)
    options = cykooz.ResizeOptions(bicubic, crop_box=cykooz.CropBox(*box), use_alpha=False)
    _THREAD.resizer.resize_pil(image, _THREAD.resized[size], options)
    return _THREAD.resized[size]
