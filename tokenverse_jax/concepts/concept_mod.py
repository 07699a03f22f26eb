"""Concept-Mod: from a caption's T5 outputs to a direction in modulation space for each of its tokens (TokenVerse).

Axes: B batch, T text tokens, J width of the text encoder, D width of the modulation vector, V captions of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from runtime_jax.sharding import Axis, Rule, constrain
from tokenverse_jax.flux.offsets import Offsets

Params = dict[str, Any]

SHARDING_RULES: tuple[Rule, ...] = (
    (r"in_layer/kernel", (Axis.EMBED, Axis.MLP)),
    (r"out_layer/kernel", (Axis.MLP, Axis.EMBED)),
    (r"(in|out)_layer/bias", ()),
)


@dataclass(frozen=True, kw_only=True)
class ConceptModConfig:
    """Hidden widths; inputs and outputs have the base model's."""

    hidden: int = 3072
    block_hidden: int = 512

    def __post_init__(self):
        if min(self.hidden, self.block_hidden) < 1:
            raise ValueError(f"hidden={self.hidden}, block_hidden={self.block_hidden}: positive widths are needed")


class ConceptMod(nn.Module):
    """Linear, GELU, linear, in float32. The last layer starts at zero, so training starts exactly at the base model."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, txt: Float[Array, "B T J"]) -> Float[Array, "B T features"]:
        hidden = nn.Dense(self.hidden, dtype=jnp.float32, name="in_layer")(txt)
        hidden = constrain(nn.gelu(hidden, approximate=True), Axis.BATCH, None, Axis.MLP)
        last = nn.Dense(self.features, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="out_layer")
        return constrain(last(hidden), Axis.BATCH, None, None)


class BlockHead(nn.Module):
    """The second stage's MLP: a vector for every block and token, added to Concept-Mod's."""

    hidden: int
    num_blocks: int
    width: int

    @nn.compact
    def __call__(self, txt: Float[Array, "B T J"]) -> Float[Array, "B blocks T D"]:
        x = ConceptMod(self.hidden, self.num_blocks * self.width, name="mlp")(txt)
        return rearrange(x, "b t (blocks d) -> b blocks t d", blocks=self.num_blocks)


def init_params(
    config: ConceptModConfig, key: Array, *, text_width: int, width: int, num_blocks: int | None = None
) -> Params:
    """Parameters {"concept_mod": ...}, with `num_blocks` (of the FLUX model) also {"block_head": ...} for stage 2.

    `text_width`: J, the FLUX model's `joint_attention_dim`; `width`: D. The same "concept_mod" with and without blocks.
    """
    txt = jnp.zeros((1, 1, text_width))
    params = {"concept_mod": ConceptMod(config.hidden, width).init(jax.random.fold_in(key, 0), txt)["params"]}
    if num_blocks is not None:
        head = BlockHead(config.block_hidden, num_blocks, width)
        params["block_head"] = head.init(jax.random.fold_in(key, 1), txt)["params"]
    return params


def directions(params: Params, txt: Float[Array, "B T J"], mask: Bool[Array, "B T"] | None = None) -> Offsets:
    """A direction for each token, and per block too (None for the first stage's `params`).

    Args:
      params: of `init_params`; all sizes are theirs.
      txt: T5's outputs.
      mask: the tokens that get a direction, all others get zero; None: all. Padding belongs to no caption.
    """
    hidden, width = params["concept_mod"]["out_layer"]["kernel"].shape
    shared, per_block = ConceptMod(hidden, width).apply({"params": params["concept_mod"]}, txt), None
    if "block_head" in params:
        block_hidden, features = params["block_head"]["mlp"]["out_layer"]["kernel"].shape
        head = BlockHead(block_hidden, features // width, width)
        per_block = head.apply({"params": params["block_head"]}, txt)
    if mask is not None:
        shared = jnp.where(mask[:, :, None], shared, 0)
        per_block = None if per_block is None else jnp.where(mask[:, None, :, None], per_block, 0)
    return Offsets(shared, per_block)


def word_directions(params: Params, txt: Float[Array, "V T J"], positions: Sequence[Sequence[int]]) -> Offsets:
    """One word's directions, shared [n, D] and per_block [blocks, n, D], the mean over captions that contain it.

    A concept file stores them for the captions of training; for a single prompt they are recomputed from it.

    Args:
      params: of `init_params`.
      txt: T5's outputs for each caption.
      positions: of the word's tokens in each caption, see `words.find_word`.

    Raises:
      ValueError: not one list of positions for each caption, positions outside the text, or different token counts.
    """
    captions, length, _ = txt.shape
    if captions == 0 or len(positions) != captions:
        raise ValueError(f"{len(positions)} lists of positions for {captions} captions: one for each is needed")
    counts = sorted({len(row) for row in positions})
    if len(counts) > 1 or counts == [0]:
        raise ValueError(f"the word has {counts} tokens in the captions, but needs the same number in each")
    if any(not 0 <= position < length for row in positions for position in row):
        raise ValueError(f"positions {list(map(list, positions))} are not all within a text of {length} tokens")
    index = jnp.asarray(positions)[:, :, None]
    # No layer mixes tokens, so only the word's tokens go through: the directions of all blocks are large.
    own = directions(params, jnp.take_along_axis(txt, index, axis=1))
    return jax.tree.map(lambda part: part.mean(axis=0), own)
