"""Fréchet distance of Gaussians fitted to features (Heusel et al., arXiv 1706.08500): FID and its relatives.

The distance falls as the number of images grows: compare equal numbers only. On the host, in float64.

Axes: N images, F features.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num


class Moments(NamedTuple):
    """Count, mean and scatter of features; immutable: `moments = moments.update(batch)` for each batch.

    Features may come in any batches and on several processes (`merge`): the result is the same up to rounding.
    """

    count: int
    mean: Float[np.ndarray, "F"]
    scatter: Float[np.ndarray, "F F"]  # sum of outer products of deviations from the mean

    @classmethod
    def zeros(cls, width: int) -> "Moments":
        """Of no images, with `width` features."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: Num[np.ndarray, "N F"]) -> "Moments":
        """Of these features; raises as `update`."""
        return cls.zeros(np.shape(features)[-1]).update(features)

    def update(self, features: Num[np.ndarray, "N F"]) -> "Moments":
        """With further images.

        Raises:
          ValueError: not [N, F] of this width, or features that are not finite.
        """
        features = as_features(features, len(self.mean))
        if not len(features):
            return self
        mean = features.mean(axis=0)
        return self.merge(Moments(len(features), mean, (features - mean).T @ (features - mean)))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets of images; ValueError if their widths differ."""
        _check_widths(self, other)
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "F F"]:
        """Unbiased covariance; ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        return self.scatter / (self.count - 1)


def as_features(features: Num[np.ndarray, "N F"], width: int) -> Float[np.ndarray, "N F"]:
    """Features as float64.

    Raises:
      ValueError: not [N, width], or not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features of shape {list(features.shape)}, but [N, {width}] are needed")
    if broken := int((~np.isfinite(features)).any(axis=1).sum()):
        raise ValueError(f"features of {broken} of {len(features)} images are not finite")
    return features


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    The last trace is the sum of the singular values of R2^T R1, where C = R R^T.

    Raises:
      ValueError: fewer than two images on one side, or widths that differ.
    """
    _check_widths(first, second)
    roots = [_root(moments.covariance) for moments in (first, second)]
    common = np.linalg.svd(roots[1].T @ roots[0], compute_uv=False).sum()
    traces = sum(np.square(root).sum() for root in roots)
    return max(0.0, float(np.square(first.mean - second.mean).sum() + traces - 2 * common))


def _root(covariance: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "F rank"]:
    """R of C = R R^T, with as many columns as C has eigenvalues that are not zero."""
    values, axes = np.linalg.eigh(covariance)
    # With fewer images than features many eigenvalues are zero, and come out as rounding errors of 1e-16. Their roots
    # would be 1e-8, for each of thousands of features.
    real = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return axes[:, real] * np.sqrt(values[real])


def _check_widths(first: Moments, second: Moments) -> None:
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"{len(first.mean)} features on one side, {len(second.mean)} on the other")
