"""Images of a generator's codes.

Axes: B batch, H W image, L raster tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from mergevq_jax.generator.kinds.randar import Codes
from mergevq_jax.tokenizer.model import Tokenizer, Tokens


def codes_to_images(tokenizer: Tokenizer, indices: Int[Array, "B L"]) -> UInt8[Array, "B H W 3"]:
    """Codes of all raster tokens, in raster order, to images."""
    side = tokenizer.config.resolution
    raster = jnp.broadcast_to(jnp.arange(indices.shape[1]), indices.shape)
    return tokenizer.decode(Tokens(indices=indices, source_map=raster, grid=tokenizer.config.grid(side, side)))


def recovered_to_images(tokenizer: Tokenizer, codes: Codes) -> UInt8[Array, "B H W 3"]:
    """Distinct codes to images: source recovery assigns raster tokens to them.

    Raises:
      ValueError: this tokenizer has no source recovery.
    """
    side = tokenizer.config.resolution
    source_map = tokenizer.recover(codes.indices, codes.positions)
    return tokenizer.decode(
        Tokens(indices=codes.indices, source_map=source_map, grid=tokenizer.config.grid(side, side))
    )
