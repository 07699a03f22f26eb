"""The concept isolation loss: what is learned from one image leaves other images alone (TokenVerse, section 3.3).

The concept's image is put beside one that the base model made, left and right, under a caption that gives both. With
the concept's directions on its own caption's tokens, the right half is to be predicted as without them.

Axes: B batch, h w grid of an image's tokens, N = h w, C channels of an image token.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class IsolationConfig:
    """The pool of base-model images, and how much they count; the paper has 25 of them, and a probability of 0.5."""

    captions: tuple[str, ...]  # one image is made for each
    template: str = "Two pictures side by side: on the left {left}, on the right {right}."
    probability: float = 0.5  # share of the steps that have the loss, in addition to their own
    weight: float = 10.0  # the paper has none; this is XVerse's

    def __post_init__(self):
        if not self.captions:
            raise ValueError("captions: at least one image is needed in the pool")
        left, right = (self.template.find(part) for part in ("{left}", "{right}"))
        if not 0 <= left < right:
            raise ValueError(f"template={self.template!r}: {{left}} and after it {{right}} are needed")
        if not 0 < self.probability <= 1 or self.weight <= 0:
            raise ValueError(
                f"probability={self.probability} is in (0, 1] and weight={self.weight} positive; "
                "isolation=None leaves the loss out"
            )

    def merge(self, left: str, right: str) -> str:
        """The caption of two images side by side; the left one's begins at `left_start`."""
        return self.template.replace("{right}", right).replace("{left}", left)

    @property
    def left_start(self) -> int:
        """Place of the left caption's first letter in a merged one."""
        return self.template.index("{left}")


def side_by_side(
    left: Float[Array, "B N C"], right: Float[Array, "B N C"], grid: tuple[int, int]
) -> Float[Array, "B both C"]:
    """Tokens of one image of twice the width, from those of two images of a grid (rows, columns)."""
    rows, _ = grid
    halves = [rearrange(half, "b (h w) c -> b h w c", h=rows) for half in (left, right)]
    return rearrange(jnp.concatenate(halves, axis=2), "b h w c -> b (h w) c")


def right_half(pair: Float[Array, "B both C"], grid: tuple[int, int]) -> Float[Array, "B N C"]:
    """The right image's tokens."""
    return rearrange(pair, "b (h two w) c -> two b (h w) c", h=grid[0], two=2)[1]


def isolation_loss(
    steered: Float[Array, "B both C"], base: Float[Array, "B both C"], grid: tuple[int, int]
) -> Float[Array, ""]:
    """Mean square of what directions change in the right half of a predicted velocity."""
    return jnp.mean(jnp.square(right_half(steered - base, grid)))
