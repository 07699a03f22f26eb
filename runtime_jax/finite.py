"""Results that are not finite are errors which say where such values first appear.

A compiled function cannot raise, so it returns flags beside its result: one for each stage of its work. Whoever calls
it from the host passes them to `check_finite`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from runtime_jax.messages import cut
from runtime_jax.sharding import constrain

Flags = Bool[Array, "..."] | Bool[np.ndarray, "..."]


class NotFiniteError(FloatingPointError):
    """A network's results are NaN or infinite."""


def all_finite(x: Array) -> Bool[Array, ""]:
    """Whether an array holds finite numbers only; whole on every device, so that each host can read it."""
    return constrain(jnp.isfinite(x).all())


def check_finite(stages: Mapping[str, Flags], params: Mapping[str, Any]) -> None:
    """Makes sure that every stage of a computation is finite.

    Args:
      stages: flags by what they are of, in the order of the work; of several, such as those of sampling steps, the
        first that is False is named by its number.
      params: of the networks that were used, by name; looked through when something is wrong.

    Raises:
      NotFiniteError: names the first stage that is not finite, and the parameters that are not.
    """
    if any(isinstance(flags, jax.core.Tracer) for flags in stages.values()):
        return  # inside another program, which has no results yet
    for name, flags in stages.items():
        flags = np.asarray(flags)
        if not flags.all():
            number = f" {1 + int(np.argmin(flags))} of {flags.size}" if flags.ndim else ""
            raise NotFiniteError(f"not finite from {name}{number} on; {_cause(params)}")


def _cause(params: Mapping[str, Any]) -> str:
    bad = [line for name, tree in params.items() for line in _not_finite(tree, name)]
    if not bad:
        return "all parameters are finite, so the values have outgrown their dtype (try float32) or the input has them"
    return f"parameters that are not finite: {cut(bad)}"


def _not_finite(tree: Any, name: str) -> list[str]:
    """A text for each parameter that holds values which are not finite."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if count := int(jnp.sum(~jnp.isfinite(leaf))):
            where = "/".join([name, jax.tree_util.keystr(path, simple=True, separator="/")])
            lines.append(f"{where} ({count} of {leaf.size} values)")
    return lines
