"""Random changes of colour, which are one affine map of RGB for each image.

Axes: B batch, H W image.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

# Rows: brightness, and two axes of colour around it (the television standard NTSC's YIQ).
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True, kw_only=True)
class ColourConfig:
    """How far colours change: SimCLR's recipe with DINO's numbers.

    brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
    hue: turns by up to this share of the whole circle, either way.
    probability: share of views that are changed so.
    grey: share of all views, changed or not, that lose their colour.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    probability: float = 0.8
    grey: float = 0.2

    def __post_init__(self):
        shares = {name: value for name, value in vars(self).items() if name != "hue" and not 0 <= value <= 1}
        if shares or not 0 <= self.hue <= 0.5:
            raise ValueError(f"colour: {self}: hue is 0 to 0.5, the others are 0 to 1")


def jitter(images: Float[Array, "B H W 3"], keys: Key[Array, "B"], config: ColourConfig) -> Float[Array, "B H W 3"]:
    """Images in [-1, 1] in other colours, clipped to [-1, 1]; each by its own key."""

    def change(image: Float[Array, "H W 3"], key: Key[Array, ""]) -> Float[Array, "H W 3"]:
        keys = jax.random.split(key, 6)

        def factor(key: Key[Array, ""], spread: float) -> Float[Array, ""]:
            return jax.random.uniform(key, (), minval=1.0 - spread, maxval=1.0 + spread)

        changed = jax.random.uniform(keys[0]) < config.probability
        brightness, contrast, saturation = (
            jnp.where(changed, factor(key, spread), 1.0)
            for key, spread in zip(keys[1:4], (config.brightness, config.contrast, config.saturation), strict=True)
        )
        turn = jax.random.uniform(keys[4], (), minval=-config.hue, maxval=config.hue)
        turn = jnp.where(changed, 2 * jnp.pi * turn, 0.0)
        saturation = jnp.where(jax.random.uniform(keys[5]) < config.grey, 0.0, saturation)
        cos, sin = saturation * jnp.cos(turn), saturation * jnp.sin(turn)
        yiq = jnp.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
        matrix = _RGB @ yiq @ _YIQ
        pixels = brightness * jnp.einsum("hwc,dc->hwd", (image + 1.0) / 2.0, matrix)
        grey = jnp.mean(pixels @ _YIQ[0])
        return jnp.clip(2.0 * (grey + contrast * (pixels - grey)) - 1.0, -1.0, 1.0)

    return jax.vmap(change)(images, keys)
