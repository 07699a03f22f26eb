"""Token merging (ToMe, arXiv 2210.09461) with static shapes and source maps instead of matrices.

`source_map[b, l]` is the kept token that raw token l went into. The paper's matrix S (section 3.2) is its one-hot form
and is never built: maps compose by a gather, and S^T z is a gather as well.

Axes: B batch, L raw tokens, T tokens before and K after a merge (with the class token, if any), D width.
"""

import bisect
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Plain indexing handles negative indices. XLA on CPUs fuses the bookkeeping of all layers and then emits the index of
# every layer's gather twice: compiling 12 layers takes minutes and gigabytes.
_IN_RANGE = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


@flax.struct.dataclass
class Matching:
    """Which tokens stay and which one each merged token joins."""

    kept: Int[Array, "B K"]  # tokens that stay, in their new order
    source: Int[Array, "B r"]  # tokens that are merged away
    target: Int[Array, "B r"]  # where in `kept` each of them goes


def merge_counts(raw: int, keep: int, layers: int) -> tuple[int, ...]:
    """Tokens merged in each layer: a linear fall from 1.5 r to 0.5 r whose sum is exactly raw - keep.

    r is the integer whose schedule comes closest to raw - keep; the first layer makes up the difference. If a layer
    would then merge more than half of its tokens or a negative number, the next closest r is tried.

    Raises:
      ValueError: keep is not in 1..raw, or no r fits.
    """
    total = raw - keep
    if keep < 1 or total < 0:
        raise ValueError(f"cannot keep {keep} of {raw} tokens: allowed are 1 to {raw}")
    if layers < 1:
        if total:
            raise ValueError(f"cannot merge {raw} tokens to {keep} without transformer blocks")
        return ()
    counts = _closest_schedule(raw, keep, layers)
    if counts is None:
        possible = functools.partial(_closest_schedule, raw, layers=layers)
        fewest = bisect.bisect_left(range(raw), True, lo=keep, key=lambda keep: possible(keep) is not None)
        raise ValueError(
            f"cannot keep {keep} of {raw} tokens in {layers} layers, each of which merges at most half of its tokens: "
            f"allowed are {fewest} to {raw}"
        )
    return counts


def _closest_schedule(raw: int, keep: int, layers: int) -> tuple[int, ...] | None:
    total = raw - keep
    schedules = (_linear_schedule(r, layers) for r in range(raw + 1))
    for counts in sorted(schedules, key=lambda counts: abs(sum(counts) - total)):
        counts = (counts[0] + total - sum(counts), *counts[1:])
        before = raw - np.cumsum((0, *counts[:-1]))
        if counts[0] >= 0 and np.all(counts <= before // 2):
            return counts
    return None


def _linear_schedule(r: int, layers: int) -> tuple[int, ...]:
    first = 3 * r // 2
    last = 2 * r - first
    if layers == 1:
        return (r,)
    return tuple((first * (layers - 1) + (last - first) * i) // (layers - 1) for i in range(layers))


def bipartite_soft_matching(metric: Float[Array, "B T D"], r: int, *, class_token: bool = False) -> Matching:
    """Pairs each even token with its most similar odd one and merges the r most similar pairs.

    Args:
      metric: token features (keys averaged over heads); compared by cosine, in float32, without gradient.
      r: pairs to merge, at most half of the tokens (the class token not counted).
      class_token: token 0 never merges.

    Returns:
      Matching with K = T - r, whose `kept` are the even tokens that stay, in order, then the odd ones.

    Raises:
      ValueError: r is out of range.
    """
    tokens = metric.shape[1]
    limit = (tokens - class_token) // 2
    if not 0 <= r <= limit:
        raise ValueError(f"cannot merge {r} of {tokens} tokens in one step: allowed are 0 to {limit}")
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    # Zero vectors get similarity 0. As 0 / 0 they would sort behind the class token, which would then merge.
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = jnp.einsum("bsd,btd->bst", even, odd, precision="highest")
    best, partner = scores.max(-1), scores.argmax(-1)
    if class_token:
        best = best.at[:, 0].set(-jnp.inf)
    merged, staying = _highest(best, r)
    odd_index = jnp.broadcast_to(jnp.arange(1, tokens, 2), odd.shape[:2])
    return Matching(
        kept=jnp.concatenate([2 * staying, odd_index], axis=1),
        source=2 * merged,
        target=staying.shape[1] + _take(partner, merged),
    )


def _highest(values: Float[Array, "B N"], r: int) -> tuple[Int[Array, "B r"], Int[Array, "B others"]]:
    """Indices of the r highest values, the highest first, and of the others, in order; NaN counts as -inf.

    Counts instead of sorting: each layer would have two sorts, and XLA's TPU compiler takes long over a sort.
    """
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    index = jnp.arange(values.shape[1], dtype=jnp.int32)
    first, second = values[:, :, None], values[:, None, :]
    above = (first > second) | ((first == second) & (index[:, None] < index[None])[None])
    rank = jnp.sum(above, axis=1, dtype=jnp.int32)
    others = rank >= r
    place = jnp.where(others, r - 1 + jnp.cumsum(others, axis=1, dtype=jnp.int32), rank)
    order = jnp.sum(jnp.where(place[:, :, None] == index[None, None], index[None, :, None], 0), axis=1, dtype=jnp.int32)
    return order[:, :r], order[:, r:]


# The choices of `TokenizerConfig.merge_rule`, by name; add others here. A rule chooses r pairs from the tokens' metric
# [B, T, d]; with class_token, token 0 never merges.
MERGE_RULES: dict[str, Callable[..., Matching]] = {"tome": bipartite_soft_matching}


def merge(
    matching: Matching, x: Float[Array, "B T D"], size: Float[Array, "B T"]
) -> tuple[Float[Array, "B K D"], Float[Array, "B K"]]:
    """Size-weighted mean of the tokens that a matching joins, and the new sizes; sums in float32."""
    weighted = x.astype(jnp.float32) * size[..., None]
    new_size = _sum_into(matching, size[..., None])
    merged = _sum_into(matching, weighted) / new_size
    return merged.astype(x.dtype), new_size[..., 0]


def _sum_into(matching: Matching, x: Float[Array, "B T D"]) -> Float[Array, "B K D"]:
    kept, gone = _take(x, matching.kept), _take(x, matching.source)
    return jax.vmap(lambda to, target, rows: to.at[target].add(rows, **_IN_RANGE))(kept, matching.target, gone)


def merge_source_map(matching: Matching, source_map: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """A source map after one more merge."""

    def new_tokens(kept, source, target):
        token = jnp.zeros(kept.shape[0] + source.shape[0], source_map.dtype)
        token = token.at[kept].set(jnp.arange(kept.shape[0], dtype=source_map.dtype), **_IN_RANGE)
        return token.at[source].set(target.astype(source_map.dtype), **_IN_RANGE)

    return _take(jax.vmap(new_tokens)(matching.kept, matching.source, matching.target), source_map)


def _take(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b]] for every b."""
    return jax.vmap(lambda x, index: x.at[index].get(**_IN_RANGE))(x, index)


def unmerge(tokens: Float[Array, "B K D"], source_map: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Gives every raw position the token of its group: the paper's S^T z as one gather."""
    return jnp.take_along_axis(tokens, source_map[..., None], axis=1)


def group_starts(source_map: Int[Array, "B L"], keep: int) -> Int[Array, "B K"]:
    """First raster position of each group; L for an empty group."""
    length = source_map.shape[1]
    index = jnp.arange(length, dtype=source_map.dtype)
    return jax.vmap(lambda groups: jnp.full(keep, length, groups.dtype).at[groups].min(index))(source_map)
