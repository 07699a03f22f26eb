"""PyTorch's pickled weight files (.pth, .pt, .bin, .ckpt), read without PyTorch and without running what they contain.

A pickle names functions that build its objects. Only those that build tensors, storages, parameters and dictionaries
are known here; any other is an error.
"""

import collections
import io
import math
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from runtime_jax.messages import cut
from runtime_jax.weights.table import WeightError

# Torch 1.6 and later write a zip archive; older ones four pickles (the first is this number), then the storages' bytes.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_pickled(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file that holds a state dict, by name.

    Raises:
      WeightError: not such a file, a damaged one, or one that holds anything but tensors by name.
    """
    try:
        if tarfile.is_tarfile(path):
            raise WeightError(f"in PyTorch's first format, a tar archive, which is not supported; {_advice(path)}")
        with Path(path).open("rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            found = read(file)
    except WeightError as error:
        raise WeightError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise WeightError(f"{path}: not a readable PyTorch file ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise WeightError(f"{path}: holds no state dict, but a {type(found).__name__}; {_advice(path)}")
    if other := [str(name) for name, value in found.items() if not isinstance(value, _Tensor)]:
        raise WeightError(f"{path}: holds more than tensors by name: {cut(other)}; {_advice(path)}")
    return {str(name): tensor.array for name, tensor in found.items()}


def _advice(path: str | os.PathLike) -> str:
    new = Path(path).with_suffix(".safetensors")
    return f"where torch is installed, save its state dict: safetensors.torch.save_file(state_dict, '{new}')"


class _Tensor:
    """Stands for a tensor, a parameter or a storage in the pickle."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __setstate__(self, state: Any) -> None:
        """Of a parameter: whether it needs a gradient, and hooks."""


class _Parameter(_Tensor):
    def __new__(cls, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


class _Unpickler(pickle.Unpickler):
    """Builds tensors over storages whose bytes are read afterwards.

    What it returns to the pickle, which may change it by `__setstate__`, are objects of this module, texts and numbers.
    """

    def __init__(self, file: io.BufferedIOBase, size: int):
        super().__init__(file)
        self.size = size
        self.storages: dict[str, _Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _Parameter,
            "torch.nn.parameter.Parameter": _Parameter,
            **{f"torch.{storage}": storage for storage in _STORAGES},
        }
        if f"{module}.{name}" not in known:
            raise WeightError(f"holds more than tensors: {module}.{name}; save the model's state dict alone")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Tensor:
        kind, storage, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise WeightError("holds views of storages, which are not supported")
        dtype = np.dtype(_STORAGES[storage])
        if not 0 <= count * dtype.itemsize <= self.size:
            raise WeightError(f"its storage {key} would be larger than the file, which is damaged or cut short")
        return self.storages.setdefault(str(key), _Tensor(np.zeros(count, dtype)))

    def _tensor(self, stored: _Tensor, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
        storage = stored.array
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and not (min((offset, *shape, *strides)) >= 0 and last < len(storage)):
            raise WeightError(f"a tensor of shape {tuple(shape)} lies outside of its storage")
        steps = [stride * storage.itemsize for stride in strides]
        return _Tensor(np.lib.stride_tricks.as_strided(storage[offset:], shape, steps))


def _read_zip(file: io.BufferedIOBase) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise WeightError("a zip archive, but not PyTorch's")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise WeightError("was written on a big-endian machine, which is not supported")
        with archive.open(names[0]) as pickled:
            unpickler = _Unpickler(pickled, os.fstat(file.fileno()).st_size)
            found = unpickler.load()
        for key, storage in unpickler.storages.items():
            _fill(storage.array, archive.read(f"{folder}data/{key}"), key)
    return found


def _read_legacy(file: io.BufferedIOBase) -> Any:
    size = os.fstat(file.fileno()).st_size
    if _Unpickler(file, size).load() != LEGACY_MAGIC:
        raise WeightError("a pickle, but not PyTorch's")
    _, system = _Unpickler(file, size).load(), _Unpickler(file, size).load()
    if not system["little_endian"]:
        raise WeightError("was written on a big-endian machine, which is not supported")
    unpickler = _Unpickler(file, size)
    found = unpickler.load()
    for key in _Unpickler(file, size).load():
        file.read(8)  # the number of values
        storage = unpickler.storages[str(key)].array
        _fill(storage, file.read(storage.nbytes), key)
    return found


def _fill(storage: np.ndarray, content: bytes, key: str) -> None:
    if len(content) != storage.nbytes:
        raise WeightError(f"its storage {key} has {len(content)} of {storage.nbytes} bytes: the file is cut short")
    storage[:] = np.frombuffer(content, storage.dtype)
