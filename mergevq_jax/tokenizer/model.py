"""The tokenizer: pure functions of its parameters, and `Tokenizer`, which holds parameters and has a folder on disk.

Axes: B batch, H W image, h w grid of raw tokens, L = h w, K kept tokens, C channels of a code.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mergevq_jax import model_folder
from mergevq_jax.tokenizer import convert, tome
from mergevq_jax.tokenizer.config import TokenizerConfig, ratio_keep
from mergevq_jax.tokenizer.decoder import Decoder
from mergevq_jax.tokenizer.encoder import Encoded, Encoder
from mergevq_jax.tokenizer.quantizers.quantizer import QUANTIZERS, Quantizer
from mergevq_jax.tokenizer.recovery import SourceRecovery, recovered_source_map
from runtime_jax.files import path_of
from runtime_jax.finite import all_finite, check_finite
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import key_shape
from runtime_jax.sharding import constrain

Params = dict[str, Any]
MODEL_TYPE = "mergevq_tokenizer"


class _AllModules(nn.Module):
    """Runs every module once; its parameters are a tokenizer's."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, images):
        config = self.config
        encoded = Encoder(config, name="encoder")(images, keep=config.keep, with_head=config.dist_head is not None)
        if config.recovery is not None:
            starts = tome.group_starts(encoded.source_map, config.keep)
            recovery = _source_recovery(config, name="recovery")
            recovery(encoded.z, starts)
        grid = config.grid(*images.shape[1:3])
        Decoder(config, name="decoder")(jnp.zeros((images.shape[0], *grid, config.z_channels)))


def init_params(config: TokenizerConfig, key: Array) -> Params:
    """Random parameters: {"encoder": ..., "decoder": ..., "recovery": ...}, float32."""
    images = jnp.zeros((1, config.resolution, config.resolution, config.in_channels))
    return _AllModules(config).init(key, images)["params"]


def param_shapes(config: TokenizerConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing anything."""
    return jax.eval_shape(functools.partial(init_params, config), key_shape())


def encode(
    params: Params,
    config: TokenizerConfig,
    images: Float[Array, "B H W 3"],
    *,
    keep: int,
    with_head: bool = False,
    compute: Compute = Compute(),
) -> Encoded:
    """Images to the features of their kept tokens (paper section 3.2), which `quantize` turns into codes.

    Args:
      params: from `init_params` or a loaded tokenizer.
      images: float pixels in [-1, 1].
      keep: K; static.
      with_head: also compute the alignment head.

    Raises:
      ValueError: impossible image size or K, or no alignment head.
    """
    return Encoder(config, compute).apply({"params": params["encoder"]}, images, keep=keep, with_head=with_head)


def quantize(config: TokenizerConfig, z: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Features to the codes of the config's quantizer, with a gradient."""
    return QUANTIZERS[config.quantizer].quantize(z)


def decode(
    params: Params,
    config: TokenizerConfig,
    codes: Float[Array, "B K C"],
    source_map: Int[Array, "B L"],
    grid: tuple[int, int],
    *,
    compute: Compute = Compute(),
) -> Float[Array, "B H W 3"]:
    """Codes of the kept tokens, unmerged by `source_map`, to images, nominally in [-1, 1] but not clipped.

    Args:
      codes: from `quantize`.
      source_map: kept token of each raw position, 0 to K - 1.
      grid: (h, w), static.
    """
    full = tome.unmerge(codes, source_map)
    full = full.reshape(full.shape[0], *grid, full.shape[-1])
    return Decoder(config, compute).apply({"params": params["decoder"]}, full)


def recover(
    params: Params,
    config: TokenizerConfig,
    codes: Float[Array, "B K C"],
    group_starts: Int[Array, "B K"] | None = None,
    *,
    compute: Compute = Compute(),
) -> Float[Array, "B L K"]:
    """Logits of the source map from the codes, and from where their groups start if the config reads that.

    See `SourceRecovery`.

    Raises:
      ValueError: this tokenizer has no source recovery, or it needs `group_starts`.
    """
    if config.recovery is None:
        raise ValueError("this tokenizer has no source recovery (config.recovery is None)")
    if config.recovers_from_starts and group_starts is None:
        raise ValueError("this tokenizer's source recovery reads where groups start: give group_starts")
    return _source_recovery(config, compute).apply({"params": params["recovery"]}, codes, group_starts)


def _source_recovery(config: TokenizerConfig, compute: Compute = Compute(), name: str | None = None) -> SourceRecovery:
    groups = config.norm_num_groups
    return SourceRecovery(config.recovery, config.raw_tokens, groups, config.layer_scale, compute, name=name)


@flax.struct.dataclass
class Tokens:
    """Images as tokens."""

    indices: Int[Array, "B K"]  # of each kept token's code
    source_map: Int[Array, "B L"]  # kept token of each raw position
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)  # (h, w)

    @property
    def group_starts(self) -> Int[Array, "B K"]:
        """Raster position of each group's first member; L for an empty group."""
        return tome.group_starts(jnp.asarray(self.source_map), self.indices.shape[1])


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its weights.

    >>> tokenizer = Tokenizer.from_pretrained("folder")
    >>> tokens = tokenizer.encode(images, keep=144)        # uint8 [B, H, W, 3]
    >>> images = tokenizer.decode(tokens)                  # uint8 [B, H, W, 3]
    """

    config: TokenizerConfig
    params: Params
    compute: Compute = Compute()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, compute: Compute = Compute()) -> "Tokenizer":
        """Loads a folder with config.json and model.safetensors, a hub id, or a shipped tokenizer by its name.

        Raises:
          ValueError: the folder, a file in it or a parameter is missing; another kind of model; an unknown quantizer.
        """
        folder = model_folder.find_folder(path, "tokenizer")
        config = read_tokenizer_config(folder)
        params = model_folder.read_params(folder, convert.tokenizer_table(config), param_shapes(config))
        return cls(config, params, compute)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors (with the released state-dict names), each atomically."""
        table = convert.tokenizer_table(self.config)
        model_folder.write_folder(path_of(path), MODEL_TYPE, self.config, table, self.params)

    def fingerprint(self) -> str:
        """SHA-256 of config and parameters: one tokenizer's codes mean nothing to another."""
        return model_folder.fingerprint(self.config, convert.tokenizer_table(self.config), self.params)

    def code_fingerprint(self) -> str:
        """SHA-256 of what makes the codes: all but decoder, source recovery and alignment head."""
        config = replace(self.config, recovery=None, dist_head=None, num_classes=768, num_rep_blocks=0)
        encoder = {name: params for name, params in self.params["encoder"].items() if name != "head"}
        return model_folder.fingerprint(config, convert.encoder_table(config), encoder)

    def made(self, fingerprint: str) -> bool:
        """Whether codes with this fingerprint are this tokenizer's; older files hold `fingerprint()` in its place."""
        return fingerprint in (self.code_fingerprint(), self.fingerprint())

    def recovered(self, tokens: "Tokens") -> "Tokens":
        """The tokens with the source map that source recovery predicts from what it reads of them; as `recover`."""
        starts = tokens.group_starts if self.config.recovers_from_starts else None
        return tokens.replace(source_map=self.recover(tokens.indices, starts))

    def encode(
        self, images: UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"], *, keep: int | None = None
    ) -> Tokens:
        """Images to indices and source maps. `keep` defaults to the config's fraction at this image size.

        Raises:
          ValueError: not uint8 [B, H, W, 3], or impossible image size or keep.
          NotFiniteError: features that are not finite.
        """
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != self.config.in_channels:
            raise ValueError(
                f"images must be uint8 [B, H, W, {self.config.in_channels}], got {images.dtype} {images.shape}"
            )
        grid = self.config.grid(*images.shape[1:3])
        keep = ratio_keep(self.config, grid[0] * grid[1]) if keep is None else keep
        indices, source_map, finite = _encode_images(
            self.params, images, self.config, keep, self.compute, _entries(self.config)
        )
        check_finite({"the encoder's features": finite}, {"tokenizer": self.params})
        return Tokens(indices=indices, source_map=source_map, grid=grid)

    def decode(self, tokens: Tokens) -> UInt8[Array, "B H W 3"]:
        """Indices and source maps back to images.

        Raises:
          NotFiniteError: pixels that are not finite.
        """
        images, finite = _decode_tokens(self.params, tokens, self.config, self.compute, _entries(self.config))
        check_finite({"the decoder's images": finite}, {"tokenizer": self.params})
        return images

    def recover(self, indices: Int[Array, "B K"], group_starts: Int[Array, "B K"] | None = None) -> Int[Array, "B L"]:
        """Predicts the source map of a training-size image from its codes (paper section 3.3).

        Args:
          group_starts: raster position of each group's first member, if known; see `recovered_source_map`.

        Raises:
          ValueError: this tokenizer has no source recovery, or it needs `group_starts`.
          NotFiniteError: logits that are not finite.
        """
        source_map, finite = _recover_source_map(
            self.params, indices, group_starts, self.config, self.compute, _entries(self.config)
        )
        check_finite({"source recovery's logits": finite}, {"tokenizer": self.params})
        return source_map

    def reconstruct(
        self, images: UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"], *, keep: int | None = None
    ) -> UInt8[Array, "B H W 3"]:
        """decode(encode(images))."""
        return self.decode(self.encode(images, keep=keep))


def load_tokenizer(source: str | os.PathLike, *, compute: Compute = Compute()) -> Tokenizer:
    """Loads a shipped tokenizer by its name ("tiny"), a folder or a hub id.

    Raises:
      ValueError: as `Tokenizer.from_pretrained`.
    """
    return Tokenizer.from_pretrained(source, compute=compute)


def read_tokenizer_config(source: str | os.PathLike) -> TokenizerConfig:
    """Reads the config.json of a tokenizer without its weights.

    Raises:
      ValueError: as `Tokenizer.from_pretrained`.
    """
    path = model_folder.find_folder(source, "tokenizer") / model_folder.CONFIG_NAME
    return model_folder.read_config(path, TokenizerConfig, MODEL_TYPE, "tokenizer")


def to_float(images: UInt8[Array, "*shape"] | UInt8[np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """0..255 to [-1, 1]."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """[-1, 1], clipped, to 0..255."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def _entries(config: TokenizerConfig) -> tuple[Quantizer, Callable]:
    """What the config's names stand for: static too, so that programs are compiled anew where an entry is replaced."""
    return QUANTIZERS[config.quantizer], tome.MERGE_RULES[config.merge_rule]


@functools.partial(jax.jit, static_argnames=("config", "keep", "compute", "entries"))
def _encode_images(params, images, config, keep, compute, entries):
    encoded = encode(params, config, to_float(images), keep=keep, compute=compute)
    # Replicated, so that each host of a pod can read them.
    indices, source_map = entries[0].to_indices(encoded.z), encoded.source_map
    return constrain(indices, None, None), constrain(source_map, None, None), all_finite(encoded.z)


@functools.partial(jax.jit, static_argnames=("config", "compute", "entries"))
def _recover_source_map(params, indices, group_starts, config, compute, entries):
    codes = entries[0].from_indices(indices, config.z_channels)
    logits = recover(params, config, codes, group_starts, compute=compute)
    return constrain(recovered_source_map(logits, group_starts), None, None), all_finite(logits)


@functools.partial(jax.jit, static_argnames=("config", "compute", "entries"))
def _decode_tokens(params, tokens, config, compute, entries):
    codes = entries[0].from_indices(tokens.indices, config.z_channels)
    images = decode(params, config, codes, tokens.source_map, tokens.grid, compute=compute)
    return constrain(to_uint8(images), None, None, None, None), all_finite(images)
