"""Golden files of FLUX's transformer; see check_golden.py."""

import functools
from collections.abc import Callable

from golden_tools import Tensors, convert_both_ways, jit

from runtime_jax.weights import export_weights
from tokenverse_jax.flux.convert import transformer
from tokenverse_jax.flux.model import Flux, param_shapes, parse_config

shapes = functools.lru_cache(param_shapes)


@functools.partial(jit, static_argnames="module")
def apply(params, inputs, *, module):
    return module.apply({"params": params}, **inputs)


def run_flux_transformer(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    module = Flux(parse_config(config))
    tree = convert_both_ways(transformer.DIFFUSERS, params, shapes(module.config))
    # FLUX's own names are checked on the way.
    tree = convert_both_ways(transformer.FLUX, export_weights(transformer.FLUX, tree), tree)
    inputs = {"timesteps" if name == "timestep" else name: array for name, array in inputs.items()}
    return {"img": apply(tree, inputs, module=module)}


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {"flux_transformer": run_flux_transformer}
