"""Errors for values that are not finite name the stage and the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergevq_jax.tokenizer.model import load_tokenizer
from mini_scenes.judge import Judge
from runtime_jax.finite import NotFiniteError, all_finite, check_finite

PARAMS = {"net": {"layer": {"kernel": np.ones((2, 3)), "bias": np.array([1.0, np.nan, np.inf])}}}
GOOD, BAD = np.array(True), np.array(False)


def test_the_first_stage_and_the_parameters_are_named():
    message = r"^not finite from second on; parameters that are not finite: net/layer/bias \(2 of 3 values\)$"
    with pytest.raises(NotFiniteError, match=message):
        check_finite({"first": GOOD, "second": BAD, "another": BAD}, PARAMS)
    with pytest.raises(NotFiniteError, match=r"^not finite from step 3 of 4 on"):
        check_finite({"step": np.array([True, True, False, False])}, PARAMS)
    check_finite({"first": GOOD, "step": np.array([True, True])}, PARAMS)


def test_with_finite_parameters_the_dtype_or_the_input_is_the_cause():
    with pytest.raises(NotFiniteError, match="all parameters are finite, so the values have outgrown their dtype"):
        check_finite({"first": BAD}, {"net": {"kernel": jnp.ones(3)}})


def test_many_parameters_are_cut():
    params = {"net": {f"layer_{i}": np.full(1, np.nan) for i in range(13)}}
    with pytest.raises(NotFiniteError, match=r"net/layer_6 \(1 of 1 values\), and 3 more$"):
        check_finite({"first": BAD}, params)


def test_inside_another_program_nothing_is_checked():
    @jax.jit
    def program(x):
        check_finite({"x": all_finite(x)}, {})
        return x + 1

    assert np.isnan(program(jnp.array([np.nan]))).all()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def broken(params, *path):
    """The parameters with one NaN at `path`."""
    if not path:
        return params.at[(0,) * params.ndim].set(np.nan)
    return {**params, path[0]: broken(params[path[0]], *path[1:])}


IMAGES = np.full((2, 64, 64, 3), 100, np.uint8)


def test_a_tokenizer_says_which_half_is_broken(tokenizer):
    tokens = tokenizer.encode(IMAGES, keep=64)
    encoder = broken(tokenizer.params, "encoder", "conv_out", "kernel")
    message = r"the encoder's features on; parameters that are not finite: tokenizer/encoder/conv_out/kernel \(1 of"
    with pytest.raises(NotFiniteError, match=message):
        type(tokenizer)(tokenizer.config, encoder).encode(IMAGES, keep=64)
    decoder = broken(tokenizer.params, "decoder", "conv_out", "bias")
    message = r"the decoder's images on; .*: tokenizer/decoder/conv_out/bias \(1 of 3 values\)"
    with pytest.raises(NotFiniteError, match=message):
        type(tokenizer)(tokenizer.config, decoder).decode(tokens)


def test_the_judge_refuses_nan():
    judge = Judge.load()
    name = sorted(judge.params)[0]
    damaged = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), judge.params[name])
    with pytest.raises(NotFiniteError, match=f"what the judge sees on; parameters that are not finite: judge/{name}"):
        type(judge)(judge.config, {**judge.params, name: damaged}).features(IMAGES)
