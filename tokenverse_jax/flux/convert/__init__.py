"""Other programs' weights, in both directions."""

import functools
from typing import Any

import flax.linen as nn
import jax


@functools.cache
def init_shapes(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    """Shapes and dtypes of a module's parameters, without computing anything."""
    return jax.eval_shape(module.init, jax.eval_shape(jax.random.key, 0), *inputs)["params"]
