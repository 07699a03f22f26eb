"""A model's folder: config.json with its architecture, and model.safetensors with the released state-dict names."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mergevq_jax.pretrained import SHIPPED
from runtime_jax import config as config_lib
from runtime_jax.files import AnyPath, write_json
from runtime_jax.weights import Rule, WeightError, export_weights, import_weights, read_safetensors, write_safetensors
from runtime_jax.weights.hub import local_path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
T = TypeVar("T")


def find_folder(path: str | os.PathLike, what: str) -> Path:
    """The local folder of a "tokenizer" or "generator": a shipped one by its name; fetches a hub id's files.

    Raises:
      ValueError: no such folder, a file is missing in it, or the name is that of a shipped model of the other kind.
    """
    names = ", ".join(SHIPPED[what])
    for kind, shipped in SHIPPED.items():
        if str(path) in shipped:
            if kind != what:
                raise ValueError(f"{path} is a {kind}; {what}s are {names}")
            return shipped[str(path)]
    try:
        folder = local_path(path, (CONFIG_NAME, WEIGHTS_NAME))
    except WeightError as error:
        hint = "" if "/" in str(path) else f"; shipped {what}s: {names}"
        raise WeightError(f"{error}{hint}") from error
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: not a {what}'s folder, {' and '.join(missing)} missing")
    return folder


def read_config(path: Path, cls: type[T], model_type: str, what: str) -> T:
    """The config of class `cls` in a config.json.

    Raises:
      ValueError: not JSON, another kind of model, or a key that does not fit.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    kind = fields.pop("model_type", None) if isinstance(fields, dict) else None
    if kind != model_type:
        raise ValueError(f"{path}: model_type is {kind!r}, but a {what}'s is {model_type!r}")
    return config_lib.build(cls, fields, path=str(path))


def read_params(folder: Path, table: Sequence[Rule], shapes: Any) -> Any:
    """The parameters in a folder as float32, on the device.

    Raises:
      WeightError: a parameter is missing, unknown or of another shape.
    """
    tensors, _ = read_safetensors(folder / WEIGHTS_NAME)
    try:
        params = import_weights(table, tensors, shapes)
    except WeightError as error:
        raise WeightError(f"{folder / WEIGHTS_NAME}: {error}") from None
    # To the device once, instead of with every call.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def write_folder(
    folder: AnyPath, model_type: str, config: Any, table: Sequence[Rule], params: Mapping[str, Any]
) -> None:
    """Writes a model's two files, each atomically."""
    tensors = export_weights(table, params)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt", "model_type": model_type})
    write_json(folder / CONFIG_NAME, {"model_type": model_type, **config_lib.to_dict(config)})


def fingerprint(config: Any, table: Sequence[Rule], params: Any) -> str:
    """SHA-256 of a model's config and of its parameters with their released names."""
    digest = hashlib.sha256(json.dumps(config_lib.to_dict(config, old_names=True), sort_keys=True).encode())
    for name, array in sorted(export_weights(table, params).items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
