"""What is probed: pure functions from images to features, with their parameters.

Axes: B batch, H W image, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config, standardize
from runtime_jax.prng import Stream, stream_key

CLASS, MEAN = "class", "mean"  # how tokens become features: the class token, or the mean of the others
PIXELS = "pixels"  # the baseline's
PIXELS_SIDE = 16  # of the images that serve as the baseline's features
Apply = Callable[[Any, Float[Array, "B H W 3"]], dict[str, Float[Array, "B F"]]]


@dataclass(frozen=True)
class Encoder:
    """A network whose features are measured.

    Attributes:
      name: of its row.
      size: side of the images that it sees, pixels.
      apply: (parameters, images in [-1, 1]) -> features by pooling, float32.
      depth: path of a parameter -> number of its layer, counted from the images; an array for layers stacked in one
        parameter. None: it has no parameters to fine-tune.
      layers: number of the last layer.
      keep: kept tokens K, if it merges tokens.
      seed: of random weights.
    """

    name: str
    size: int
    params: Any
    apply: Apply
    depth: Callable[[str], int | np.ndarray] | None = None
    layers: int = 0
    keep: int | None = None
    seed: int | None = None

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the features of one image, by pooling; computes nothing."""
        image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32)
        return jax.eval_shape(self.apply, self.params, image)


def pixels_encoder(size: int) -> Encoder:
    """The baseline: the image itself, averaged over squares to at most PIXELS_SIDE x PIXELS_SIDE pixels."""
    side = max(divisor for divisor in range(1, PIXELS_SIDE + 1) if size % divisor == 0)

    def apply(params: None, images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B F"]]:
        parts = images.reshape(len(images), side, size // side, side, size // side, 3)
        return {PIXELS: parts.mean(axis=(2, 4)).reshape(len(images), -1)}

    return Encoder(f"pixels, {side} x {side}", size, None, apply)


def dinov2_encoder(name: str, config: DINOv2Config, params: Any, size: int) -> Encoder:
    """A DINOv2, at images of `size` pixels.

    Raises:
      ValueError: its patches don't fill such images.
    """
    if size % config.patch_size:
        raise ValueError(f"{name}: {size} pixels are not a multiple of its patches of {config.patch_size}")

    def apply(params: Any, images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B F"]]:
        hidden = DINOv2(config).apply({"params": params}, standardize(images)).hidden
        return {CLASS: hidden[:, 0], MEAN: hidden[:, 1:].mean(axis=1)}

    def depth(path: str) -> int | np.ndarray:
        if path.startswith("blocks/"):
            return 1 + np.arange(config.num_layers)
        return config.num_layers + 1 if path.startswith("norm/") else 0

    return Encoder(name, size, params, apply, depth, config.num_layers + 1)


def random_dinov2(config: DINOv2Config, size: int, seed: int) -> Encoder:
    """The same architecture with random weights."""
    images = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    params = jax.jit(DINOv2(config).init)(stream_key(seed, Stream.PARAMS), images)["params"]
    return replace(dinov2_encoder("random weights, DINOv2", config, params, size), seed=seed)
