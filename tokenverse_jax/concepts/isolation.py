"""The concept isolation loss: what is learned from one image must not change others (TokenVerse, section 3.3).

The concept's image is put beside an image that the base model drew, under a caption of both. With the concept's
directions on its own caption's tokens, the prediction for the other image's half must stay what it is without them.

Ours: the concept's image may be on either side, and its own half may be learned too. A concept that is learned from
single images is learned at the left of a picture and may not carry over to the right half of a wider one.

Axes: B batch, h w grid of an image's tokens, N = h w, C channels of an image token.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

Side = Literal["left", "right"]
PARTS = r"\{left\}|\{right\}"  # of a template, for `re`


@dataclass(frozen=True, kw_only=True)
class IsolationConfig:
    """The pool of the base model's images, and their weight; the paper has 25 images and a probability of 0.5."""

    captions: tuple[str, ...]  # one image is made for each
    template: str = "Two pictures side by side: on the left {left}, on the right {right}."
    probability: float = 0.5  # share of the steps that also have this loss
    weight: float = 10.0  # the paper gives none; this is XVerse's
    sides: tuple[Side, ...] = ("left",)  # of the concept's image, equally likely; the paper's figure has the left
    own_weight: float = 0.0  # of the flow matching loss in the concept's own half; the paper's method has none
    # Share of the steps of this loss at which another image of the run stands in the pool's place, with its own words'
    # directions, and both halves are learned: concepts of different images that would blend learn to stand apart.
    together: float = 0.0

    def __post_init__(self):
        if not self.captions:
            raise ValueError("captions: at least one image is needed in the pool")
        if re.findall(PARTS, self.template) != ["{left}", "{right}"]:
            raise ValueError(f"template={self.template!r}: must contain {{left}} and then {{right}}, each once")
        if not 0 < self.probability <= 1 or self.weight <= 0 or self.own_weight < 0:
            raise ValueError(
                f"probability={self.probability} must be in (0, 1], weight={self.weight} positive and "
                f"own_weight={self.own_weight} not negative; isolation=None disables the loss"
            )
        if not 0 <= self.together <= 1:
            raise ValueError(f"together={self.together}: a share is needed, from 0 to 1")
        if not self.sides or len(set(self.sides)) < len(self.sides):
            raise ValueError(f"sides={self.sides}: one or both of {', '.join(get_args(Side))}")

    def merge(self, own: str, other: str, side: Side) -> tuple[str, int]:
        """The caption of two images side by side, and the number of characters before the concept's own caption."""
        before, between, after = re.split(PARTS, self.template)
        left, right = (own, other) if side == "left" else (other, own)
        start = len(before) if side == "left" else len(before + left + between)
        return before + left + between + right + after, start


def side_by_side(
    left: Float[Array, "B N C"], right: Float[Array, "B N C"], grid: tuple[int, int]
) -> Float[Array, "B both C"]:
    """Tokens of one image of twice the width, from those of two images with this grid (rows, columns)."""
    rows, _ = grid
    halves = [rearrange(half, "b (h w) c -> b h w c", h=rows) for half in (left, right)]
    return rearrange(jnp.concatenate(halves, axis=2), "b h w c -> b (h w) c")


def halves(
    pair: Float[Array, "B both C"], grid: tuple[int, int], on_right: Bool[Array, " B"]
) -> tuple[Float[Array, "B N C"], Float[Array, "B N C"]]:
    """Tokens of the concept's own image, which is on the right where `on_right`, and of the other image."""
    left, right = rearrange(pair, "b (h two w) c -> two b (h w) c", h=grid[0], two=2)
    on_right = on_right[:, None, None]
    return jnp.where(on_right, right, left), jnp.where(on_right, left, right)


def isolation_loss(
    steered: Float[Array, "B both C"],
    base: Float[Array, "B both C"],
    grid: tuple[int, int],
    on_right: Bool[Array, " B"],
) -> Float[Array, ""]:
    """Mean square of the directions' change to a predicted velocity in the other image's half."""
    return jnp.mean(jnp.square(halves(steered - base, grid, on_right)[1]))
