"""Safetensors files as arrays that stay on disk until they are used."""

import json
import os

import jax.numpy as jnp
import numpy as np

from runtime_jax.files import local
from runtime_jax.weights.table import WeightError, opened

_DTYPES = {
    "BOOL": np.bool_,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def map_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of one file, read-only and mapped into memory: only what is used is read, and nothing is copied.

    So a converter of a large state dict needs memory for its results only. The file must not change while the arrays
    live; replacing it as a whole is allowed.

    Raises:
      WeightError: the file is missing, damaged or cut short, or has a dtype without an array type here.
    """
    # The layout: the header's size as 8 bytes, little end first, the header as JSON, the tensors' bytes.
    with opened(path):
        path = local(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise WeightError(f"{path}: holds {', '.join(unknown)}; supported are {', '.join(_DTYPES)}")
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(_DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }
