"""A hash of all parameters."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(params: Any) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and values of every parameter."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}\n".encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
