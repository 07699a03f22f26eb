"""The judge's training data: scenes more varied than those of mini_scenes, with ground truth as arrays.

The variety keeps the judge's measurements from being biased towards mini_scenes. Half of the objects have a colour from
between or around the named ones, and lights lie between the named ones too. A judge trained only on the named colours
would report every colour as one of them.
"""

import colorsys
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from mini_scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    SYMMETRY,
    TEXTURES,
    Light,
    Scene,
    accent_of,
    render_scene,
    sample_scene,
)
from mini_scenes.scene import MAX_OBJECTS
from runtime_jax.prng import Stream, host_rng

FREE_COLOR = 0.5  # share of objects
FREE_LIGHT = 0.5  # share of scenes
SAME_CLASS = 0.15  # share of scenes of two or more objects
EMPTY = 0.03
UNNAMED = -1  # label of a colour without a name


def sample_lesson(rng: np.random.Generator) -> tuple[Scene, tuple[bool, ...]]:
    """A scene, and for each object whether its colour has a name; if it has none, ignore the object's `color`."""
    scene = sample_scene(rng)
    named = tuple(bool(rng.uniform() >= FREE_COLOR) for _ in scene.objects)
    for i, is_named in enumerate(named):
        if not is_named:
            rgb = _any_color(rng)
            scene = scene.with_object(i, rgb=rgb, accent=accent_of(rgb))
    if len(scene.objects) > 1 and rng.uniform() < SAME_CLASS:
        scene = scene.with_object(1, shape=scene.objects[0].shape)
    if rng.uniform() < FREE_LIGHT:
        light = Light(azimuth=rng.uniform(5, 175), elevation=rng.uniform(35, 60), warmth=rng.uniform(-1, 1))
        scene = dataclasses.replace(scene, light=light)
    if rng.uniform() < EMPTY:
        scene, named = dataclasses.replace(scene, objects=()), ()
    return scene, named


def _any_color(rng: np.random.Generator) -> tuple[int, int, int]:
    hue, saturation, value = rng.uniform(), rng.uniform() ** 0.5, rng.uniform(0.3, 1)
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


class Truth(NamedTuple):
    """Ground truth of a batch of images; objects are numbered as in the masks, and 0 means no object."""

    mask: UInt8[np.ndarray, "B H W"]
    kind: Int32[np.ndarray, "B objects"]  # 0 for none, then CLASSES
    texture: Int32[np.ndarray, "B objects"]
    color: Int32[np.ndarray, "B objects"]  # UNNAMED for a colour without a name
    rgb: Float32[np.ndarray, "B objects 3"]  # in [0, 1]
    turn: Float32[np.ndarray, "B objects 2"]  # cosine and sine of SYMMETRY x rotation; zeros if SYMMETRY is 0
    background: Int32[np.ndarray, "B"]
    warmth: Float32[np.ndarray, "B"]
    azimuth: Float32[np.ndarray, "B 2"]  # cosine and sine


def draw_batch(seed: int, step: int, batch_size: int, size: int) -> dict[str, np.ndarray]:
    """Images uint8 [B, size, size, 3] under "image", and the fields of `Truth`. A pure function of the arguments."""
    lessons = [sample_lesson(host_rng(seed, Stream.DATA, step, row)) for row in range(batch_size)]
    drawn = [render_scene(scene, size) for scene, _ in lessons]
    truth = describe(lessons, np.stack([mask for _, mask in drawn]))
    return {"image": np.stack([image for image, _ in drawn]), **truth._asdict()}


def batches(seed: int, start_step: int, batch_size: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields `draw_batch` for each step, starting at `start_step`."""
    step = start_step
    while True:
        yield draw_batch(seed, step, batch_size, size)
        step += 1


def describe(lessons: list[tuple[Scene, tuple[bool, ...]]], mask: UInt8[np.ndarray, "B H W"]) -> Truth:
    """Ground truth arrays of scenes from `sample_lesson`, given the masks of their images."""
    shape = (len(lessons), 1 + MAX_OBJECTS)
    kind, texture, color = (np.zeros(shape, np.int32) for _ in range(3))
    rgb, turn = np.zeros((*shape, 3), np.float32), np.zeros((*shape, 2), np.float32)
    colors = tuple(COLORS)
    for i, (scene, named) in enumerate(lessons):
        for j, item in enumerate(scene.objects, start=1):
            kind[i, j] = 1 + CLASSES.index(item.shape)
            texture[i, j] = TEXTURES.index(item.texture)
            color[i, j] = colors.index(item.color) if named[j - 1] else UNNAMED
            rgb[i, j] = np.float32(item.rgb) / 255
            if order := SYMMETRY[item.shape]:
                turn[i, j] = _unit(order * item.rotation)
    backgrounds = tuple(BACKGROUNDS)
    return Truth(
        mask=mask,
        kind=kind,
        texture=texture,
        color=color,
        rgb=rgb,
        turn=turn,
        background=np.array([backgrounds.index(scene.background.kind) for scene, _ in lessons], np.int32),
        warmth=np.array([scene.light.warmth for scene, _ in lessons], np.float32),
        azimuth=np.array([_unit(scene.light.azimuth) for scene, _ in lessons], np.float32),
    )


def _unit(degrees: float) -> tuple[float, float]:
    return float(np.cos(np.deg2rad(degrees))), float(np.sin(np.deg2rad(degrees)))
