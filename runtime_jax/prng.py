"""Random numbers as a pure function of (seed, stream, step, example): a resumed or re-sharded run draws the same ones.

The train state holds no key: the seed is config, and every key is derived where it is used. Keys of single examples
fold in the example's number in the data set, never its position on a device.
"""

from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

MAX_SEED = 2**32 - 1


class Stream(IntEnum):
    """Independent uses of the seed. The numbers are part of every run's identity: append, never renumber."""

    PARAMS = 0
    DATA = 1
    MERGE = 2
    NOISE = 3
    SAMPLE = 4
    EVAL = 5
    DROPOUT = 6
    AUGMENT = 7
    ORDER = 8


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: got {seed}, expected an integer in 0..{MAX_SEED}")


def stream_key(seed: int, stream: Stream, step: int | Int[Array, ""] = 0) -> Key[Array, ""]:
    """Key of one stream at one step: fold_in(fold_in(key(seed), stream), step).

    Two streams never share a key; the step may be traced.

    Raises:
        ValueError: the seed is not in 0..2^32-1.
    """
    _check_seed(seed)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(stream)), step)


def key_shape() -> Any:
    """The shape of a key, for `jax.eval_shape`.

    Making one would compute something, which fails where the mesh that is set has devices that are not there.
    """
    return jax.eval_shape(jax.random.key, 0)


def example_keys(key: Key[Array, ""], examples: Int[Array, "B"] | Int[np.ndarray, "B"]) -> Key[Array, "B"]:
    """One key per example from its number in the data set; batch layout and devices play no part."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(examples))


def host_rng(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """NumPy generator for the host, a pure function of (seed, stream, counters); counters are steps or examples.

    Raises:
        ValueError: the seed is not in 0..2^32-1.
    """
    _check_seed(seed)
    return np.random.default_rng([seed, int(stream), *map(int, counters)])
