"""The attention function and its backends against a plain softmax."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_tools import jit
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas import tpu as pallas_tpu

from runtime_jax.cost import count_flops
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn import attention as attention_module
from runtime_jax.nn.attention import attention

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
    with pytest.raises(ValueError, match="attention backend 'flash3': allowed are auto, xla, cudnn, tpu_flash"):
        unchecked(query, key, value, backend="flash3")


@pytest.fixture
def traced_for(monkeypatch):
    """Chooses the platform that attention takes the program to be for."""
    return lambda name: monkeypatch.setattr(attention_module, "platform", lambda: name)


@pytest.mark.parametrize("long", [2048, 128], ids=["blocks of 128", "blocks of 512 keys"])
def test_tpu_flash_equals_xla(long, traced_for, monkeypatch):
    """Pallas' kernel in its interpreter: 9 and 137 tokens are padded to its blocks."""
    traced_for("tpu")
    monkeypatch.setattr(attention_module, "LONG", long)
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
def test_tpu_flash_lowers_for_tpus_on_a_mesh(with_bias, traced_for):
    """The compiler refuses to partition the kernel, so each device must have its own."""
    traced_for("tpu")
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs(8, 130, 130, 2, 64)]
    lower = export.export(run("tpu_flash"), platforms=["tpu"])
    arguments = shapes if with_bias else shapes[:3]
    assert "tpu_custom_call" in lower(*arguments).mlir_module()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        text = export.export(run("tpu_flash"), platforms=["tpu"])(*arguments).mlir_module()
    assert "tpu_custom_call" in text and "tensor<2x1x256x64xbf16>" in text  # 8 examples over 4, 2 heads over 2


@pytest.mark.parametrize(("queries", "keys", "masked"), [(5, 7, False), (4, 7, True), (6, 6, False)])
def test_cudnn_gets_even_lengths_and_a_whole_bias(queries, keys, masked, monkeypatch, traced_for):
    """Its kernels run on NVIDIA GPUs only: here XLA computes what they are given."""
    traced_for("gpu")
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


def text_of(backend, tokens, *, dtype=jnp.bfloat16, width=64, key_bias=False, mask=False):
    """What is traced for a sequence; Pallas' kernel is there as pallas_call."""
    x = jax.ShapeDtypeStruct((1, tokens, 2, width), dtype)
    extra = {"key_bias": jax.ShapeDtypeStruct((1, tokens), jnp.float32)} if key_bias else {}
    extra |= {"mask": jax.ShapeDtypeStruct((1, tokens, tokens), jnp.bool_)} if mask else {}
    return str(run(backend).trace(x, x, x, **extra).jaxpr)


def test_auto_without_a_kernel_is_xla():
    assert text_of("auto", 4608) == text_of("xla", 4608)


@pytest.mark.parametrize(
    ("tokens", "options", "flash"),
    [
        (4608, {}, True),  # FLUX at 1024 px
        (4608, {"width": 128, "dtype": jnp.float32}, True),
        (1024, {}, False),
        (4608, {"key_bias": True}, False),
        (4608, {"mask": True}, False),
        (4608, {"width": 192}, False),
        (4608, {"dtype": jnp.float16}, False),
    ],
    ids=str,
)
def test_auto_takes_flash_on_tpus_where_it_pays(tokens, options, flash, traced_for):
    traced_for("tpu")
    assert ("pallas_call" in text_of("auto", tokens, **options)) == flash


@pytest.mark.parametrize(
    ("tokens", "options", "cudnn"),
    [(4608, {}, True), (1024, {}, False), (4608, {"dtype": jnp.float32}, False), (4608, {"mask": True}, False)],
    ids=str,
)
def test_auto_takes_cudnn_on_gpus_where_it_pays(tokens, options, cudnn, traced_for, monkeypatch):
    taken = []

    def spy(query, key, value, *, implementation, **kwargs):
        taken.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    traced_for("gpu")
    text_of("auto", tokens, **options)
    assert taken == ["cudnn" if cudnn else "xla"]


def test_the_flops_of_kernels_are_counted(traced_for, monkeypatch):
    """As those of xla; backwards, kernels compute the scores again."""

    def flops(backend, mesh_sizes=None):
        x = jax.ShapeDtypeStruct((8, 512, 2, 64), jnp.bfloat16)
        forward = functools.partial(attention, backend=backend)
        gradient = jax.grad(lambda *x: attention(*x, backend=backend).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        with jax.set_mesh(make_mesh(MeshConfig(**mesh_sizes))) if mesh_sizes else contextlib.nullcontext():
            return [count_flops(jax.jit(function).trace(x, x, x).jaxpr.jaxpr) for function in (forward, gradient)]

    matmul = 8 * 2 * 2 * 512**2 * 64
    assert flops("xla") == [2 * matmul, 6 * matmul]
    traced_for("tpu")
    assert flops("tpu_flash") == flops("tpu_flash", {"data": 2, "fsdp": 2, "tensor": 2}) == [2 * matmul, 9 * matmul]
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    traced_for("gpu")
    assert flops("cudnn") == [2 * matmul, 7 * matmul]


@pytest.mark.parametrize(
    ("backend", "platform", "options", "message"),
    [
        ("cudnn", "cpu", {}, r"'cudnn' runs on GPUs, not on this platform \(cpu\); 'auto' and 'xla' run here"),
        ("tpu_flash", "gpu", {}, r"'tpu_flash' runs on TPUs, not on this platform \(gpu\)"),
        ("cudnn", "gpu", {"dtype": jnp.float32}, "'cudnn' takes bfloat16 or float16, not float32"),
        ("cudnn", "gpu", {"width": 136}, "'cudnn' takes head sizes up to 128 that are multiples of 8, not 136"),
        ("tpu_flash", "tpu", {"dtype": jnp.float16}, "'tpu_flash' takes bfloat16 or float32, not float16"),
        ("tpu_flash", "tpu", {"width": 192}, "'tpu_flash' takes head sizes up to 128, or multiples of 128, not 192"),
    ],
)
def test_a_backend_that_cannot_run(backend, platform, options, message, traced_for):
    traced_for(platform)
    with pytest.raises(ValueError, match=message):
        text_of(backend, 16, **options)
