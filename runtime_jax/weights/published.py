"""Published weight files: removes prefixes of wrappers, and recognises files that are not what is needed."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from runtime_jax.messages import cut

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Prefixes that programs put before a network's names, one or several in a row.
WRAPPERS = (
    "module.",  # torch.nn.DataParallel and its like
    "_orig_mod.",  # torch.compile
    "model.",
    "net.",
    "transformer.",
    "diffusion_model.",  # ComfyUI, and checkpoints of several networks
    "first_stage_model.",
    "vae.",
    "text_model.",
    "text_encoders.clip_l.",
    "text_encoders.t5xxl.",
    "dinov2.",
)

# Kinds of state dicts and the names that reveal them; the first match decides. First, what is derived from a network:
_CHANGED = (
    (
        "a LoRA, which modifies a network: merge it into its model first",
        r"lora_(A|B|up|down|unet|te\d?)\b|lora_(unet|te\d?)_|\.(hada|lokr|oft)_|dora_scale",
    ),
    (
        "weights quantised by bitsandbytes: take the model's float16 or bfloat16 file",
        r"\.(absmax|quant_map|nested_absmax|quant_state\.\w+|SCB|weight_format)$",
    ),
    (
        "fp8 weights with scales: take the model's float16 or bfloat16 file",
        r"(\.(scale_weight|scale_input|weight_scale|input_scale)|(^|\.)scaled_fp8)$",
    ),
    ("a ControlNet", r"^(control_model|controlnet_\w+|input_hint_block|pos_embed_input)\b"),
    ("an IP-Adapter", r"^(image_proj|ip_adapter)\."),
)
_NETWORKS = (
    ("Stable Diffusion 3's transformer", r"\bjoint_blocks\.\d"),
    ("FLUX's transformer, under its own names", r"\bdouble_blocks\.\d+\.img_attn\."),
    ("FLUX's transformer, under diffusers' names", r"\bsingle_transformer_blocks\.\d+\."),
    ("Stable Diffusion's UNet", r"\binput_blocks\.\d+\.|^(down_blocks\.\d+\.attentions|time_embedding)\."),
    ("a MergeVQ tokenizer", r"\bdecoder\.adaptive\.\d|\brec_tokens$"),
    ("a MergeVQ generator", r"\b(spatial|factorized)_blocks\.\d"),
    ("an autoencoder, under diffusers' names", r"\bdecoder\.up_blocks\.\d"),
    ("an autoencoder, under FLUX's names", r"\bdecoder\.up\.\d+\.block\."),
    ("a T5", r"\bencoder\.block\.\d+\.layer\.0\.SelfAttention\."),
    ("a CLIP", r"\bembeddings\.token_embedding\.weight$|\btext_projection\b"),
    ("a DINOv2", r"\bembeddings\.patch_embeddings\.|\blayer_scale\d\.lambda1$|\bblocks\.\d+\.ls1\.gamma$"),
    ("an InceptionV3", r"\bMixed_\d[a-e]\."),
    ("a VGG", r"\bfeatures\.\d+\.(weight|bias)$"),
    ("LPIPS' linear layers", r"\blins?\.?\d\b"),
)

# First bytes of files that are called .safetensors and are something else.
_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself: fetch it with git lfs pull"),
    (b"GGUF", "a GGUF file: take the model's safetensors file"),
    (b"PK\x03\x04", "a pickled PyTorch file: save it as safetensors where torch is installed"),
    (b"\x80", "a pickled PyTorch file: save it as safetensors where torch is installed"),
    (b"<", "a web page, not the file itself: the download went wrong, or needs to log in"),
    (b"{", "a JSON text, not the file itself: the download went wrong"),
)


def unwrapped(source: Mapping[str, T], fits: Callable[[str], bool]) -> dict[str, T]:
    """A state dict without the prefix of its names, if no name fits as it is.

    Of several networks in a checkpoint, only the one that fits remains. A warning names the prefix and what is left
    out. `fits` tells whether a name belongs to the network that is needed.
    """
    source = {name.replace("._orig_mod.", "."): value for name, value in source.items()}
    if any(map(fits, source)):
        return source
    found = Counter(prefix for name in source for prefix in _prefixes(name) if fits(name[len(prefix) :]))
    if not found:
        return source
    prefix, _ = found.most_common(1)[0]
    own = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
    others = Counter(name.split(".")[0] for name in source if not name.startswith(prefix))
    left = f"; left out: {cut(f'{count} of {first}.*' for first, count in others.items())}" if others else ""
    _LOG.warning("%d tensors are read without %r in front of their names%s", len(own), prefix, left)
    return own


def _prefixes(name: str) -> Iterator[str]:
    """The possible prefixes of a name: "module.", then "module.model.", and so on."""
    end = 0
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper, end)), None):
        end += len(wrapper)
        yield name[:end]


def recognized(names: Iterable[str], *, changed_only: bool = False) -> str | None:
    """What a state dict is, by its names; None: unknown, or with `changed_only` an unmodified network."""
    text, kinds = "\n".join(names), _CHANGED if changed_only else _CHANGED + _NETWORKS
    return next((what for what, pattern in kinds if re.search(pattern, text, re.MULTILINE)), None)


def unreadable(path: Path) -> str | None:
    """What a file is that cannot be read as safetensors; None: unknown."""
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "an empty file"
    # The first eight bytes of a safetensors file are a number, the ninth is a brace.
    return next((what for beginning, what in _BEGINNINGS if start.startswith(beginning)), None)
