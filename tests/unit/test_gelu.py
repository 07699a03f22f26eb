"""The exact GELU against the normal distribution's own function."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from runtime_jax.nn.gelu import gelu

X = np.linspace(-12, 12, 2401, dtype=np.float32)
EXACT = np.array([x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in X.tolist()])


def test_it_is_exact_in_float32():
    np.testing.assert_allclose(gelu(jnp.asarray(X)), EXACT, rtol=0, atol=1e-6)  # 7e-7
    slope = jax.vmap(jax.grad(gelu))(jnp.asarray(X))
    density = np.exp(-(X.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = [0.5 * math.erfc(-x / math.sqrt(2)) for x in X.tolist()] + X * density
    np.testing.assert_allclose(slope, expected, rtol=0, atol=3e-7)  # 1.4e-7


def test_in_bfloat16_only_the_result_is_rounded():
    x = jnp.asarray(X).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gelu(x), gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))
