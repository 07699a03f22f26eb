"""Where the groups of merged tokens start: counted while RandAR is trained, drawn when it samples.

RandAR is asked for codes at given positions and does not predict these. In training they are the first members of an
image's groups, and far from uniform: with the tiny tokenizer at K = 144, a group starts at the left edge in 95 % of
images and in the middle of the first row in 5 to 9 %. So a generator keeps how many images had a group's start at each
cell, for each K and class.

Axes: B batch, M choices of K (1 without merge instruction), C classes, "labels" these and the null class, L raster
tokens, K codes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.tokenizer.tome import group_starts


def new_counts(config: GeneratorConfig) -> Int[Array, "M C L"]:
    """Counts before the first image."""
    return jnp.zeros((len(_keeps(config)), config.num_classes, config.length), jnp.int32)


def count_starts(
    counts: Int[Array, "M C L"],
    labels: Int[Array, "B"],
    source_map: Int[Array, "B L"],
    *,
    config: GeneratorConfig,
    keep: int,
) -> Int[Array, "M C L"]:
    """The counts with a batch of images that have K = `keep` groups each."""
    return counts.at[_keeps(config).index(keep), labels[:, None], group_starts(source_map, keep)].add(1)


def shares(counts: Int[Array | np.ndarray, "M C L"], config: GeneratorConfig) -> Float[Array, "M labels L"]:
    """Share of images in which a group starts at a cell; every L of them add up to K.

    The last row of each M is of all classes together, for the null class. So that every share is known, one image is
    added to a class that is like all classes together, and to these one with all cells but the first equally likely:
    the first cell starts a group in every image.
    """
    rest = (np.asarray(_keeps(config)) - 1) / max(config.length - 1, 1)
    equal = jnp.broadcast_to(jnp.asarray(rest, jnp.float32)[:, None, None], (len(rest), 1, config.length))
    together = _mean_with(counts.sum(axis=1, keepdims=True), equal.at[:, :, 0].set(1.0))
    return jnp.concatenate([_mean_with(counts, together), together], axis=1)


def _mean_with(counts: Int[Array | np.ndarray, "M n L"], one: Float[Array, "M 1 L"]) -> Float[Array, "M n L"]:
    """The share in the counted images and one more."""
    return (counts + one) / (counts[:, :, :1] + 1)


@functools.partial(jax.jit, static_argnames="count")
def draw_positions(shares: Float[Array, "B L"], keys: Key[Array, "B"], count: int) -> Int[Array, "B K"]:
    """K = `count` raster positions in random order, each cell with the probability that is its share.

    Systematic sampling of cells in random order (Madow, 1949): with the shares laid end to end on a line, which is K
    long, the cells are drawn in which a point of a ruler of step 1 and random start lies.

    Args:
      shares: up to 1, with a sum of K for each example.
      keys: one for each example.
    """

    def draw(shares, key):
        arrange, start, shuffle = jax.random.split(key, 3)
        cells = jax.random.permutation(arrange, shares.shape[0])
        points = jnp.floor(jnp.cumsum(shares[cells]) + jax.random.uniform(start))
        drawn = jnp.diff(points, prepend=0) > 0
        certain = shares[cells] >= 1  # first in the ranking, as rounding might lose one of them
        ranked = jax.lax.top_k(drawn.astype(jnp.int32) + certain, count)[1]
        return jax.random.permutation(shuffle, cells[ranked])

    return jax.vmap(draw)(shares, keys)


def _keeps(config: GeneratorConfig) -> tuple[int, ...]:
    return config.keeps if config.merge_instruction else (config.length,)
