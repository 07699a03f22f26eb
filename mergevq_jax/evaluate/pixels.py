"""Similarity of images by their pixels: PSNR and SSIM, on the host, in float64."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.ndimage import correlate1d

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03


def psnr(images: ArrayLike, targets: ArrayLike) -> Float[np.ndarray, "batch"]:
    """Peak signal-to-noise ratio of each image, in dB, whatever else is in its batch.

    Args:
      images, targets: [B, H, W, C], both uint8 or both floating point in [-1, 1], where values outside are clipped as
        for display. Equal images give inf, images with NaN give NaN.

    Raises:
      ValueError: shapes or kinds of dtype differ.
    """
    images, targets, black, white = _pair("psnr", images, targets)
    errors = np.mean(np.square(images - targets), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10((white - black) ** 2 / errors)


def ssim(images: ArrayLike, targets: ArrayLike) -> Float[np.ndarray, "batch"]:
    """Structural similarity of each image (Wang et al. 2004), at most 1; the mean over channels and windows.

    Windows are Gaussian, of 11 pixels with a standard deviation of 1.5, and lie within the image.

    Args:
      images, targets: as `psnr` takes them, with sides of at least 11 pixels. Images with NaN give NaN.

    Raises:
      ValueError: shapes or kinds of dtype differ, or images are smaller than a window.
    """
    images, targets, black, white = _pair("ssim", images, targets)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {list(images.shape)}")
    return np.asarray([_ssim(x - black, y - black, white - black) for x, y in zip(images, targets, strict=True)])


def _pair(name: str, images: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Both as float64, and the values of black and white."""
    images, targets = np.asarray(images), np.asarray(targets)
    integer = images.dtype == targets.dtype == np.uint8
    floating = all(np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16" for x in (images, targets))
    if images.shape != targets.shape or images.ndim != 4 or not (integer or floating):
        raise ValueError(
            f"{name} needs two arrays [B, H, W, C], both uint8 or both floating point in [-1, 1]; got "
            f"{images.dtype} {list(images.shape)} and {targets.dtype} {list(targets.shape)}"
        )
    images, targets = images.astype(np.float64), targets.astype(np.float64)
    return (images, targets, 0.0, 255.0) if integer else (np.clip(images, -1, 1), np.clip(targets, -1, 1), -1.0, 1.0)


def _ssim(x: Float[np.ndarray, "H W C"], y: Float[np.ndarray, "H W C"], peak: float) -> float:
    """Of images in [0, peak]."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-np.square(offsets / SIGMA) / 2)
    weights /= weights.sum()
    inner = slice(WINDOW // 2, -(WINDOW // 2))

    def mean(values: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(values, weights, axis=0)[inner], weights, axis=1)[:, inner]

    mean_x, mean_y = mean(x), mean(y)
    squares = mean_x**2 + mean_y**2
    variances = mean(x**2 + y**2) - squares
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return float(similarity.mean())
