"""The judge: reads images back into scenes.

An object is a connected region of pixels of one class. Its attributes are the network's outputs averaged over the
cells that the region covers. A region of two colours, or textured on one half only, counts as a mixture,
not as its better half.
"""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import traverse_util
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from mini_scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    SYMMETRY,
    TEXTURES,
    Background,
    Light,
    Scene,
    SceneObject,
    accent_of,
)
from mini_scenes.judge.model import CELL, JudgeConfig, JudgeNet, Views
from mini_scenes.shapes import outline_distance
from runtime_jax.config import build, to_dict
from runtime_jax.finite import all_finite, check_finite
from runtime_jax.weights import read_safetensors, write_safetensors

SHIPPED = Path(__file__).with_name("judge.safetensors")
BATCH_SIZE = 64
MIN_SHARE = 0.006  # of an image's pixels; smaller regions are ignored (the smallest object of mini_scenes fills 0.02)
NEIGHBOURS = np.ones((3, 3), bool)  # pixels that touch at a corner are connected


class Seen(NamedTuple):
    """What the judge sees in one image.

    scene: largest object first. Unmeasured fields have defaults: elevation of the light 45 degrees, accents from
      `accent_of`, background details of seed 0. If a shape is symmetric, its rotation is the smallest equivalent one.
    masks: pixels of each object.
    textures: probabilities of TEXTURES for each object.
    """

    scene: Scene
    masks: tuple[Bool[np.ndarray, "H W"], ...]
    textures: tuple[Float[np.ndarray, "textures"], ...]


@dataclass(frozen=True, eq=False)
class Judge:
    """The network's config and weights.

    >>> judge = Judge.load()
    >>> judge.look(images)[0].scene.objects[0].color    # images: uint8 [N, H, W, 3]
    """

    config: JudgeConfig
    params: dict

    @classmethod
    def load(cls, path: str | os.PathLike = SHIPPED) -> "Judge":
        """Reads a file written by `save_weights`; by default the shipped one.

        Raises:
          ValueError: the file does not exist or does not hold a judge.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != "judge":
            raise ValueError(f"{path}: not a judge's weights")
        config = build(JudgeConfig, json.loads(metadata["config"]), path=str(path))
        params = {name: jnp.asarray(value, jnp.float32) for name, value in tensors.items()}
        return cls(config, traverse_util.unflatten_dict(params, sep="/"))

    def look(self, images: UInt8[np.ndarray, "N H W 3"]) -> list[Seen]:
        """Reads the scene in each image.

        Raises:
          ValueError: images are not uint8 [N, H, W, 3], or a side is not a multiple of 8 pixels.
          NotFiniteError: an output of the network is not finite.
        """
        return [_interpret(view) for views in self._views(images) for view in _each(views)]

    def features(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N features"]:
        """Features for Fréchet distances between sets of images.

        Raises:
          ValueError: as `look`.
        """
        return np.concatenate([views.features for views in self._views(images)])

    def _views(self, images: np.ndarray) -> Iterator[Views]:
        images = np.asarray(images)
        if (
            images.ndim != 4
            or images.dtype != np.uint8
            or images.shape[-1] != 3
            or any(side % 8 for side in images.shape[1:3])
        ):
            raise ValueError(
                f"the judge needs uint8 [N, H, W, 3] with sides that are multiples of 8, got {images.dtype} "
                f"{list(images.shape)}"
            )
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            padded = np.zeros((BATCH_SIZE, *batch.shape[1:]), np.uint8)  # one compiled program for any number of images
            padded[: len(batch)] = batch
            views, finite = jax.device_get(_apply(self.params, padded, config=self.config))
            check_finite({"what the judge sees": finite}, {"judge": self.params})
            yield jax.tree.map(lambda leaf: leaf[: len(batch)], views)  # noqa: B023 (used at once)


@functools.partial(jax.jit, static_argnames="config")
def _apply(params: dict, images: jax.Array, *, config: JudgeConfig) -> tuple[Views, jax.Array]:
    views = JudgeNet(config).apply({"params": params}, images.astype(jnp.float32) / 255)
    return views, functools.reduce(jnp.logical_and, map(all_finite, views))


def save_weights(path: str | os.PathLike, config: JudgeConfig, params: dict, *, step: int) -> None:
    """Writes a file for `Judge.load`, with weights in bfloat16."""
    tensors = {
        name: np.asarray(value).astype(jnp.bfloat16)
        for name, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    metadata = {"format": "judge", "config": json.dumps(to_dict(config)), "step": str(step)}
    write_safetensors(path, tensors, metadata)


def _each(views: Views) -> Iterator[Views]:
    return (Views(*leaves) for leaves in zip(*views, strict=True))


def _interpret(view: Views) -> Seen:
    """The scene from one image's views, which have no batch axis."""
    found = []
    kind = view.kind.argmax(axis=-1)
    for number in np.unique(kind[kind > 0]):
        regions, count = ndimage.label(kind == number, NEIGHBOURS)
        masks = (regions == region for region in range(1, count + 1))
        found += [(CLASSES[number - 1], mask) for mask in masks if mask.mean() >= MIN_SHARE]
    found.sort(key=lambda pair: -pair[1].sum())
    described = [_describe(shape, mask, view) for shape, mask in found]
    scene = Scene(
        objects=tuple(item for item, _ in described),
        light=Light(azimuth=_degrees(view.azimuth) % 360, elevation=45.0, warmth=float(np.clip(view.warmth, -1, 1))),
        background=Background(kind=tuple(BACKGROUNDS)[view.background.argmax()], horizon=0.48, tone=0.5, seed=0),
    )
    return Seen(scene, tuple(mask for _, mask in found), tuple(textures for _, textures in described))


def _describe(shape: str, mask: np.ndarray, view: Views) -> tuple[SceneObject, np.ndarray]:
    """The object in a region, and its texture probabilities."""
    height, width = mask.shape
    share = reduce(mask.astype(np.float32), "(h y) (w x) -> h w", "mean", y=CELL, x=CELL)
    share /= share.sum()

    def mean(cells: np.ndarray) -> np.ndarray:
        return np.einsum("hw,hwc->c", share, cells)

    textures = np.exp(mean(view.texture) - mean(view.texture).max())
    textures /= textures.sum()
    rgb = tuple(round(255 * float(channel)) for channel in mean(view.rgb))
    rows, columns = np.nonzero(mask)
    order = SYMMETRY[shape]
    item = SceneObject(
        shape=shape,
        color=tuple(COLORS)[mean(view.color).argmax()],
        rgb=rgb,
        texture=TEXTURES[textures.argmax()],
        accent=accent_of(rgb),
        size=float(np.sqrt(mask.mean() / _unit_area(shape))),
        x=float((columns.mean() + 0.5) / width),
        y=float((rows.mean() + 0.5) / height),
        rotation=_degrees(mean(view.turn)) / order if order else 0.0,
    )
    return item, textures


def _degrees(vector: np.ndarray) -> float:
    return float(np.rad2deg(np.arctan2(vector[1], vector[0])))


@functools.cache
def _unit_area(shape: str) -> float:
    """Area of a shape with radius 1."""
    line = np.linspace(-1.2, 1.2, 241)
    return float((outline_distance(shape, line[None], line[:, None]) < 0).mean() * 2.4**2)
