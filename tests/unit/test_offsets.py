"""Directions without training, and offsets on the tokens of a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import random_params

from tokenverse_jax.flux.model import Flux, FluxConfig, direction, param_shapes
from tokenverse_jax.flux.offsets import place_on_tokens

CONFIG = FluxConfig(
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    axes_dims_rope=(2, 2, 4),
)


@pytest.mark.parametrize(("time", "guidance"), [(0.1, 1.0), (1.0, 3.5)])
def test_a_direction_is_the_difference_of_modulation_vectors(time, guidance):
    params = random_params(param_shapes(CONFIG), seed=0)
    attribute, neutral = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32))

    @jax.jit
    def y(vec):
        strengths = jnp.full(3, time), vec, jnp.full(3, guidance)
        return Flux(CONFIG).apply({"params": params}, *strengths, method="modulation_vector")

    got = direction(CONFIG, params, attribute, neutral)
    assert got.shape == (3, CONFIG.width) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, y(attribute) - y(neutral), atol=1e-5)
    assert np.abs(got).max() > 0.1
    assert not direction(CONFIG, params, neutral, neutral).any()


def test_one_offset_for_all_tokens_of_a_word():
    got = place_on_tokens(jnp.asarray([1.0, 2.0]), (3, 1), 4)
    np.testing.assert_array_equal(got, [[0, 0], [1, 2], [0, 0], [1, 2]])


def test_an_offset_for_each_token_and_block():
    offset = jnp.arange(1.0, 13).reshape(3, 2, 2)
    got = place_on_tokens(offset, (2, 0), 4)
    assert got.shape == (3, 4, 2)
    np.testing.assert_array_equal(got[:, [2, 0]], offset)
    assert not got[:, [1, 3]].any()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ((), r"positions \(\): different tokens of a text of 4"),
        ((1, 1), r"positions \(1, 1\)"),
        ((-1, 0), r"positions \(-1, 0\)"),
        ((0, 4), r"positions \(0, 4\)"),
        ((0,), r"an offset of 2 tokens does not fit the positions \(0,\)"),
    ],
)
def test_positions_that_do_not_fit(positions, message):
    with pytest.raises(ValueError, match=message):
        place_on_tokens(jnp.ones((2, 3)), positions, 4)
