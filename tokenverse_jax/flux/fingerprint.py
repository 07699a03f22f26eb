"""A hash that identifies a model by its weights."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from runtime_jax.sharding import to_host

SAMPLES = 4096  # values of each parameter


def fingerprint(params: Any) -> str:
    """SHA-256 (hex) of names, shapes and up to 4096 values, evenly spread, of every parameter, rounded to bfloat16.

    It reads only a small part of the weights, and is the same in float32 and bfloat16, from diffusers' files and from
    FLUX's own, on one device and sharded. It is no protection against forgery, and misses changes below bfloat16's.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    samples = to_host(_samples(leaves))
    digest = hashlib.sha256()
    for path in sorted(leaves):
        digest.update(f"{path} {tuple(leaves[path].shape)}\n".encode())
        # Adding 0 turns -0 into 0, as summing over the devices of a mesh does.
        digest.update((np.asarray(samples[path], np.float32) + 0).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


@jax.jit
def _samples(leaves: Mapping[str, Array]) -> dict[str, Array]:
    def sample(leaf: Array) -> Array:
        count = min(leaf.size, SAMPLES)
        picks = np.arange(count) * (leaf.size - 1) // max(count - 1, 1)
        return leaf[np.unravel_index(picks, leaf.shape)]

    return {path: sample(leaf) for path, leaf in leaves.items()}
