"""Use of the codebook; on the host, in numpy."""

from dataclasses import dataclass, field

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int


@dataclass
class CodeUsage:
    """Counts code indices: `usage.update(indices)` for each batch, then read the properties.

    With LFQ, bit j of an index is channel j of the code (channel 0 least significant).
    """

    vocab_size: int
    counts: Int[np.ndarray, "codes"] = field(init=False, repr=False)

    def __post_init__(self):
        if not 2 <= self.vocab_size <= 2**24:
            raise ValueError(f"CodeUsage counts 2 to 2^24 codes, not {self.vocab_size}")
        self.counts = np.zeros(self.vocab_size, np.int64)

    def update(self, indices: ArrayLike) -> None:
        """Adds indices of any shape; ValueError if one is not in 0..vocab_size - 1."""
        indices = np.asarray(indices).reshape(-1)
        if indices.size and (indices.min() < 0 or indices.max() >= self.counts.size):
            raise ValueError(f"CodeUsage: indices {indices.min()}..{indices.max()} not in 0..{self.counts.size - 1}")
        np.add.at(self.counts, indices, 1)

    @property
    def tokens(self) -> int:
        """Number of indices counted."""
        return int(self.counts.sum())

    @property
    def bit_rates(self) -> Float[np.ndarray, "bits"]:
        """Share of tokens in which each bit is one."""
        codes = np.arange(self.counts.size)
        ones = [self.counts[(codes >> bit) & 1 == 1].sum() for bit in range((self.vocab_size - 1).bit_length())]
        return np.array(ones, np.float64) / self._counted()

    @property
    def dead_bits(self) -> tuple[int, ...]:
        """Bits with the same value in every token."""
        rates = self.bit_rates
        return tuple(int(bit) for bit in np.flatnonzero((rates == 0) | (rates == 1)))

    @property
    def used(self) -> float:
        """Share of all codes that occur, at most tokens / vocab_size."""
        return float(np.mean(self.counts > 0)) if self._counted() else 0.0

    @property
    def perplexity(self) -> float:
        """Effective number of codes: exp of the entropy of their distribution."""
        shares = self.counts[self.counts > 0] / self._counted()
        return float(np.exp(-np.sum(shares * np.log(shares))))

    def _counted(self) -> int:
        if not self.tokens:
            raise ValueError("CodeUsage: no indices counted yet")
        return self.tokens
