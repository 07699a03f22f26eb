"""Dtype, attention backend and rematerialisation of a model."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from runtime_jax.nn.attention import AttentionBackend


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model is computed; no parameter depends on it."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and matmuls; parameters stay float32
    attention: AttentionBackend = "xla"
    remat: bool = False  # recompute the inside of each block in the backward pass

    def __post_init__(self):
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention='cudnn' needs dtype='bfloat16', got {self.dtype!r}")

    @property
    def jax_dtype(self) -> DTypeLike:
        """`dtype` as modules take it."""
        return jnp.dtype(self.dtype)
