"""Directions of the modulation space without training, in TokenVerse's spaces M and M+.

The same direction is a step in M as `Offsets.everywhere`, and in M+ as `Offsets.shared` on the tokens of one word.
Axes: B batch, D width, P width of the pooled text vector.
"""

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
