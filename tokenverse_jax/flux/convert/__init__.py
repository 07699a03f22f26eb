"""Other programs' weights, in both directions."""

import functools
from typing import Any

import flax.linen as nn
import jax

from runtime_jax.prng import key_shape


@functools.cache
def init_shapes(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    """Shapes and dtypes of a module's parameters, without computing anything."""
    return jax.eval_shape(module.init, key_shape(), *inputs)["params"]
