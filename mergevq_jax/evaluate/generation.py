"""How good generated scenes are to a judge: the share that shows the requested class, and the distance from real ones.

The Fréchet distance (Heusel et al., arXiv 1706.08500) compares Gaussians fitted to features, the judge's instead of
Inception's. It falls with the number of images: compare equal numbers only. On the host, in float64.

Axes: N images, F features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from mini_scenes import CLASSES
from mini_scenes.judge import Judge
from runtime_jax.estimate import Estimate, estimate


class Labelled(NamedTuple):
    """Images and the classes that they should show, as numbers in mini_scenes' CLASSES."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, "N"]


class Gaussian(NamedTuple):
    """A Gaussian fitted to features."""

    mean: Float[np.ndarray, "F"]
    root: Float[np.ndarray, "F F"]  # the symmetric square root of the covariance
    count: int  # of images


class Quality(NamedTuple):
    """A judge's measurement of one generator."""

    accuracy: Estimate  # share of all images whose main object has the requested class
    frechet: Estimate  # over sets of images


def gaussian(features: Float[np.ndarray, "N F"]) -> Gaussian:
    """Mean and covariance (divided by N - 1) of features.

    Raises:
      ValueError: fewer than two images, or features that are not finite.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(f"Fréchet distance needs finite features of at least two images, got shape {features.shape}")
    mean = features.mean(axis=0)
    # The data's singular values are the roots of the covariance's eigenvalues. With fewer images than features many are
    # zero and come out as 1e-16; the root of an eigenvalue's rounding error would be 1e-8.
    _, spread, axes = np.linalg.svd((features - mean) / np.sqrt(len(features) - 1), full_matrices=False)
    return Gaussian(mean, (axes.T * spread) @ axes, len(features))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The last trace is the sum of the roots of the symmetric product's eigenvalues, which are the singular values of
    C2^1/2 C1^1/2.
    """
    common = np.linalg.svd(second.root @ first.root, compute_uv=False).sum()
    traces = np.square(first.root).sum() + np.square(second.root).sum()
    return max(0.0, float(np.square(first.mean - second.mean).sum() + traces - 2 * common))


def main_classes(judge: Judge, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N"]:
    """Class of the largest object that the judge sees in each image; -1 where it sees none."""
    scenes = (seen.scene for seen in judge.look(images))
    return np.asarray([scene.label if scene.objects else -1 for scene in scenes])


def measure(judge: Judge, sets: Sequence[Labelled], reference: Gaussian) -> Quality:
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
        distances.append(frechet_distance(gaussian(judge.features(images)), reference))
    if not sets:
        raise ValueError("no sets of images")
    return Quality(estimate(np.concatenate(right)), estimate(distances, independent=len(sets) > 1))
