"""Random numbers as a pure function of (seed, stream, step, example): a resumed or re-sharded run draws the same ones.

No key is kept in the train state: the seed is config and every key is derived where it is used. What differs between
examples folds in the example's index in the data set, never its place on a device.
"""

from enum import IntEnum

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

    Args:
        seed: the run's seed, 0..2^32-1.
        stream: what the numbers are for; two streams never share a key.
        step: train step, a Python int or a traced scalar.

    Raises:
        ValueError: the seed is out of range.
    """
    _check_seed(seed)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(stream)), step)


def example_keys(key: Key[Array, ""], indices: Int[Array, "B"] | Int[np.ndarray, "B"]) -> Key[Array, "B"]:
    """One key per example [B] from its index in the data set [B], whatever the batch layout and the devices."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(indices))


def host_rng(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """NumPy generator for host-side work, a pure function of (seed, stream, counters): step, example's index.

    Raises:
        ValueError: the seed is out of range.
    """
    _check_seed(seed)
    return np.random.default_rng([seed, int(stream), *map(int, counters)])
