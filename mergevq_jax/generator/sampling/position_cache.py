"""MergeAR's compressed KV cache, and the position cache that records what is in it (paper section 4.2).

The KV cache has C = P + T slots: P for the prefix, and T = window + 1 + capacity for raster tokens: those in the
window, the current one, and `capacity` older ones. All raster tokens share one pool of slots. A token's keys and values
are written once, to a free slot, and never move. A token is a duplicate if its code equals that of an earlier first
occurrence that is still in the cache. A duplicate's slot is free once it has left the window; first occurrences stay.
When more than `capacity` of them have left the window, a policy of `POLICIES` chooses the one to evict:

    evict-oldest   the one with the smallest position
    full           the one that has just left the window

Each eviction adds one to the example's count of overflows.

Axes: B examples, R rows (examples, or twice as many under guidance), P prefix tokens, T and C slots, H heads, n tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from runtime_jax.sharding import Axis, constrain

EMPTY = -1  # the position in a slot that is free
HIDDEN = -1e30  # a logit that no softmax sees


# From the slots' positions, and which of them are first occurrences outside the window, to the position to evict; used
# only where there are more than `capacity` of these.
CachePolicy = Callable[[Int[Array, "B T"], Bool[Array, "B T"]], Int[Array, "B"]]


def _oldest(positions: Int[Array, "B T"], kept: Bool[Array, "B T"]) -> Int[Array, "B"]:
    return jnp.min(jnp.where(kept, positions, jnp.iinfo(jnp.int32).max), axis=1)


def _newest(positions: Int[Array, "B T"], kept: Bool[Array, "B T"]) -> Int[Array, "B"]:
    return jnp.max(jnp.where(kept, positions, EMPTY), axis=1)


# By name. A policy added here can be SamplingConfig.policy and --policy.
POLICIES: dict[str, CachePolicy] = {"evict-oldest": _oldest, "full": _newest}


class PositionCache(NamedTuple):
    """What is in the T slots for raster tokens; the same for all layers, and for both rows of a guided example."""

    indices: Int[Array, "B T"]  # codes
    positions: Int[Array, "B T"]  # raster positions, or EMPTY
    first: Bool[Array, "B T"]  # first occurrences
    overflows: Int[Array, "B"]


class Placed(NamedTuple):
    """A token's slot, and whether it is a first occurrence."""

    cache: PositionCache
    slot: Int[Array, "B"]  # of the T
    first: Bool[Array, "B"]


def token_slots(length: int, *, window: int, capacity: int) -> int:
    """T; at most the number of tokens."""
    return min(window + 1 + capacity, length)


def empty_cache(batch: int, slots: int) -> PositionCache:
    """A cache of T slots without tokens."""
    shape = (batch, slots)
    return PositionCache(
        indices=jnp.zeros(shape, jnp.int32),
        positions=jnp.full(shape, EMPTY, jnp.int32),
        first=jnp.zeros(shape, bool),
        overflows=jnp.zeros(batch, jnp.int32),
    )


def insert(
    cache: PositionCache,
    index: Int[Array, "B"],
    position: int | Int[Array, ""],
    *,
    window: int | Int[Array, ""],
    capacity: int | Int[Array, ""],
    policy: CachePolicy,
) -> Placed:
    """Makes room for the next token in raster order and inserts it.

    Args:
      cache: with the tokens before it.
      index: code of the token.
      position: raster position of the token, one more than at the last call.
      window: number of tokens before it that are always kept.
      capacity: number of first occurrences outside the window that are kept.
      policy: chooses the one to evict when there are more.
    """
    positions, overflows = cache.positions, cache.overflows
    outside = (positions != EMPTY) & (positions < position - window)
    kept = outside & cache.first
    victim = policy(positions, kept)
    overflow = jnp.sum(kept, axis=1) > capacity
    gone = (outside & ~cache.first) | (overflow[:, None] & kept & (positions == victim[:, None]))
    positions = jnp.where(gone, EMPTY, positions)

    free = positions == EMPTY
    first = ~jnp.any(~free & cache.first & (cache.indices == index[:, None]), axis=1)
    slot = jnp.argmax(free, axis=1).astype(jnp.int32)
    here = jnp.arange(free.shape[1])[None] == slot[:, None]
    cache = PositionCache(
        indices=jnp.where(here, index[:, None], cache.indices),
        positions=jnp.where(here, position, positions),
        first=jnp.where(here, first[:, None], cache.first),
        overflows=overflows + overflow,
    )
    return Placed(cache, slot, first)


def visible(cache: PositionCache, *, prefix: int, seen: int | Int[Array, ""]) -> Bool[Array, "B C"]:
    """Which of the KV cache's C = P + T slots the newest token sees; `seen` prefix tokens have been written so far."""
    there = jnp.broadcast_to(jnp.arange(prefix)[None] < seen, (cache.positions.shape[0], prefix))
    return jnp.concatenate([there, cache.positions != EMPTY], axis=1)


def kept(cache: PositionCache, length: int) -> Bool[Array, "B L"]:
    """Which of `length` raster tokens are in the KV cache."""
    return jnp.any(cache.positions[:, :, None] == jnp.arange(length)[None, None], axis=1)


class KVCache(NamedTuple):
    """Keys and values of every layer, an array for each: a slice of a stacked array would be a copy.

    A single row has no axis R: with an axis of size 1, XLA copies each array several times per step.
    """

    keys: tuple[Float[Array, "*R H C head"], ...]
    values: tuple[Float[Array, "*R H C head"], ...]


def empty_kv_cache(layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """A KV cache of zeros, which nothing may see."""
    shape = (heads, slots, head_dim) if rows == 1 else (rows, heads, slots, head_dim)

    def arrays():
        return tuple(_constrain(jnp.zeros(shape, dtype)) for _ in range(layers))

    return KVCache(keys=arrays(), values=arrays())


def write(
    array: Float[Array, "*R H C head"], tokens: Float[Array, "R n H head"], slots: Int[Array, "R n"]
) -> Float[Array, "*R H C head"]:
    """Writes new tokens' keys or values of one layer to their slots, in place if the argument is no longer used."""
    tokens = jnp.swapaxes(tokens, 1, 2)
    if array.ndim == 4:
        return _constrain(jax.vmap(_put)(array, tokens, slots))
    if slots.size == 1:  # a scatter of one token is a choice between the old array and the new one: a copy
        return _constrain(jax.lax.dynamic_update_slice_in_dim(array, tokens[0], slots[0, 0], axis=1))
    return _constrain(_put(array, tokens[0], slots[0]))


def _put(
    row: Float[Array, "H C head"], tokens: Float[Array, "H n head"], slots: Int[Array, "n"]
) -> Float[Array, "H C head"]:
    return row.at[:, slots].set(tokens, mode="promise_in_bounds", unique_indices=True)


def _constrain(array: Float[Array, "*R H C head"]) -> Float[Array, "*R H C head"]:
    return constrain(array, *(Axis.BATCH, Axis.HEADS, None, None)[4 - array.ndim :])


def attend(
    query: Float[Array, "R n H head"],
    keys: Float[Array, "*R H C head"],
    values: Float[Array, "*R H C head"],
    visible: Bool[Array, "#R n C"],
) -> Float[Array, "R n H head"]:
    """Attention of each token over the slots visible to it; logits and softmax in float32."""
    query = jnp.swapaxes(query, 1, 2)  # transposes the few tokens, so that no compiler transposes the KV cache
    axes = "rhcd"[4 - keys.ndim :]
    logits = jnp.einsum(f"rhnd,{axes}->rhnc", query, keys, preferred_element_type=jnp.float32)
    logits = jnp.where(visible[:, None], logits * query.shape[-1] ** -0.5, HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    attended = jnp.einsum(f"rhnc,{axes}->rhnd", weights, values, preferred_element_type=jnp.float32)
    return jnp.swapaxes(attended, 1, 2).astype(values.dtype)
