"""Look-up-free quantisation against its dense form, which builds all 2^b codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_tools import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from mergevq_jax.tokenizer.quantizers import lfq
from runtime_jax.mesh import MeshConfig, make_mesh

TEMPERATURE, EPS = 0.01, 1e-5


def dense_terms(z):
    """Entropy terms as published: by a softmax over a codebook of all 2^b codes."""
    bits = z.shape[-1]
    codebook = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=bits)), z.dtype)
    logits = (2 / TEMPERATURE) * z.reshape(-1, bits) @ codebook.T
    probabilities = jax.nn.softmax(logits, axis=-1)
    per_sample = -jnp.mean(jnp.sum(probabilities * jax.nn.log_softmax(logits, axis=-1), axis=-1))
    mean = probabilities.mean(0)
    return per_sample, -jnp.sum(mean * jnp.log(mean + EPS))


@jit
def ours(z):
    def loss(z):
        terms = lfq.entropy_terms(z, temperature=TEMPERATURE, eps=EPS)
        return terms.loss, (terms.per_sample, terms.codebook)

    return jax.value_and_grad(loss, has_aux=True)(z)


entropy_terms = jit(lfq.entropy_terms)


def dense(z):
    def loss(z):
        per_sample, codebook = dense_terms(z)
        return per_sample - codebook, (per_sample, codebook)

    with jax.enable_x64(True):  # in float32 the dense form is less exact than ours
        return jax.device_get(jit(jax.value_and_grad(loss, has_aux=True))(z.astype(np.float64)))


def features(seed, *shape, spread):
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# At temperature 0.01 bits are fair within |z| < 0.01, so 0.003 mixes all codes and 1 hardly any.
@pytest.mark.parametrize("spread", [0.003, 0.03, 1.0])
@pytest.mark.parametrize("bits", [10, 5, 1])
def test_entropy_equals_the_dense_form(bits, spread):
    z = features(bits, 2, 29, bits, spread=spread)
    (value, terms), gradient = ours(z)
    (expected, expected_terms), expected_gradient = dense(z)
    assert expected_gradient.dtype == np.float64 and np.abs(expected_gradient).max() > 0.01
    # Measured at most: values 1.5e-6, gradient 2.9e-6 (its largest entries are about 2).
    np.testing.assert_allclose(value, expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(terms, expected_terms, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5)


def test_the_dense_codebook_counts_like_the_indices():
    """The entropies do not depend on the order of the codes, but the mean distribution has this one."""
    z = features(0, 7, 5, spread=0.003)
    logits = (4 / TEMPERATURE) * jnp.asarray(z)
    probabilities = np.asarray(lfq._code_probabilities(logits))
    for index in range(32):
        code = np.asarray(lfq.from_indices(jnp.asarray(index), 5))
        expected = np.prod(jax.nn.sigmoid(logits * code[None]), axis=-1)
        np.testing.assert_allclose(probabilities[:, index], expected, rtol=1e-5)


def test_entropies_at_their_limits():
    terms = entropy_terms(jnp.zeros((64, 6)))
    np.testing.assert_allclose([terms.per_sample, terms.codebook], 6 * np.log(2), rtol=1e-3)
    all_codes = lfq.from_indices(jnp.arange(64), 6)
    terms = entropy_terms(all_codes)
    np.testing.assert_allclose([terms.per_sample, terms.codebook], [0, 6 * np.log(2)], rtol=1e-3, atol=1e-6)
    assert float(terms.loss) == pytest.approx(-6 * np.log(2), rel=1e-3)


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30, 3e38])
def test_large_features_are_finite(scale):
    z = scale * np.sign(features(0, 4, 7, spread=1.0)).astype(np.float32)
    (value, terms), gradient = ours(np.where(np.isfinite(z), z, np.float32(scale)))
    assert np.isfinite(value) and np.isfinite(terms).all() and np.isfinite(gradient).all()
    assert np.isfinite(lfq.quantize(jnp.asarray(z))).all()


def test_gradient_of_the_binary_entropy():
    """d/dx H(sigmoid(x)) = -x p (1 - p), also at 0 and far out, where the naive form is 0 * inf."""
    x = np.array([-200, -88, -5, -1e-3, 0, 1e-3, 0.5, 40, 120], np.float64)
    p = 1 / (1 + np.exp(-np.abs(x)))
    gradient = jax.vmap(jax.grad(lfq._binary_entropy))(x.astype(np.float32))
    np.testing.assert_allclose(gradient, -x * p * (1 - p), rtol=1e-4, atol=1e-7)


def test_the_mean_distribution_is_the_global_batchs():
    z = features(3, 16, 4, 9, spread=0.02)
    (value, terms), gradient = ours(z)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        split = jax.device_put(z, jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp"))))
        (split_value, split_terms), split_gradient = ours(split)
    np.testing.assert_allclose(split_value, value, rtol=1e-6)
    np.testing.assert_allclose(split_terms, terms, rtol=1e-6)
    np.testing.assert_allclose(split_gradient, gradient, rtol=1e-4, atol=1e-7)
    halves = [float(entropy_terms(half).codebook) for half in (z[:8], z[8:])]
    assert abs(np.mean(halves) - float(terms[1])) > 1e-2  # a mean over devices would differ


# Codes and indices.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
def test_codes_are_exactly_plus_and_minus_one(dtype, compile):
    z = jnp.asarray(np.r_[features(0, 200, spread=1.0), features(1, 50, spread=1e-30), 3e7, -5e20, 1e-37], dtype)
    codes = (jax.jit(lfq.quantize) if compile else lfq.quantize)(z)
    assert codes.dtype == dtype
    bits = np.asarray(codes).view(np.uint32 if dtype == jnp.float32 else np.uint16)
    one = np.asarray([1, -1], dtype).view(bits.dtype)
    np.testing.assert_array_equal(bits, np.where(np.asarray(z, np.float32) > 0, one[0], one[1]))


def test_zero_goes_to_minus_one():
    zeros = jnp.asarray([[0.0, -0.0, 1e-30, -1e-30]])
    assert lfq.quantize(zeros).tolist() == [[-1, -1, 1, -1]]
    assert lfq.to_indices(zeros).tolist() == [4]
    assert float(lfq.commitment_loss(jnp.zeros((3, 5)))) == 1.0


def test_the_gradient_passes_straight_through():
    z, weight = features(0, 3, 4, 6, spread=1.0), features(1, 3, 4, 6, spread=1.0)
    gradient = jax.grad(lambda z: (weight * lfq.quantize(z)).sum())(z)
    np.testing.assert_array_equal(gradient, weight)
    gradient = jax.grad(lambda z: (weight * lfq.quantize(z) ** 2).sum())(z)
    np.testing.assert_array_equal(gradient, 2 * weight * np.where(z > 0, 1, -1))


def test_commitment():
    z = features(0, 3, 4, 6, spread=1.0)
    value, gradient = jax.value_and_grad(lfq.commitment_loss)(jnp.asarray(z))
    assert float(value) == pytest.approx(np.mean((z - np.where(z > 0, 1, -1)) ** 2), rel=1e-6)
    np.testing.assert_allclose(gradient, 2 * (z - np.where(z > 0, 1, -1)) / z.size, rtol=1e-5)


def test_channel_0_is_the_least_significant_bit():
    codes = jnp.asarray([[1.0, -1, -1], [-1, -1, 1], [1, 1, -1]])
    assert lfq.to_indices(codes).tolist() == [1, 4, 3]
    assert lfq.to_indices(codes[0]).shape == ()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**18 - 1), min_size=6, max_size=6))
def test_indices_of_18_bits_round_trip(indices):
    indices = jnp.asarray(indices, jnp.int32).reshape(2, 3)
    codes = lfq.from_indices(indices, 18)
    assert codes.shape == (2, 3, 18) and codes.dtype == jnp.float32 and set(np.unique(codes)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(lfq.to_indices(codes), indices)


@pytest.mark.parametrize("bits", [1, 18, 30, 31])
def test_the_largest_index(bits):
    codes = jnp.ones((1, bits))
    assert lfq.to_indices(codes).tolist() == [2**bits - 1]
    np.testing.assert_array_equal(lfq.from_indices(jnp.asarray([2**bits - 1]), bits), codes)
