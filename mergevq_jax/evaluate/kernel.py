"""Kernel distance of features (Binkowski et al., arXiv 1801.01401): KID. On the host, in float64.

Axes: N, M images, F features.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from mergevq_jax.evaluate.frechet import as_features

SEED = 2020  # with it, subsets are those of torch-fidelity


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy: mean and standard deviation over subsets."""

    mean: float
    std: float


def kernel_distance(
    first: Num[np.ndarray, "N F"],
    second: Num[np.ndarray, "M F"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = SEED,
) -> KernelDistance:
    """Unbiased squared MMD with the kernel (x . y / F + 1)^3, over random subsets of both sets.

    Unlike the Fréchet distance its expectation does not depend on the number of images, and it may be negative. The
    seed draws rows: in another order, the same features give another value within the standard deviation.

    Raises:
      ValueError: fewer images than `subset_size`, fewer than two images a subset, shapes that differ, or features that
        are not finite.
    """
    first, second = (as_features(features, np.shape(first)[-1]) for features in (first, second))
    fewest = min(len(first), len(second))
    if not 2 <= subset_size <= fewest or subsets < 1:
        raise ValueError(f"{subsets} subsets of {subset_size} images: at least 1, of 2 to {fewest} images")
    rng = np.random.RandomState(seed)
    values = [
        _squared_mmd(*(features[rng.choice(len(features), subset_size, replace=False)] for features in (first, second)))
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _squared_mmd(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "N F"]) -> float:
    count = len(first)

    def within(features: np.ndarray) -> float:
        kernel = _kernel(features, features)
        return (kernel.sum() - np.trace(kernel)) / (count * (count - 1))

    return within(first) + within(second) - 2 * _kernel(first, second).mean()


def _kernel(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M F"]) -> Float[np.ndarray, "N M"]:
    return (first @ second.T / first.shape[1] + 1) ** 3
