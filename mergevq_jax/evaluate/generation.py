"""How good generated scenes are to a judge: the share that shows the requested class, and the distance from real ones.

The Fréchet distance is that of the judge's features instead of Inception's.

Axes: N images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from mergevq_jax.evaluate.frechet import Moments, frechet_distance
from mini_scenes import CLASSES
from mini_scenes.judge import Judge
from runtime_jax.estimate import Estimate, estimate


class Labelled(NamedTuple):
    """Images and the classes that they should show, as numbers in mini_scenes' CLASSES."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, "N"]


class Quality(NamedTuple):
    """A judge's measurement of one generator."""

    accuracy: Estimate  # share of all images whose main object has the requested class
    frechet: Estimate  # over sets of images


def main_classes(judge: Judge, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N"]:
    """Class of the largest object that the judge sees in each image; -1 where it sees none."""
    scenes = (seen.scene for seen in judge.look(images))
    return np.asarray([scene.label if scene.objects else -1 for scene in scenes])


def measure(judge: Judge, sets: Sequence[Labelled], reference: Moments) -> Quality:
    """Judges a generator by sets of images that differ only in the seed; intervals of 95 %.

    Args:
      judge: the one that computed the features of `reference`.
      sets: as many images each as the reference; one set gives a Fréchet distance without interval.
      reference: of real images.

    Raises:
      ValueError: no sets, labels that are not classes, or not the reference's number of images.
    """
    right, distances = [], []
    for images, labels in sets:
        if len(images) != reference.count or len(labels) != len(images):
            raise ValueError(
                f"{len(images)} images, {len(labels)} labels, {reference.count} real images: numbers must be equal"
            )
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise ValueError(f"labels {labels.min()} to {labels.max()}, but classes are 0 to {len(CLASSES) - 1}")
        right.append(main_classes(judge, images) == labels)
        distances.append(frechet_distance(Moments.of(judge.features(images)), reference))
    if not sets:
        raise ValueError("no sets of images")
    return Quality(estimate(np.concatenate(right)), estimate(distances, independent=len(sets) > 1))
