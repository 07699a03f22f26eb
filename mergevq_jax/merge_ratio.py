"""Draws the number of tokens that a training step keeps, the same on every host (paper, "merge ratio sampling").

K shapes the program. So it is drawn on the host from a short list, with one executable for each entry.
"""

import math
from dataclasses import dataclass

import numpy as np

from runtime_jax.prng import Stream, host_rng


@dataclass(frozen=True, kw_only=True)
class MergeRatioConfig:
    """The K to draw from and their weights, which need not sum to 1."""

    keeps: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.keeps or len(self.keeps) != len(self.weights):
            raise ValueError(f"merge_ratio: {len(self.keeps)} keeps, but {len(self.weights)} weights; give one each")
        if min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(f"merge_ratio.weights={self.weights} must be finite and >= 0, and one must be positive")

    @property
    def probabilities(self) -> np.ndarray:
        """Of the `keeps`."""
        return np.asarray(self.weights) / np.sum(self.weights)


def square_candidates(keep: int, count: int, *, start: int) -> tuple[int, ...]:
    """floor((sqrt(keep) + i)^2) for i = start, ..., start + count - 1."""
    return tuple(math.floor((math.sqrt(keep) + i) ** 2 + 1e-9) for i in range(start, start + count))


def gaussian(keep: int, count: int) -> MergeRatioConfig:
    """Candidates from one square below `keep`, weights exp(-(i - 1)^2 / (2 · 0.5^2)) + 0.05: G and G+R."""
    weights = tuple(math.exp(-((i - 1) ** 2) / (2 * 0.5**2)) + 0.05 for i in range(count))
    return MergeRatioConfig(keeps=square_candidates(keep, count, start=-1), weights=weights)


def exponential(keep: int, count: int) -> MergeRatioConfig:
    """Candidates from `keep` upwards, weights 2 exp(-2 i) + 0.1: R."""
    weights = tuple(2 * math.exp(-2 * i) + 0.1 for i in range(count))
    return MergeRatioConfig(keeps=square_candidates(keep, count, start=0), weights=weights)


def draw_keep(config: MergeRatioConfig, seed: int, step: int) -> int:
    """K of one step: a pure function of (config, seed, step)."""
    return int(host_rng(seed, Stream.MERGE, step).choice(config.keeps, p=config.probabilities))
