"""Random weights for InceptionV3, the same here and in PyTorch."""

import jax
import numpy as np

from runtime_jax.networks.inception import TABLE, param_shapes
from runtime_jax.weights import export_weights


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """A state dict in which no parameter or statistic has its initial value.

    The recipe: NumPy's default generator, names in sorted order; kernels normal with variance 2 / inputs, BatchNorm's
    weights 1 + 0.2 normal, variances uniform in [0.5, 1.5], and biases and means 0.1 normal.
    """
    rng, weights = np.random.default_rng(seed), {}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes())
    for name, leaf in sorted(export_weights(TABLE, zeros).items()):
        if leaf.ndim > 1:
            value = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[1:])), leaf.shape)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif name.endswith("bn.weight"):
            value = rng.normal(1, 0.2, leaf.shape)
        else:
            value = rng.normal(0, 0.1, leaf.shape)
        weights[name] = value.astype(np.float32)
    return weights


def random_images(seed: int, count: int = 2, height: int = 40, width: int = 56) -> np.ndarray:
    """uint8 [count, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
