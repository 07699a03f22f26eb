"""A small generator that the tests of generators share: sizes, random parameters, teacher forcing."""

import functools

import jax
import numpy as np
from flax import traverse_util
from golden_tools import jit

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.transformer import Generator, param_shapes

CONFIG = GeneratorConfig(
    num_layers=2,
    dim=16,
    num_heads=2,
    ffn_dim=24,
    head_layers=1,
    vocab_sizes=(4, 8),
    num_classes=5,
    grid=(3, 4),
    keeps=(4, 9, 12),
)
MODEL = Generator(CONFIG)
# The paper's example of nine tokens (figure of the mask), counted from 1: what each one sees with a window of two.
NINE = {
    1: {1},
    2: {1, 2},
    3: {1, 2, 3},
    4: {1, 2, 3, 4},
    5: {1, 3, 4, 5},
    6: {1, 3, 4, 5, 6},
    7: {1, 3, 5, 6, 7},
    8: {1, 3, 5, 6, 7, 8},
    9: {1, 3, 5, 7, 8, 9},
}
FIRST_OF_NINE = np.asarray([[1, 1, 3, 3, 5, 5, 5, 8, 8]]) - 1
CODES_OF_NINE = np.asarray([[4, 4, 0, 0, 9, 9, 9, 2, 2]], np.int32)


def random_params(config=CONFIG, seed=0):
    """Every parameter random, norms too, so that none of them can be forgotten."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(param_shapes(config), sep="/").items():
        spread = 0.2 if path.endswith("scale") else leaf.shape[-2] ** -0.5
        spread = 1.0 if path.endswith("embedding") else spread
        leaves[path] = (path.endswith("scale") + spread * rng.normal(size=leaf.shape)).astype(np.float32)
    return jax.device_put(traverse_util.unflatten_dict(leaves, sep="/"))


def random_codes(batch, config=CONFIG, seed=1, values=None):
    """Codes [B, L], from the first `values` of them."""
    values = values or config.vocab_size
    return np.random.default_rng(seed).integers(0, values, (batch, config.length)).astype(np.int32)


@functools.partial(jit, static_argnames="module")
def teacher_forced(params, indices, labels, merge=None, mask=None, *, module=MODEL):
    return module.apply({"params": params}, indices, labels, merge, mask)


def relative_error(got, expected):
    """The largest difference of two trees of arrays, relative to the largest value."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True)]
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)
