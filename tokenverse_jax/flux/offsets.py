"""Offsets of the modulation vector y: the spaces M and M+ of TokenVerse.

Axes: B batch, T text tokens, R first text tokens, N image tokens, D width.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

OffsetBlocks = Literal["both", "double", "single"]


@struct.dataclass
class Offsets:
    """Offsets of the modulation vector: an argument of `Flux` and of `Pipeline.generate`.

    A pytree of arrays, all optional. The shapes are a batch's; `compose` returns the offsets of one prompt, without B.

    Attributes:
      shared: [B, R, D], for each of the first R <= T text tokens, the same in all blocks that `blocks` names (M+).
      per_block: [B, blocks, R, D], the same for each block by itself, double blocks first; added to `shared`.
      image: [B, N, D], for each image token, in all blocks that `blocks` names.
      everywhere: [B, D], for text and image tokens, in all blocks and in the last layer (M).
      blocks: which blocks take `shared`, `per_block` and `image`; static.
    """

    shared: Any = None
    per_block: Any = None
    image: Any = None
    everywhere: Any = None
    blocks: OffsetBlocks = struct.field(pytree_node=False, default="both")

    def check(self, batch: int, num_blocks: int, text: int, image: int, width: int) -> None:
        """Raises ValueError where the offsets do not fit a batch with `text` (T) and `image` (N) tokens."""
        if self.blocks not in get_args(OffsetBlocks):
            raise ValueError(f"offsets.blocks={self.blocks!r}: allowed are {', '.join(get_args(OffsetBlocks))}")
        given = [part for part in (self.shared, self.per_block) if part is not None and part.ndim > 1]
        rows = min([text, *(part.shape[-2] for part in given)])
        expected = {
            "shared": (batch, rows, width),
            "per_block": (batch, num_blocks, rows, width),
            "image": (batch, image, width),
            "everywhere": (batch, width),
        }
        wrong = [
            f"offsets.{name} has shape {part.shape}, not {shape}"
            for name, shape in expected.items()
            if (part := getattr(self, name)) is not None and part.shape != shape
        ]
        if wrong:
            raise ValueError(f"FLUX: {'; '.join(wrong)}")

    def of_blocks(self, kind: OffsetBlocks, which: slice) -> "Offsets":
        """The part for blocks of a kind, which are `which` of all blocks; `everywhere` is in y already."""
        if self.blocks not in (kind, "both"):
            return NO_OFFSETS
        return Offsets(self.shared, None if self.per_block is None else self.per_block[:, which], self.image)

    def text_tokens(self) -> Float[Array, "B R D"] | None:
        """In a block, where `per_block` is [B, R, D]: the sum for the first R text tokens, None without offsets."""
        if self.shared is None or self.per_block is None:
            return self.per_block if self.shared is None else self.shared
        return self.shared + self.per_block

    def joint_tokens(self, num_tokens: int) -> Float[Array, "B S D"] | None:
        """The same for `num_tokens` joint tokens, text first; without `image` the same as `text_tokens`."""
        text = self.text_tokens()
        if self.image is None:
            return text
        batch, image, width = self.image.shape
        text = jnp.zeros((batch, 0, width), self.image.dtype) if text is None else text
        text = jnp.pad(text, ((0, 0), (0, num_tokens - image - text.shape[1]), (0, 0)))
        return jnp.concatenate([text, self.image], axis=1)

    def repeat(self, num: int) -> "Offsets":
        """A batch of `num` prompts from the offsets of one, which have no B: views of arrays in host memory."""
        return jax.tree.map(lambda part: np.broadcast_to(np.asarray(part), (num, *part.shape)), self)


NO_OFFSETS = Offsets()


def place_on_tokens(offset: Float[Array, "..."], positions: Sequence[int], length: int) -> Float[Array, "... T D"]:
    """The offset at `positions` of a text of `length` tokens, zeros elsewhere.

    Args:
      offset: [D], the same at all positions, or [..., n, D], one for each.
      positions: of tokens, see `words.find_word`.

    Raises:
      ValueError: no positions, positions that repeat or lie outside the text, or not as many as `offset` has.
    """
    if not positions or len(set(positions)) < len(positions) or min(positions) < 0 or max(positions) >= length:
        raise ValueError(f"positions {tuple(positions)}: different tokens of a text of {length} are needed")
    if offset.ndim == 1:
        offset = jnp.broadcast_to(offset, (len(positions), *offset.shape))
    if offset.shape[-2] != len(positions):
        raise ValueError(f"an offset of {offset.shape[-2]} tokens does not fit the positions {tuple(positions)}")
    rest = jnp.zeros((*offset.shape[:-2], length, offset.shape[-1]), offset.dtype)
    return rest.at[..., jnp.asarray(positions), :].set(offset)
