"""Where groups of merged tokens start: counted while RandAR trains, drawn when it samples.

RandAR draws codes at given positions and does not predict the positions. In training these are the first members of an
image's groups, and their distribution is far from uniform: with the tiny tokenizer at K = 144, a group starts at the
left edge in 95 % of images and in the middle of the first row in 5 to 9 %. So a generator counts, for each K and class,
the images in which a group starts at each cell.

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
    """Share of images in which a group starts at each cell; the L shares add up to K.

    The last label is the null class, with the counts of all classes together. To define every share, each class gets
    one more image with the shares of all classes together, and these one in which all cells but the first are equally
    likely. The first cell starts a group in every image.
    """
    rest = (np.asarray(_keeps(config)) - 1) / max(config.length - 1, 1)
    equal = jnp.broadcast_to(jnp.asarray(rest, jnp.float32)[:, None, None], (len(rest), 1, config.length))
    together = _mean_with(counts.sum(axis=1, keepdims=True), equal.at[:, :, 0].set(1.0))
    return jnp.concatenate([_mean_with(counts, together), together], axis=1)


def _mean_with(counts: Int[Array | np.ndarray, "M n L"], one: Float[Array, "M 1 L"]) -> Float[Array, "M n L"]:
    """The share over the counted images and one more."""
    return (counts + one) / (counts[:, :, :1] + 1)


@functools.partial(jax.jit, static_argnames="count")
def draw_positions(shares: Float[Array, "B L"], keys: Key[Array, "B"], count: int) -> Int[Array, "B K"]:
    """K = `count` raster positions in random order, each cell with the probability that is its share.

    Systematic sampling (Madow, 1949): the shares lie end to end, in random order, on a line of length K. Points at
    distance 1 with a random start choose the cells that they fall into.

    Args:
      shares: up to 1, with a sum of K for each example.
      keys: one for each example.
    """

    def draw(shares, key):
        arrange, start, shuffle = jax.random.split(key, 3)
        cells = jax.random.permutation(arrange, shares.shape[0])
        points = jnp.floor(jnp.cumsum(shares[cells]) + jax.random.uniform(start))
        drawn = jnp.diff(points, prepend=0) > 0
        certain = shares[cells] >= 1  # ranked first, since rounding might lose one
        ranked = jax.lax.top_k(drawn.astype(jnp.int32) + certain, count)[1]
        return jax.random.permutation(shuffle, cells[ranked])

    return jax.vmap(draw)(shares, keys)


def _keeps(config: GeneratorConfig) -> tuple[int, ...]:
    return config.keeps if config.merge_instruction else (config.length,)
