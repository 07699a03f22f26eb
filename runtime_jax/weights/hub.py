"""Where weights come from: a file or folder on a disk or in a bucket, or a Hugging Face hub id; all as local files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime_jax.files import is_remote, local
from runtime_jax.weights import WeightError, read_safetensors
from runtime_jax.weights.pickled import read_pickled

PICKLED = (".pth", ".pt", ".bin", ".ckpt")


def local_path(source: str | os.PathLike, patterns: Sequence[str]) -> Path:
    """The local file or folder of `source`; fetches the files of `patterns` of a hub id "owner/name" or from a bucket.

    Raises:
      BucketError: the bucket cannot be read.
      WeightError: neither a local path nor a hub id, or the hub cannot be reached or has no such repository.
    """
    if is_remote(source):
        try:
            return local(source, tuple(patterns))
        except FileNotFoundError as error:
            raise WeightError(str(error)) from error
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) or path.suffix in (".safetensors", *PICKLED):
        raise WeightError(f"{source}: no such file or folder (and not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises OSError, ValueError and its HTTP library's own errors
        raise WeightError(
            f"{source}: no such local file or folder, and the hub did not provide it ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Without network, pass a local folder."
        ) from error


def read_tensors(source: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors or PyTorch file, or of all such files in a folder or hub repository, by name.

    Of a folder with both kinds, and of a hub repository, only the .safetensors files are read.

    Raises:
      WeightError: nothing there, an unreadable file, a PyTorch file that holds more, or one name with two contents.
    """
    path = local_path(source, ("*.safetensors", "*.json"))
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(p for p in path.iterdir() if p.suffix in PICKLED)
    else:
        files = [path]
    if not files:
        raise WeightError(f"{source}: the folder holds no .safetensors file and none of {', '.join(PICKLED)}")
    return merge_tensors([(file, _read_file(file)) for file in files])


def _read_file(path: Path) -> dict[str, np.ndarray]:
    return read_pickled(path) if path.suffix in PICKLED else read_safetensors(path)[0]


def rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """A tensor's other name: each pattern is replaced, one after the other."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def merge_tensors(parts: Sequence[tuple[str | os.PathLike, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """The union of several (file, state dict); a name may recur with equal contents.

    Raises:
      WeightError: one name with two contents.
    """
    merged: dict[str, np.ndarray] = {}
    for file, tensors in parts:
        for name, array in tensors.items():
            if name in merged and not np.array_equal(merged[name], array):
                raise WeightError(f"{file}: {name} has other contents than in the files before it")
            merged[name] = array
    return merged
