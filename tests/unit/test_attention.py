"""The attention function and its backends against a plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_tools import jit
from jax import export
from jax.experimental.pallas import tpu as pallas_tpu

from runtime_jax.nn.attention import attention
from runtime_jax.sharding import MeshConfig, make_mesh

B, T, S, H, D = 2, 5, 7, 3, 4


def inputs(*sizes):
    batch, queries, keys, heads, width = sizes or (B, T, S, H, D)
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width), (batch, keys)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def random_mask(batch, queries, keys):
    """Half of the keys hidden from each query, never all of them."""
    mask = np.random.default_rng(1).random((batch, queries, keys)) < 0.5
    mask[:, :, 0] = True
    return mask


def plain_attention(query, key, value, key_bias, mask=None):
    result = np.zeros_like(query)
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        logits = query[b, :, h] @ key[b, :, h].T / np.sqrt(query.shape[-1]) + key_bias[b]
        if mask is not None:
            logits = np.where(mask[b % len(mask)], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        result[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value[b, :, h]
    return result


def run(backend):
    def function(query, key, value, key_bias=None, mask=None):
        return attention(query, key, value, key_bias=key_bias, mask=mask, backend=backend)

    return jax.jit(function)


def test_xla_equals_a_plain_softmax():
    query, key, value, key_bias = inputs()
    np.testing.assert_allclose(
        run("xla")(query, key, value, key_bias), plain_attention(query, key, value, key_bias), rtol=1e-5, atol=1e-6
    )
    without = plain_attention(query, key, value, np.zeros_like(key_bias))
    np.testing.assert_allclose(run("xla")(query, key, value), without, rtol=1e-5, atol=1e-6)
    assert np.abs(without - plain_attention(query, key, value, key_bias)).max() > 0.1


@pytest.mark.parametrize("batch", [1, B], ids=["shared", "each"])
def test_a_mask_hides_keys(batch):
    query, key, value, key_bias = inputs()
    mask = random_mask(batch, T, S)
    expected = plain_attention(query, key, value, key_bias, mask)
    np.testing.assert_allclose(run("xla")(query, key, value, key_bias, mask), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_of_log_size_counts_a_token_as_often():
    """ToMe's proportional attention: a token of size 3 weighs as much as three equal ones."""
    query, key, value, _ = inputs()
    thrice = [np.concatenate([x, x[:, :1], x[:, :1]], axis=1) for x in (key, value)]
    size = np.ones((B, S), np.float32)
    size[:, 0] = 3
    np.testing.assert_allclose(
        run("xla")(query, key, value, np.log(size)), run("xla")(query, *thrice), rtol=1e-5, atol=1e-6
    )


def test_softmax_is_in_float32_for_bfloat16_inputs():
    query, key, value, key_bias = inputs()
    query = 8 * query  # logits of tens: in bfloat16 they would err by a tenth
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    result = run("xla")(*half, key_bias)
    assert result.dtype == jnp.bfloat16
    expected = plain_attention(*(np.asarray(x, np.float32) for x in half), key_bias)
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, rtol=0, atol=0.02)


def test_an_unknown_backend():
    query, key, value, _ = inputs()
    unchecked = attention.__wrapped__  # without the type check that only tests have
    with pytest.raises(ValueError, match="attention backend 'flash3': allowed are xla, cudnn, tpu_flash"):
        unchecked(query, key, value, backend="flash3")


def test_tpu_flash_equals_xla():
    """Pallas' kernel in its interpreter: 9 and 137 tokens are padded to its blocks of 128."""
    arguments = inputs(1, 9, 137, 1, 8)

    mask = random_mask(1, 9, 137)

    def loss(backend):
        function = run(backend)
        return jit(jax.value_and_grad(lambda *x: (function(*x, mask) ** 2).sum(), argnums=(0, 1, 2, 3)))

    with pallas_tpu.force_tpu_interpret_mode():
        value, gradient = loss("tpu_flash")(*arguments)
    expected, expected_gradient = loss("xla")(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_tpu_flash_lowers_for_tpus_on_a_mesh(with_bias):
    """The compiler refuses to partition the kernel, so each device must have its own."""
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs(8, 130, 130, 2, 64)]
    lower = export.export(run("tpu_flash"), platforms=["tpu"])
    arguments = shapes if with_bias else shapes[:3]
    assert "tpu_custom_call" in lower(*arguments).mlir_module()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        text = export.export(run("tpu_flash"), platforms=["tpu"])(*arguments).mlir_module()
    assert "tpu_custom_call" in text and "tensor<2x1x256x64xbf16>" in text  # 8 examples over 4, 2 heads over 2


@pytest.mark.parametrize(("queries", "keys", "masked"), [(5, 7, False), (4, 7, True), (6, 6, False)])
def test_cudnn_gets_even_lengths_and_a_whole_bias(queries, keys, masked, monkeypatch):
    """Its kernels run on NVIDIA GPUs only: here XLA computes what they are given."""
    given = []

    def xla(query, key, value, *, bias, implementation):
        given.append((implementation, query.shape[1], key.shape[1], bias.shape, bias.dtype))
        return jax.nn.dot_product_attention.original(query, key, value, bias=bias, implementation="xla")

    xla.original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    query, key, value, key_bias = inputs(B, queries, keys, H, 8)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    mask = jnp.asarray(random_mask(B, queries, keys)) if masked else None
    result = attention(*half, key_bias=jnp.asarray(key_bias), mask=mask, backend="cudnn")
    expected = plain_attention(*(np.asarray(x, np.float32) for x in half), key_bias, mask)
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, rtol=0, atol=0.02)
    even = [queries + queries % 2, keys + keys % 2]
    assert given == [("cudnn", *even, (B, 1, *even), jnp.bfloat16)]
