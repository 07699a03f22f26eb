"""The golden file of InceptionV3; see check_golden.py. Its weights are made from a seed: they would fill 95 MB."""

from collections.abc import Callable

import jax.numpy as jnp
from golden_tools import Tensors, apply, convert_both_ways
from inception_tools import random_weights

from runtime_jax.networks.inception import TABLE, InceptionV3, param_shapes, resize


def run_inception(config: dict, params: Tensors, inputs: Tensors) -> Tensors:
    """Every so many of the features, for images of any size."""
    converted = convert_both_ways(TABLE, random_weights(config["seed"]), param_shapes())
    output = apply({"params": converted}, resize(jnp.asarray(inputs["images"])), module=InceptionV3())
    return {name: value[:, :: config["every"]] for name, value in output._asdict().items()}


RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {"inception": run_inception}
