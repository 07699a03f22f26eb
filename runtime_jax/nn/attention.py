"""The attention function of both packages. The config chooses its backend; the result is the same."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from runtime_jax.sharding import Axis, partition_spec, platform

AttentionBackend = Literal["auto", "xla", "cudnn", "tpu_flash"]
LONG = 2048  # tokens: from here on "auto" does without a matrix of scores (85 MB a head at 4608 tokens)
FLASH_BLOCKS = (128, 512)  # tokens of short and of long sequences
HIDDEN = -3e4  # the logit of a masked key: finite in float16, yet 0 after the softmax


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    *,
    key_bias: Float[Array, "B S"] | None = None,
    mask: Bool[Array, "#B T S"] | None = None,
    backend: AttentionBackend = "xla",
) -> Float[Array, "B T H D"]:
    """softmax(query · key / sqrt(D) + key_bias) · value over the keys that `mask` lets a query see; float32 inside.

    Args:
      key_bias: added to a key's logits for every query and head (ToMe's log(size)); "cudnn" gives it no gradient.
      mask: True where a query sees a key, at least one a query; None: all of them.
      backend: "xla" runs anywhere; "cudnn" on NVIDIA GPUs in bfloat16, float16; "tpu_flash" is Pallas' kernel for TPUs.
        "auto" takes the platform's kernel for LONG sequences without bias and mask, and otherwise "xla".

    Raises:
      ValueError: unknown backend, or one that the platform, the dtype or the heads' width rules out.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention backend {backend!r}: allowed are {', '.join(get_args(AttentionBackend))}")
    if backend == "auto":
        plain = key_bias is None and mask is None
        backend = _fastest(query) if plain and min(query.shape[1], key.shape[1]) >= LONG else "xla"
    elif obstacle := _obstacle(backend, query):
        raise ValueError(f"attention backend {backend!r} {obstacle}; 'auto' and 'xla' run here")
    bias = None if key_bias is None else key_bias[:, None, None, :]
    if backend == "xla":
        mask = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, implementation="xla")
    if mask is not None:
        hidden = jnp.where(mask[:, None], 0.0, HIDDEN)
        bias = hidden if bias is None else bias + hidden
    if backend == "tpu_flash":
        return _tpu_flash(query, key, value, bias)
    if bias is not None:
        return _cudnn_with_bias(query, key, value, bias)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _fastest(query) -> AttentionBackend:
    """The platform's own kernel, if it can be used."""
    kernel = {"gpu": "cudnn", "tpu": "tpu_flash"}.get(platform(), "xla")
    return "xla" if _obstacle(kernel, query) else kernel


def _obstacle(backend: AttentionBackend, query) -> str | None:
    """Why a backend cannot be used, or None."""
    if backend == "xla":
        return None
    needs, dtypes = {
        "cudnn": ("gpu", (jnp.bfloat16, jnp.float16)),
        "tpu_flash": ("tpu", (jnp.bfloat16, jnp.float32)),
    }[backend]
    width = query.shape[-1]
    if platform() != needs:
        return f"runs on {needs.upper()}s, not on this platform ({platform()})"
    if query.dtype not in dtypes:
        return f"takes {' or '.join(jnp.dtype(dtype).name for dtype in dtypes)}, not {query.dtype.name}"
    if backend == "cudnn" and (width % 8 or width > 128):
        return f"takes head sizes up to 128 that are multiples of 8, not {width}"
    if backend == "tpu_flash" and width > 128 and width % 128:
        return f"takes head sizes up to 128, or multiples of 128, not {width}"
    return None


def _cudnn_with_bias(query, key, value, bias):
    # With a bias, cuDNN takes only even numbers of tokens, and broadcasts over batch and heads but not over queries.
    length = query.shape[1]
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], length, bias.shape[-1])).astype(query.dtype)
    query, key, value = (_pad_tokens(x, 2) for x in (query, key, value))
    bias = _pad_tokens(_pad_tokens(bias, 2, axis=2), 2, HIDDEN, axis=3)
    result = jax.nn.dot_product_attention(query, key, value, bias=bias, implementation="cudnn")
    return result[:, :length]


def _tpu_flash(query, key, value, bias):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _flash_kernel(query, key, value, bias)
    # The compiler cannot partition a Pallas kernel, so every device runs it on its own examples and heads.
    spec = partition_spec(query.shape, (Axis.BATCH, None, Axis.HEADS, None), mesh.shape)
    bias_spec = None if bias is None else partition_spec(bias.shape, (Axis.BATCH, None, None, None), mesh.shape)
    kernel = jax.shard_map(_flash_kernel, in_specs=(spec, spec, spec, bias_spec), out_specs=spec, check_vma=False)
    return kernel(query, key, value, bias)


def _flash_kernel(query, key, value, bias):
    # Imported here: it loads Pallas' TPU lowering, which other platforms do not need.
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    batch, queries, _, width = query.shape
    keys = key.shape[1]
    rows, columns = (FLASH_BLOCKS[tokens >= LONG] for tokens in (queries, keys))
    query = jnp.swapaxes(_pad_tokens(query, rows), 1, 2)
    key, value = (jnp.swapaxes(_pad_tokens(x, columns), 1, 2) for x in (key, value))
    if bias is not None:
        # The kernel adds the bias before it scales the logits.
        bias = _pad_tokens(bias.astype(jnp.float32) * width**0.5, columns, axis=3)
        bias = bias if bias.shape[2] == 1 else _pad_tokens(bias, rows, axis=2)
        bias = jnp.broadcast_to(bias, (*query.shape[:3], key.shape[2]))
    segments = None
    if key.shape[2] > keys:  # padding is read by no query
        real = jnp.broadcast_to(jnp.arange(key.shape[2]) < keys, (batch, key.shape[2])).astype(jnp.int32)
        segments = SegmentIds(q=jnp.ones((batch, query.shape[2]), jnp.int32), kv=real)
    names = [field.name for field in dataclasses.fields(BlockSizes)]
    blocks = BlockSizes(**{name: columns if "_k" in name else rows for name in names} | {"block_b": 1})
    result = flash_attention(query, key, value, ab=bias, segment_ids=segments, sm_scale=width**-0.5, block_sizes=blocks)
    return jnp.swapaxes(result, 1, 2)[:, :queries]


def _pad_tokens(x, multiple, value=0.0, *, axis=1):
    """Pads an axis to a multiple of `multiple` tokens."""
    padding = [(0, -size % multiple if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, padding, constant_values=value)
