"""Errors for results that are not finite; they name the stage where such values first appear.

A compiled function cannot raise, so it returns a flag for each of its stages beside its result. The caller on the host
passes them to `check_finite`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from runtime_jax.messages import cut
from runtime_jax.sharding import constrain, to_host

Flags = Bool[Array, "..."] | Bool[np.ndarray, "..."]


class NotFiniteError(FloatingPointError):
    """A network's results are NaN or infinite."""


def all_finite(x: Array) -> Bool[Array, ""]:
    """Whether all numbers of an array are finite; replicated, so that each host can read it."""
    return constrain(jnp.isfinite(x).all())


def check_finite(stages: Mapping[str, Flags], params: Mapping[str, Any]) -> None:
    """Makes sure that every stage of a computation is finite.

    Args:
      stages: flags by the name of their stage, in the order of the work; of an array of flags, such as one for each
        sampling step, the error names the number of the first that is False.
      params: parameters of the networks used, by name; searched only when a flag is False.

    Raises:
      NotFiniteError: names the first stage that is not finite, and the parameters that are not.
    """
    if any(isinstance(flags, jax.core.Tracer) for flags in stages.values()):
        return  # traced inside another program, which has no results yet
    for name, flags in stages.items():
        flags = np.asarray(to_host(flags))
        if not flags.all():
            number = f" {1 + int(np.argmin(flags))} of {flags.size}" if flags.ndim else ""
            raise NotFiniteError(f"not finite from {name}{number} on; {_cause(params)}")


def _cause(params: Mapping[str, Any]) -> str:
    bad = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params)):
        if count := int(jnp.sum(~jnp.isfinite(leaf))):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            bad.append(f"{where} ({count} of {leaf.size} values)")
    if not bad:
        return "all parameters are finite, so the values have outgrown their dtype (try float32) or the input has them"
    return f"parameters that are not finite: {cut(bad)}"
