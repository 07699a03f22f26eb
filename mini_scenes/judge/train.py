"""Training of the judge: image degradation, and one loss for each output.

Axes: B batch, H W image, h w cells of 4 x 4 pixels.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange, reduce
from jaxtyping import Array, Float, Int, Key

from mini_scenes.judge.lessons import UNNAMED, Truth
from mini_scenes.judge.model import CELL, JudgeConfig, JudgeNet, Views
from runtime_jax.prng import Stream, stream_key
from runtime_jax.training.network import Means
from runtime_jax.training.update import Params

BLOCK = 8  # side in pixels, as in JPEG
WEIGHTS = {"kind": 1.0, "texture": 0.5, "color": 0.3, "rgb": 4.0, "turn": 0.5, "background": 0.3, "light": 0.5}


def loss(
    params: Params, batch: Mapping[str, Array], step: Array, *, config: JudgeConfig, seed: int
) -> tuple[Array, Means]:
    """The weighted sum of the losses on a softened batch from `lessons.draw_batch`, and the individual losses."""
    truth = Truth(**{name: value for name, value in batch.items() if name != "image"})
    images = soften(batch["image"].astype(jnp.float32) / 255, stream_key(seed, Stream.AUGMENT, step))
    losses = compare(JudgeNet(config).apply({"params": params}, images), truth)
    return sum(WEIGHTS[name] * value for name, value in losses.items()), losses


def compare(views: Views, truth: Truth) -> dict[str, Float[Array, ""]]:
    """The losses. Objects and background have equal total weight; each cell is weighted by its object's coverage."""
    kind = jnp.take_along_axis(truth.kind, rearrange(truth.mask, "b h w -> b (h w)").astype(jnp.int32), axis=1)
    wrong = _cross_entropy(rearrange(views.kind, "b h w k -> b (h w) k"), kind)
    cover = jax.nn.one_hot(truth.mask, truth.kind.shape[1])[..., 1:]
    cover = reduce(cover, "b (h y) (w x) o -> b (h w) o", "mean", y=CELL, x=CELL)
    owner, share = 1 + jnp.argmax(cover, axis=-1), jnp.max(cover, axis=-1)

    def cells(view: Array) -> Array:
        return rearrange(view, "b h w c -> b (h w) c")

    def of_owner(table: Array) -> Array:
        return jnp.take_along_axis(table, owner.reshape(*owner.shape, *[1] * (table.ndim - 2)), axis=1)

    color, turn = of_owner(truth.color), of_owner(truth.turn)
    off_color, off_turn = jnp.abs(cells(views.rgb) - of_owner(truth.rgb)), jnp.square(cells(views.turn) - turn)
    off_light = jnp.square(views.warmth - truth.warmth) + jnp.square(views.azimuth - truth.azimuth).sum(axis=-1)
    return {
        "kind": 0.5 * (_mean(wrong, kind == 0) + _mean(wrong, kind > 0)),
        "texture": _mean(_cross_entropy(cells(views.texture), of_owner(truth.texture)), share),
        "color": _mean(_cross_entropy(cells(views.color), jnp.maximum(color, 0)), share * (color != UNNAMED)),
        "rgb": _mean(off_color.mean(axis=-1), share),
        "turn": _mean(off_turn.sum(axis=-1), share * (jnp.abs(turn).sum(axis=-1) > 0)),
        "background": _cross_entropy(views.background, truth.background).mean(),
        "light": off_light.mean(),
    }


def _cross_entropy(logits: Float[Array, "*n classes"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _mean(values: Float[Array, "*n"], weights: Array) -> Float[Array, ""]:
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)


def soften(images: Float[Array, "B H W 3"], key: Key[Array, ""]) -> Float[Array, "B H W 3"]:
    """Degrades images in [0, 1] as an autoencoder might: blur, JPEG-like rounding and noise; a fifth stay clean.

    Each image is degraded by a random amount.
    """
    keys = jax.random.split(key, 5)
    column = (len(images), 1, 1, 1)
    sigma, step, spread = (
        jax.random.uniform(key, column, maxval=most) for key, most in zip(keys[:3], (1.4, 0.25, 0.04), strict=True)
    )
    clean = jax.random.uniform(keys[3], column) < 0.2
    soft = _quantize(blur(images, sigma), step) + spread * jax.random.normal(keys[4], images.shape)
    return jnp.where(clean, images, jnp.clip(soft, 0, 1))


def blur(images: Float[Array, "B H W 3"], sigma: Float[Array, "B 1 1 1"] | float) -> Float[Array, "B H W 3"]:
    """Gaussian blur of `sigma` pixels, truncated at three pixels; edge pixels are repeated."""
    reach = 3
    taps = [jnp.exp(-0.5 * (k / jnp.maximum(sigma, 1e-3)) ** 2) for k in range(-reach, reach + 1)]
    total = sum(taps)
    for axis in (1, 2):
        side = images.shape[axis]
        wide = jnp.pad(images, [(reach, reach) if i == axis else (0, 0) for i in range(4)], mode="edge")
        parts = (jax.lax.slice_in_dim(wide, k, k + side, axis=axis) for k in range(2 * reach + 1))
        images = sum(tap * part for tap, part in zip(taps, parts, strict=True)) / total
    return images


def _quantize(images: Float[Array, "B H W 3"], step: Float[Array, "B 1 1 1"]) -> Float[Array, "B H W 3"]:
    """Rounds the DCT coefficients of 8 x 8 blocks to multiples of `step`."""
    place, wave = np.arange(BLOCK), np.arange(BLOCK)[:, None]
    basis = np.cos(np.pi * (place + 0.5) * wave / BLOCK) * np.where(wave == 0, 1, np.sqrt(2)) / np.sqrt(BLOCK)
    basis = basis.astype(np.float32)
    blocks = rearrange(images, "b (h y) (w x) c -> b h w c y x", y=BLOCK, x=BLOCK)
    step = jnp.maximum(step, 1e-3)[..., None, None]
    waves = jnp.einsum("uy,bhwcyx,vx->bhwcuv", basis, blocks, basis)
    waves = jnp.round(waves / step) * step
    return rearrange(jnp.einsum("uy,bhwcuv,vx->bhwcyx", basis, waves, basis), "b h w c y x -> b (h y) (w x) c")
