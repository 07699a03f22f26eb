"""A generator's architecture as one flat record, and the published sizes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from runtime_jax.config import renamed

MAX_CODES = 2**30  # code indices are int32


def _of_bits(bits: Sequence[int]) -> tuple[int, ...]:
    return tuple(2**n for n in bits)


def _bits_of(vocab_sizes: Sequence[int]) -> list[int] | None:
    bits = [size.bit_length() - 1 for size in vocab_sizes]
    return bits if _of_bits(bits) == tuple(vocab_sizes) else None


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Architecture of the LlamaGen-style transformer with a factorised head (paper section 4.1); defaults: size L."""

    num_layers: int = 24
    dim: int = 1024
    num_heads: int = 16
    ffn_dim: int | None = None  # None: LlamaGen's rule, 8/3 of the width rounded up to a multiple of 256
    head_layers: int = 2  # blocks over the sub-tokens of one code
    # Values of each sub-token; the first is the least significant (the paper's 6 and 12 bits).
    vocab_sizes: tuple[int, ...] = renamed("code_bits", (2**6, 2**12), _of_bits, _bits_of)
    num_classes: int = 1000
    class_dropout: float = 0.1  # above 0 there is a null class, which guidance needs
    grid: tuple[int, int] = (16, 16)  # raster tokens, rows and columns
    merge_instruction: bool = True  # a second prefix token that gives the number of distinct tokens
    keeps: tuple[int, ...] = renamed("merge_numbers", (64, 100, 144, 196, 256))  # K that it can give
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    zero_class_rope: bool = False  # the released weights were trained with the class token's q and k set to zero
    position_instruction: bool = False  # RandAR: codes in any order, each after a token that gives its position

    def __post_init__(self):
        names = ("num_layers", "dim", "num_heads", "ffn_dim", "head_layers", "num_classes", "rope_base", "norm_eps")
        bad = [f"{name}={getattr(self, name)}" for name in names if (getattr(self, name) or 0) <= 0]
        bad = [text for text in bad if text != "ffn_dim=None"]
        problems = [f"{', '.join(bad)}: positive numbers are needed"] if bad else []
        if not bad and (self.dim % self.num_heads or self.head_dim % 4):
            problems.append(
                f"dim={self.dim} over num_heads={self.num_heads}: heads must have a multiple of 4 channels "
                "(pairs that rows turn, and as many that columns turn)"
            )
        if not self.vocab_sizes or min(self.vocab_sizes) < 2 or self.vocab_size > MAX_CODES:
            problems.append(f"vocab_sizes={self.vocab_sizes}: at least 2 values each, at most 2^30 codes together")
        if min(self.grid) < 1:
            problems.append(f"grid={self.grid}: positive numbers are needed")
        if len(self.vocab_sizes) > self.length + 1:
            problems.append(f"vocab_sizes={self.vocab_sizes}: more sub-tokens than a grid of {self.grid} has positions")
        if not 0 <= self.class_dropout < 1:
            problems.append(f"class_dropout={self.class_dropout}: a probability below 1 is needed")
        if self.merge_instruction and not _rising(0, *self.keeps, self.length + 1):
            problems.append(f"keeps={self.keeps}: rising numbers of kept tokens, 1 to {self.length} (all of them)")
        if problems:
            raise ValueError("generator config: " + "; ".join(problems))

    @property
    def length(self) -> int:
        """L, raster tokens of an image."""
        return math.prod(self.grid)

    @property
    def prefix(self) -> int:
        """Tokens before the raster: the class, and the merge instruction if there is one."""
        return 1 + self.merge_instruction

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.ffn_dim or -(-(8 * self.dim // 3) // 256) * 256

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return math.prod(self.vocab_sizes)

    @property
    def null_class(self) -> int | None:
        """The label that means no class; None: the model has no such label."""
        return self.num_classes if self.class_dropout else None

    @property
    def usual_keep(self) -> int | None:
        """The default K of sampling: the middle one of `keeps`, or the smaller of two middle ones."""
        return self.keeps[(len(self.keeps) - 1) // 2] if self.merge_instruction else None

    def merge_index(self, keep: int | None) -> int | None:
        """Index of K in `keeps`; None for a model without merge instruction.

        Raises:
          ValueError: a K that is not in `keeps`, or any K without merge instruction.
        """
        if not self.merge_instruction:
            if keep is not None:
                raise ValueError(f"K = {keep}: this generator has no merge instruction, give None")
            return None
        if keep not in self.keeps:
            raise ValueError(f"K = {keep}: this generator knows {', '.join(map(str, self.keeps))}")
        return self.keeps.index(keep)


def _rising(*numbers: int) -> bool:
    return len(numbers) > 2 and all(a < b for a, b in itertools.pairwise(numbers))


def preset(name: str, **changes: Any) -> GeneratorConfig:
    """A published size, LlamaGen's names, or the tiny one, with some fields changed.

    Raises:
      ValueError: no preset of that name, or fields that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"no generator preset {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


PRESETS: Mapping[str, GeneratorConfig] = MappingProxyType(
    {
        "B": GeneratorConfig(num_layers=12, dim=768, num_heads=12),
        "L": GeneratorConfig(),
        "XL": GeneratorConfig(num_layers=36, dim=1280, num_heads=20),
        "tiny": GeneratorConfig(  # for the codes of the tokenizer's tiny preset and the classes of mini_scenes
            num_layers=4, dim=128, num_heads=4, ffn_dim=352, head_layers=1, vocab_sizes=(64, 64), num_classes=12
        ),
    }
)
