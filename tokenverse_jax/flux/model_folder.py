"""A FLUX pipeline's files: diffusers' folder layout, and FLUX's own single files in place of one of its parts.

The parts are the four networks: transformer, vae, clip (in text_encoder/) and t5 (in text_encoder_2/).
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from runtime_jax import sharding
from runtime_jax.config import build, build_known, to_dict
from runtime_jax.files import AnyPath, replacing, write_json
from runtime_jax.messages import cut
from runtime_jax.networks import clip, clip_files
from runtime_jax.weights import WeightError, export_weights, write_safetensors
from runtime_jax.weights.hub import local_path
from runtime_jax.weights.mapped import map_safetensors
from tokenverse_jax.flux import autoencoder, model
from tokenverse_jax.flux.convert.autoencoder import convert_autoencoder, diffusers_table
from tokenverse_jax.flux.convert.t5 import T5, config_json, convert_t5
from tokenverse_jax.flux.convert.transformer import DIFFUSERS, convert_transformer
from tokenverse_jax.flux.pretrained import SHIPPED
from tokenverse_jax.flux.sampling import UsualSampling
from tokenverse_jax.flux.text_encoders import t5

Tensors = Mapping[str, np.ndarray]
Params = dict[str, Any]
INDEX = "model_index.json"
SCHEDULE = "scheduler/scheduler_config.json"
SAMPLING = "sampling.json"
TOKENIZERS = ("tokenizer", "tokenizer_2")
PIPELINE_CLASS = "FluxPipeline"
# The names under which every version of transformers has the tokenizers that read tokenizer.json.
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "T5Tokenizer": "T5TokenizerFast"}


@dataclass(frozen=True, eq=False)
class Part:
    """One network: its config and its parameters."""

    config: Any
    params: Params = field(repr=False)


@dataclass(frozen=True)
class Kind:
    """How a part is stored: its files, its config, and both directions of its weights."""

    folder: str
    weights: str  # name of the weight file, without its suffix
    class_of: tuple[str, str]  # library and class that model_index.json names
    parse: Callable[[Mapping[str, Any]], Any]
    fields: Callable[[Any], dict[str, Any]]  # the inverse of parse
    convert: Callable[[Tensors, Any], Params]
    export: Callable[[Params, Any], dict[str, np.ndarray]]
    rules: Sequence[sharding.Rule]
    default: Callable[[Tensors], Any] | None = None  # config of a single file, where the folder has none

    @property
    def config_file(self) -> str:
        """Path of the part's config within the pipeline's folder."""
        return f"{self.folder}/config.json"


def _preset(source: Tensors) -> model.FluxConfig:
    return model.PRESETS["dev" if any("guidance" in name for name in source) else "schnell"]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "transformer": Kind(
            folder="transformer",
            weights="diffusion_pytorch_model",
            class_of=("diffusers", "FluxTransformer2DModel"),
            parse=model.parse_config,
            fields=lambda config: {"_class_name": "FluxTransformer2DModel"} | to_dict(config),
            convert=convert_transformer,
            export=lambda params, config: export_weights(DIFFUSERS, params),
            rules=model.SHARDING_RULES,
            default=_preset,
        ),
        "vae": Kind(
            folder="vae",
            weights="diffusion_pytorch_model",
            class_of=("diffusers", "AutoencoderKL"),
            parse=autoencoder.parse_config,
            fields=autoencoder.config_fields,
            convert=convert_autoencoder,
            export=lambda params, config: export_weights(diffusers_table(config), params),
            rules=autoencoder.SHARDING_RULES,
            default=lambda source: autoencoder.AutoencoderConfig(),
        ),
        "clip": Kind(
            folder="text_encoder",
            weights="model",
            class_of=("transformers", "CLIPTextModel"),
            parse=lambda fields: build_known(clip.CLIPTextConfig, fields, "text_encoder/config.json"),
            fields=clip_files.text_config_json,
            convert=clip_files.convert_clip_text,
            export=lambda params, config: clip_files.export_clip_text(params),
            rules=clip.TEXT_SHARDING_RULES,
        ),
        "t5": Kind(
            folder="text_encoder_2",
            weights="model",
            class_of=("transformers", "T5EncoderModel"),
            parse=lambda fields: build_known(t5.T5Config, fields, "text_encoder_2/config.json"),
            fields=config_json,
            convert=convert_t5,
            export=lambda params, config: export_weights(T5, params),
            rules=t5.SHARDING_RULES,
        ),
    }
)


def fetch(source: str | os.PathLike, parts: Sequence[str]) -> Path:
    """The local folder of a pipeline: a shipped one by its name, a folder, or a hub id.

    From the hub it fetches the configs, the tokenizers and the weights of `parts`.

    Raises:
      WeightError: neither a folder nor a hub id, or the hub refuses it; says what to do then.
    """
    if str(source) in SHIPPED:
        return SHIPPED[str(source)]
    patterns = [INDEX, SCHEDULE, SAMPLING]
    patterns += [*(f"{folder}/*" for folder in TOKENIZERS), *(kind.config_file for kind in KINDS.values())]
    for part in parts:
        patterns += [f"{KINDS[part].folder}/{KINDS[part].weights}{end}" for end in ("*.safetensors", "*.index.json")]
    try:
        folder = local_path(source, patterns)
    except WeightError as error:
        if error.__cause__ is None:  # not a hub id at all
            raise
        raise WeightError(
            f"{error} If the model is gated, as FLUX.1-dev is: accept its licence on https://huggingface.co/{source} "
            "and log in (`hf auth login`, or a token in HF_TOKEN)."
        ) from error.__cause__
    if not folder.is_dir():
        raise WeightError(f"{source}: the folder of a pipeline is needed; a single file goes into transformer= or vae=")
    return folder


def locate(folder: Path, parts: Sequence[str], single: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The weight files of each of `parts`; those in `single` are outside the folder.

    Raises:
      WeightError: lists everything that is missing.
    """
    needed = [folder / INDEX, folder / SCHEDULE]
    # How long a prompt may be depends on the transformer, loaded or not.
    needed += [folder / KINDS[part].config_file for part in {"transformer": None, **dict.fromkeys(parts)}]
    optional = {folder / KINDS[part].config_file for part in single}
    files = {part: [single[part]] if part in single else _weight_files(folder, KINDS[part]) for part in parts}
    needed = [path for path in needed if path not in optional] + [path for part in parts for path in files[part]]
    missing = [path for path in needed if not path.is_file()]
    missing += [folder / name for name in TOKENIZERS if not any((folder / name).glob("*"))]
    if missing:
        shown = cut((str(path.relative_to(folder) if folder in path.parents else path) for path in missing), "\n  ")
        raise WeightError(f"{folder}: not a complete FLUX pipeline in diffusers' layout; missing:\n  {shown}")
    found = read_json(folder / INDEX).get("_class_name")
    if found != PIPELINE_CLASS:
        raise WeightError(f"{folder / INDEX}: _class_name is {found!r}, but a {PIPELINE_CLASS} is needed")
    return files


def _weight_files(folder: Path, kind: Kind) -> list[Path]:
    folder = folder / kind.folder
    index = folder / f"{kind.weights}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{kind.weights}.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightError(f"{index}: names no shards (a weight_map is needed)")
    return [folder / name for name in sorted(set(shards.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where it is not readable, not JSON, or not an object."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a JSON object is needed, got {type(fields).__name__}")
    return fields


def read_config(folder: Path, part: str, files: Sequence[Path]) -> Any:
    """The config of a part from its file, or else FLUX.1's that fits the single weight file."""
    kind, path = KINDS[part], folder / KINDS[part].config_file
    return kind.parse(read_json(path)) if path.is_file() else kind.default(map_safetensors(files[0]))


def read_part(part: str, config: Any, files: Sequence[Path], *, dtype: str, mesh: Mesh | None) -> Part:
    """Reads a part and puts its parameters, in `dtype`, onto the device or the mesh.

    The files are mapped and the parameters are placed one by one, so that host memory holds at most one copy of the
    part, in the dtype of its files, and one more parameter.

    Raises:
      WeightError: the weights do not fit the config.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        tensors |= map_safetensors(path)
    try:
        return Part(config, _place(KINDS[part].convert(tensors, config), KINDS[part].rules, dtype, mesh))
    except WeightError as error:
        raise WeightError(f"{cut(map(str, files))}, for the {part}: {error}") from None


def _place(params: Params, rules: Sequence[sharding.Rule], dtype: str, mesh: Mesh | None) -> Params:
    leaves = traverse_util.flatten_dict(params)
    if mesh is None:
        put = dict.fromkeys(leaves, jax.device_put)
    else:
        shardings = traverse_util.flatten_dict(sharding.param_shardings(params, rules, mesh))
        put = {path: functools.partial(sharding.place, shardings=own) for path, own in shardings.items()}
    del params  # each array is freed as soon as it is placed
    # A copy, since a device array on a CPU may share the memory that it is made from, here a file's.
    placed = {path: put[path](np.array(leaves.pop(path), jnp.dtype(dtype), order="C")) for path in list(leaves)}
    return traverse_util.unflatten_dict(placed)


def read_usual(folder: Path, *, distilled: bool) -> UsualSampling:
    """The model's own settings; without a file for them FLUX.1-dev's if `distilled` for guidance, else schnell's.

    Raises:
      ValueError: the file cannot be read or has other keys.
    """
    path = folder / SAMPLING
    if path.is_file():
        return build(UsualSampling, read_json(path), path=str(path))
    return UsualSampling(num_steps=28 if distilled else 4)


def write_folder(
    folder: AnyPath,
    parts: Mapping[str, Part],
    tokenizers: Mapping[str, Any],
    schedule: dict[str, Any],
    usual: UsualSampling,
) -> None:
    """Writes a pipeline that diffusers reads too; every file atomically, model_index.json last."""
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS}
    for name, part in parts.items():
        kind = KINDS[name]
        weights = folder / kind.folder / f"{kind.weights}.safetensors"
        write_safetensors(weights, kind.export(part.params, part.config), {"format": "pt"})
        weights.with_name(f"{weights.name}.index.json").unlink(missing_ok=True)  # of shards that were here before
        write_json(folder / kind.config_file, kind.fields(part.config))
        index[kind.folder] = kind.class_of
    for name, tokenizer in tokenizers.items():
        _write_tokenizer(folder / name, tokenizer)
        written = type(tokenizer).__name__
        index[name] = ("transformers", TOKENIZER_CLASSES.get(written, written))
    write_json(folder / SCHEDULE, schedule)
    write_json(folder / SAMPLING, to_dict(usual))
    index["scheduler"] = ("diffusers", schedule["_class_name"])
    write_json(folder / INDEX, index)


def _write_tokenizer(folder: AnyPath, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as partial:
        tokenizer.save_pretrained(partial)
        for path in Path(partial).iterdir():
            with replacing(folder / path.name) as new:
                shutil.copyfile(path, new)
