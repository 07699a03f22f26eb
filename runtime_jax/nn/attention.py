"""The attention function of both packages. The config chooses its backend; the result is the same."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from runtime_jax.sharding import Axis, partition_spec

AttentionBackend = Literal["xla", "cudnn", "tpu_flash"]
FLASH_BLOCK = 128  # tokens
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

    Raises:
      ValueError: unknown backend.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention backend {backend!r}: allowed are {', '.join(get_args(AttentionBackend))}")
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
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    batch, queries, _, width = query.shape
    keys = key.shape[1]
    query, key, value = (jnp.swapaxes(_pad_tokens(x, FLASH_BLOCK), 1, 2) for x in (query, key, value))
    if bias is not None:
        # The kernel adds the bias before it scales the logits.
        bias = _pad_tokens(bias.astype(jnp.float32) * width**0.5, FLASH_BLOCK, axis=3)
        bias = bias if bias.shape[2] == 1 else _pad_tokens(bias, FLASH_BLOCK, axis=2)
        bias = jnp.broadcast_to(bias, (*query.shape[:3], key.shape[2]))
    real = jnp.broadcast_to(jnp.arange(key.shape[2]) < keys, (batch, key.shape[2])).astype(jnp.int32)
    segments = SegmentIds(q=jnp.ones((batch, query.shape[2]), jnp.int32), kv=real)  # padding is read by no query
    result = flash_attention(query, key, value, ab=bias, segment_ids=segments, sm_scale=width**-0.5)
    return jnp.swapaxes(result, 1, 2)[:, :queries]


def _pad_tokens(x, multiple, value=0.0, *, axis=1):
    """Pads an axis to a multiple of `multiple` tokens."""
    padding = [(0, -size % multiple if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, padding, constant_values=value)
