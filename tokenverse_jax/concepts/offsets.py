"""Directions of the modulation space without training, and offsets on the tokens of a word (TokenVerse's M and M+).

The same direction is a step in M as Flux's `global_offset`, and in M+ as `offsets`, placed on the tokens of one word.
Axes: B batch, T text tokens, n tokens of a word, D width, P width of the pooled text vector.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenverse_jax.flux.layers import MLPEmbedder
from tokenverse_jax.flux.model import FluxConfig, Params


def direction(
    config: FluxConfig, params: Params, attribute: Float[Array, "B P"], neutral: Float[Array, "B P"]
) -> Float[Array, "B D"]:
    """MLP(t, attribute) - MLP(t, neutral), such as that from "a dog" to "a poodle dog"; float32.

    The modulation vector is a sum of embedded time, guidance and text: the first two cancel, and the direction is the
    same at all t.

    Args:
      config: of the FLUX model.
      params: of the FLUX model; only vector_in's are used.
      attribute: CLIP's pooled output for the prompt with the attribute.
      neutral: the same for the prompt without it.
    """
    embedder, variables = MLPEmbedder(config.width), {"params": params["vector_in"]}
    return embedder.apply(variables, attribute) - embedder.apply(variables, neutral)


def place_on_tokens(offset: Float[Array, "..."], places: Sequence[int], length: int) -> Float[Array, "... T D"]:
    """Zeros for a text of `length` tokens, but for the offset at `places`.

    Args:
      offset: [D], the same on all places, or [..., n, D], one for each.
      places: token positions, see `text.find_word`.
      length: T.

    Raises:
      ValueError: no places, places that repeat or lie outside the text, or not as many as `offset` has.
    """
    if not places or len(set(places)) < len(places) or min(places) < 0 or max(places) >= length:
        raise ValueError(f"places {tuple(places)}: different tokens of a text of {length} are needed")
    if offset.ndim == 1:
        offset = jnp.broadcast_to(offset, (len(places), *offset.shape))
    if offset.shape[-2] != len(places):
        raise ValueError(f"an offset of {offset.shape[-2]} tokens does not fit the places {tuple(places)}")
    rest = jnp.zeros((*offset.shape[:-2], length, offset.shape[-1]), offset.dtype)
    return rest.at[..., jnp.asarray(places), :].set(offset)
