"""Encode and decode, with a flag for each image, so that NaN in one image does not hide the others.

The decoder is compiled once for all K: it takes the code of each raster token.

Axes: B batch, H W image, K kept tokens, L raster tokens, C channels of a code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from mergevq_jax.tokenizer import tome
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.model import Params, Tokenizer, decode, encode, recover, to_float, to_uint8
from mergevq_jax.tokenizer.quantizers.quantizer import QUANTIZERS, Quantizer
from mergevq_jax.tokenizer.recovery import recovered_source_map
from runtime_jax.nn.compute import Compute

Flags = Bool[Array, "B"]


class Decoded(NamedTuple):
    """Images that were decoded."""

    images: UInt8[Array, "B H W 3"]
    finite: Flags  # whether the features and pixels of each image are


class RoundTrip(NamedTuple):
    """Codes, and what was decoded from them with each source map."""

    indices: Int[Array, "B K"]
    true: Decoded
    recovered: Decoded | None  # None: no source recovery


class _Static(NamedTuple):
    """What programs are compiled for; entries that the config names may be replaced."""

    config: TokenizerConfig
    compute: Compute
    quantizer: Quantizer
    merge_rule: Callable[..., Any]


def round_trip(tokenizer: Tokenizer, images: UInt8[Array, "B H W 3"], keep: int) -> RoundTrip:
    """Encodes and decodes training-size images with the true source map and, where it can, the recovered one."""
    config = tokenizer.config
    static = _Static(config, tokenizer.compute, QUANTIZERS[config.quantizer], tome.MERGE_RULES[config.merge_rule])
    indices, starts, codes, finite = _encode(tokenizer.params, images, static, keep)
    true = _decode(tokenizer.params, codes, finite, static)
    if config.recovery is None:
        return RoundTrip(indices, true, None)
    starts = starts if config.recovers_from_starts else None
    codes, recovered = _recover(tokenizer.params, indices, starts, static)
    return RoundTrip(indices, true, _decode(tokenizer.params, codes, finite & recovered, static))


@functools.partial(jax.jit, static_argnames=("static", "keep"))
def _encode(
    params: Params, images: UInt8[Array, "B H W 3"], static: _Static, keep: int
) -> tuple[Int[Array, "B K"], Int[Array, "B K"], Float[Array, "B L C"], Flags]:
    encoded = encode(params, static.config, to_float(images), keep=keep, compute=static.compute)
    indices = static.quantizer.to_indices(encoded.z)
    starts = tome.group_starts(encoded.source_map, keep)
    return indices, starts, _raster(indices, encoded.source_map, static), _finite(encoded.z)


@functools.partial(jax.jit, static_argnames="static")
def _recover(
    params: Params, indices: Int[Array, "B K"], starts: Int[Array, "B K"] | None, static: _Static
) -> tuple[Float[Array, "B L C"], Flags]:
    codes = static.quantizer.from_indices(indices, static.config.z_channels)
    logits = recover(params, static.config, codes, starts, compute=static.compute)
    return _raster(indices, recovered_source_map(logits, starts), static), _finite(logits)


@functools.partial(jax.jit, static_argnames="static")
def _decode(params: Params, codes: Float[Array, "B L C"], finite: Flags, static: _Static) -> Decoded:
    config, own = static.config, np.arange(codes.shape[1], dtype=np.int32)
    grid = config.grid(config.resolution, config.resolution)
    source_map = jnp.broadcast_to(own[None], codes.shape[:2])
    images = decode(params, config, codes, source_map, grid, compute=static.compute)
    return Decoded(to_uint8(images), finite & _finite(images))


def _raster(indices: Int[Array, "B K"], source_map: Int[Array, "B L"], static: _Static) -> Float[Array, "B L C"]:
    return tome.unmerge(static.quantizer.from_indices(indices, static.config.z_channels), source_map)


def _finite(x: Float[Array, "B ..."]) -> Flags:
    return jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
