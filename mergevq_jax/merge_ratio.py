"""How many tokens a training step keeps: a seeded draw, the same on every host (paper, "merge ratio sampling").

K shapes the program, so it is drawn on the host from a short list: one executable for each entry.
"""

import math
from dataclasses import dataclass

import numpy as np

from runtime_jax.prng import Stream, host_rng


@dataclass(frozen=True, kw_only=True)
class MergeRatioConfig:
    """Kept tokens to draw from, and their weights (normalised here)."""

    keeps: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.keeps or len(self.keeps) != len(self.weights):
            raise ValueError(
                f"merge_ratio: {len(self.keeps)} keeps and {len(self.weights)} weights, one of each is needed"
            )
        if min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"merge_ratio.weights={self.weights}: all finite, none may be negative, and one must be positive"
            )

    @property
    def probabilities(self) -> np.ndarray:
        """Of each entry of `keeps`."""
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
    """Kept tokens of one step: a pure function of (config, seed, step)."""
    return int(host_rng(seed, Stream.MERGE, step).choice(config.keeps, p=config.probabilities))
