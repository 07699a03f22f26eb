"""MergeAR's attention in training, over the keys that some position can see instead of over all pairs.

Beyond its window a position sees the prefix and the first token of each group: P + K keys of N = P + L. So the logits
are [N, P + K] for these and [N, window + 1] for the window, where a mask of all pairs needs [N, N]: K / L of the FLOPs
and of the memory. The mask depends on the data and its visible columns lie everywhere, so a kernel that skips hidden
blocks would find few to skip.

Axes: B batch, L raster tokens, P prefix tokens, N positions (the last one may be missing), S = P + K keys, H heads.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mergevq_jax.generator.sampling.position_cache import HIDDEN


@flax.struct.dataclass
class MergedKeys:
    """The positions that are visible beyond the window.

    Attributes:
      positions: ascending; in an image with fewer than K groups, the last ones lie after all positions.
      window: number of tokens before a position that it always sees.
    """

    positions: Int[Array, "B S"]
    window: int = flax.struct.field(pytree_node=False)


def merged_keys(first: Int[Array, "B L"], keep: int, *, window: int, prefix: int) -> MergedKeys:
    """The mask of `mask.merge_mask` as positions.

    Args:
      first: of `mask.first_of_group`, with at most `keep` groups in an image.
      keep: K.
      window: recent tokens that are always seen.
      prefix: tokens in front of the raster.
    """
    batch, length = first.shape
    position = jnp.arange(length)[None]
    kept = jnp.sort(jnp.where(first == position, position, length), axis=1)[:, :keep]
    always = jnp.broadcast_to(jnp.arange(prefix)[None], (batch, prefix))
    return MergedKeys(jnp.concatenate([always, prefix + kept], axis=1), window)


def merged_attention(
    query: Float[Array, "B N H D"], key: Float[Array, "B N H D"], value: Float[Array, "B N H D"], keys: MergedKeys
) -> Float[Array, "B N H D"]:
    """`attention` under the mask that `keys` describes; logits and softmax in float32."""
    length, scale = query.shape[1], query.shape[-1] ** -0.5
    positions, offsets = jnp.arange(length), range(keys.window + 1)
    chosen = jnp.minimum(keys.positions, length - 1)[:, :, None, None]
    old_key, old_value = (jnp.take_along_axis(x, chosen, axis=1) for x in (key, value))
    old = jnp.einsum("bnhd,bshd->bhns", query, old_key, preferred_element_type=jnp.float32)
    beyond = keys.positions[:, None, :] < (positions - keys.window)[None, :, None]
    old = jnp.where(beyond[:, None], scale * old, HIDDEN)

    near = [jnp.einsum("bnhd,bnhd->bhn", query, _later(key, by), preferred_element_type=jnp.float32) for by in offsets]
    near = [
        jnp.where(positions[None, None] >= by, scale * logits, HIDDEN) for by, logits in zip(offsets, near, strict=True)
    ]

    weights = jax.nn.softmax(jnp.concatenate([old, jnp.stack(near, axis=-1)], axis=-1), axis=-1).astype(value.dtype)
    seen = old.shape[-1]
    result = jnp.einsum("bhns,bshd->bnhd", weights[..., :seen], old_value, preferred_element_type=jnp.float32)
    for by in offsets:
        result += jnp.moveaxis(weights[..., seen + by], 1, 2)[..., None] * _later(value, by)
    return result.astype(value.dtype)


def _later(x: Float[Array, "B N H D"], by: int) -> Float[Array, "B N H D"]:
    """Shifts values `by` positions later, with zeros at the start."""
    return jnp.pad(x, ((0, 0), (by, 0), (0, 0), (0, 0)))[:, : x.shape[1]]
