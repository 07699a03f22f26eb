"""The architecture of a tokenizer: one flat record with the released config's names, and the published sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from mergevq_jax.tokenizer import tome
from mergevq_jax.tokenizer.quantizers.quantizer import QUANTIZERS
from runtime_jax.config import added


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """The learned source recovery (paper section 3.3)."""

    rec_embed_dim: int = 512
    num_layers: int = 2  # cross-attention
    num_self_layers: int = 0  # self-attention after them: the paper has two, the released module none
    num_heads: int = 8
    positions: Literal["none", "starts"] = added("none")  # of the kept tokens; see `SourceRecovery`
    num_res_blocks: int = added(3)  # that spread placed tokens over the grid; with positions only


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of encoder, quantizer, decoder and source recovery (the paper's table 1; released `ddconfig`)."""

    resolution: int = 256  # training images, pixels; other multiples of the downsampling work as well
    in_channels: int = 3
    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 1, 2, 4, 8)
    num_res_blocks: int | tuple[int, ...] = 4  # of every level of encoder and decoder, or one number a level
    num_res_extra: int = 1  # more in the decoder, except at the finest level, if num_res_blocks is one number
    norm_num_groups: int = 32  # of every GroupNorm
    num_att_blocks: int = 12
    num_heads: int = 8
    head_dim: int | None = None  # if given, a part has at least width // head_dim heads
    isotropic: int | None = None  # width of the patchify encoder (variant R); None: CNN encoder
    z_channels: int = 18  # channels of a code; for LFQ its bits
    keep: int = 144  # tokens kept of a training image
    layer_scale: float = 1e-5
    dist_head: Literal["layer3", "layer2"] | None = "layer3"
    num_classes: int = 768  # width of the alignment head's output
    num_rep_blocks: int = 0  # blocks before the alignment head
    recovery: RecoveryConfig | None = RecoveryConfig()
    quantizer: str = added("lfq")  # of `QUANTIZERS`
    merge_rule: str = added("tome")  # of `tome.MERGE_RULES`

    def __post_init__(self):
        names = (
            "resolution",
            "ch",
            "ch_mult",
            "norm_num_groups",
            "num_att_blocks",
            "num_heads",
            "head_dim",
            "num_classes",
        )
        fields = {name: getattr(self, name) for name in names}
        if self.recovery is not None:
            fields |= {f"recovery.{name}": getattr(self.recovery, name) for name in ("rec_embed_dim", "num_heads")}
        bad = [f"{name}={value}" for name, value in fields.items() if not _positive(value)]
        if bad:
            raise ValueError(f"tokenizer config: {', '.join(bad)} must be positive")
        levels, problems = len(self.ch_mult), []
        if any(width % self.norm_num_groups for width in self.widths):
            problems.append(
                f"ch={self.ch}, ch_mult={self.ch_mult}: widths {self.widths} must be multiples of "
                f"norm_num_groups={self.norm_num_groups}"
            )
        if isinstance(self.num_res_blocks, tuple) and len(self.num_res_blocks) != levels:
            problems.append(f"num_res_blocks={self.num_res_blocks} must be one number or {levels} (levels of ch_mult)")
        if self.isotropic is None and not problems:
            ends = [width for width, blocks in zip(self.widths, self.encoder_res_blocks, strict=True) if blocks]
            if [self.ch, *ends][-1] != self.widths[-1]:
                problems.append(
                    f"num_res_blocks={self.num_res_blocks}: to change the width, the last level needs blocks"
                )
        if self.recovers_from_starts and self.recovery.rec_embed_dim % self.norm_num_groups:
            problems.append(
                f"recovery.rec_embed_dim={self.recovery.rec_embed_dim} must be a multiple of "
                f"norm_num_groups={self.norm_num_groups}"
            )
        if self.isotropic is not None and (self.isotropic < 1 or self.isotropic % self.norm_num_groups):
            problems.append(
                f"isotropic={self.isotropic} must be a positive multiple of norm_num_groups={self.norm_num_groups}"
            )
        for name, known in (("quantizer", QUANTIZERS), ("merge_rule", tome.MERGE_RULES)):
            if (value := getattr(self, name)) not in known:
                problems.append(f"{name}={value!r} is unknown; known: {', '.join(known)} (add others to these first)")
        if self.quantizer in QUANTIZERS and (self.z_channels < 1 or self.vocab_size > 2**30):
            problems.append(
                f"z_channels={self.z_channels} must be positive and give at most 2^30 codes (int32 indices)"
            )
        if self.resolution % self.downsampling or self.resolution < 2 * self.downsampling:
            problems.append(
                f"resolution={self.resolution} must be a multiple of the downsampling {self.downsampling}, "
                "at least twice it"
            )
        parts = [
            ("encoder", self.encoder_width, self.encoder_heads),
            ("decoder", self.decoder_width, self.decoder_heads),
        ]
        if self.recovery is not None:
            parts.append(("recovery", self.recovery.rec_embed_dim, self.recovery.num_heads))
        for part, width, heads in parts:
            if width % heads:
                problems.append(f"{part}: width {width} does not divide into {heads} heads")
        if problems:
            raise ValueError("tokenizer config: " + "; ".join(problems))
        self.merge_counts(self.raw_tokens, self.keep)

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return QUANTIZERS[self.quantizer].vocab_size(self.z_channels)

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (self.vocab_size - 1).bit_length()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.ch * mult for mult in self.ch_mult)

    @property
    def downsampling(self) -> int:
        """Side of a raw token, in pixels."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def raw_tokens(self) -> int:
        """Raw tokens L of a training image."""
        return (self.resolution // self.downsampling) ** 2

    @property
    def encoder_width(self) -> int:
        """Width of the encoder's transformer."""
        return self.isotropic or self.widths[-1]

    @property
    def decoder_width(self) -> int:
        """Width of the decoder's transformer."""
        return self.widths[-1]

    @property
    def encoder_heads(self) -> int:
        """Attention heads of the encoder."""
        return self._heads(self.encoder_width)

    @property
    def decoder_heads(self) -> int:
        """Attention heads of the decoder."""
        return self._heads(self.decoder_width)

    def _heads(self, width: int) -> int:
        return self.num_heads if self.head_dim is None else max(width // self.head_dim, self.num_heads)

    @property
    def encoder_res_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each encoder level, finest first."""
        return self._res_blocks(extra=0)

    @property
    def decoder_res_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each decoder level, finest first."""
        return self._res_blocks(extra=self.num_res_extra)

    def _res_blocks(self, extra: int) -> tuple[int, ...]:
        if isinstance(self.num_res_blocks, tuple):
            return self.num_res_blocks
        return tuple(self.num_res_blocks + (extra if level else 0) for level in range(len(self.ch_mult)))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Raw tokens along the two sides of an image of height x width pixels.

        Raises:
          ValueError: a side is not a multiple of the downsampling, or the image has only one raw token.
        """
        f = self.downsampling
        if height % f or width % f or height * width < 2 * f * f:
            raise ValueError(
                f"image of {height} x {width} pixels (height x width): both sides must be multiples of {f}, "
                f"for at least two tokens of {f} x {f}; crop or resize it first"
            )
        return height // f, width // f

    @property
    def recovers_from_starts(self) -> bool:
        """Whether source recovery reads where groups start."""
        return self.recovery is not None and self.recovery.positions == "starts"

    def merge_counts(self, raw: int, keep: int) -> tuple[int, ...]:
        """Tokens merged in each encoder block; see `tome.merge_counts`."""
        return tome.merge_counts(raw, keep, self.num_att_blocks)


def _positive(value: int | tuple[int, ...] | None) -> bool:
    return value is None or min(value if isinstance(value, tuple) else (value,), default=0) > 0


def ratio_keep(config: TokenizerConfig, raw: int) -> int:
    """K for an image of `raw` tokens at the training size's fraction, at least 1."""
    return max(1, math.floor(config.keep * raw / config.raw_tokens + 0.5))


def preset(name: str) -> TokenizerConfig:
    """A published size or the tiny one.

    Raises:
      ValueError: no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


_GR = TokenizerConfig(keep=144)
_G = replace(_GR, ch_mult=(1, 2, 4, 8), keep=256, dist_head="layer2")

PRESETS: Mapping[str, TokenizerConfig] = MappingProxyType(
    {
        "g-d32": replace(_G, ch=32, ch_mult=(2, 4, 8, 12)),
        "g-d64": _G,
        "gr-d32": replace(_GR, ch=32, ch_mult=(2, 2, 4, 8, 12)),
        "gr-d64": _GR,
        "gr-d96": replace(_GR, ch=96, num_heads=12),
        "r-d64": replace(_GR, isotropic=768, head_dim=64, keep=36),
        "tiny": TokenizerConfig(
            resolution=64,
            ch=64,
            ch_mult=(1, 1, 1),
            norm_num_groups=4,  # of 16 channels, as at full size; groups of one or two lose the colours of an image
            num_res_blocks=(0, 0, 1),
            num_att_blocks=3,
            num_heads=2,
            z_channels=12,
            keep=144,
            layer_scale=0.1,
            dist_head=None,
            recovery=RecoveryConfig(rec_embed_dim=64, num_layers=0, num_heads=2, positions="starts"),
        ),
    }
)
