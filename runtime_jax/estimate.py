"""Means with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean, half the width of its 95 % confidence interval (None: unknown), and the number of values."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return f"{self:.2f}"

    def __format__(self, form: str) -> str:
        """The mean and, if known, the half width, both in this format; by default with two decimals."""
        form = form or ".2f"
        return f"{self.mean:{form}}" + ("" if self.half_width is None else f" ± {self.half_width:{form}}")


def estimate(values: np.ndarray | Sequence[float], *, independent: bool = True) -> Estimate:
    """Mean and, for independent values, 95 % interval (Student's t); the half width of a single value is inf.

    Raises:
      ValueError: no values, or NaN among them (a broken image must not vanish in a mean).
    """
    values = np.asarray(values, np.float64).reshape(-1)
    broken = np.flatnonzero(np.isnan(values))
    if values.size == 0 or broken.size:
        where = f"NaN at positions {broken[:10].tolist()}" if broken.size else "no values"
        raise ValueError(f"estimate: {where} of {values.size}")
    if not independent:
        return Estimate(float(np.mean(values)), None, values.size)
    if values.size == 1:
        return Estimate(float(values[0]), float("inf"), 1)
    half = stdtrit(values.size - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(values.size)
    return Estimate(float(np.mean(values)), float(half), values.size)
