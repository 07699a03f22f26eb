"""What the checks of all golden files share: shapes, jitted application, conversion there and back."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.weights import Rule, export_weights, import_weights

Tensors = dict[str, np.ndarray]
Options = tuple[tuple[str, Any], ...]
# Programs this small compile for longer than they run; op by op, Flax is slower still.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def parts(tensors: Tensors, kind: str) -> Tensors:
    """The tensors under `kind/`, without it."""
    return {name.removeprefix(f"{kind}/"): array for name, array in tensors.items() if name.startswith(f"{kind}/")}


@functools.lru_cache
def shapes(module: nn.Module, shape: tuple[int, ...], options: Options = ()) -> Any:
    """Shapes of a module's variables, by tracing its init on an input of `shape`."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), **dict(options)))


@functools.partial(jit, static_argnames=("module", "options"))
def apply(variables: Any, *inputs: Any, module: nn.Module, options: Options = ()) -> Any:
    """The module's outputs."""
    return module.apply(variables, *inputs, **dict(options))


def convert_both_ways(table: Sequence[Rule], source: Tensors, target: Any, *, ignore: Sequence[str] = ()) -> Any:
    """Imports a state dict and checks that exporting it again is bit-equal.

    Raises:
      ValueError: the weights do not fit, or come back changed.
    """
    params = import_weights(table, source, target, ignore=ignore)
    require_equal(
        export_weights(table, params),
        {name: array for name, array in source.items() if not any(re.fullmatch(pattern, name) for pattern in ignore)},
    )
    return params


def require_equal(exported: Tensors, source: Tensors) -> None:
    """Raises ValueError unless both have the same names and bits."""
    for name in sorted(exported.keys() | source.keys()):
        ours, theirs = exported.get(name), source.get(name)
        if ours is None or theirs is None or ours.dtype != theirs.dtype or ours.tobytes() != theirs.tobytes():
            raise ValueError(f"{name}: the export of the imported weights is not bit-equal to them")


def to_tokens(images: np.ndarray) -> np.ndarray:
    """[B, C, h, w] -> [B, h w, C]."""
    return images.reshape(*images.shape[:2], -1).swapaxes(1, 2)


def to_nhwc(images: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return np.moveaxis(images, 1, -1)
