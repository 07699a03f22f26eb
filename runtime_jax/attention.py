"""One attention function for both packages; where it runs is a config value, what it computes is not."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from runtime_jax.sharding import Axis, partition_spec

AttentionBackend = Literal["xla", "cudnn", "tpu_flash"]
FLASH_BLOCK = 128  # tokens


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    *,
    key_bias: Float[Array, "B S"] | None = None,
    backend: AttentionBackend = "xla",
) -> Float[Array, "B T H D"]:
    """softmax(query · key / sqrt(D) + key_bias) · value, logits and softmax in float32.

    Args:
      key_bias: added to the logits of a key for every query and head (ToMe's log(size)); "cudnn" gives it no gradient.
      backend: "xla" anywhere; "cudnn" fused on NVIDIA GPUs (bfloat16, float16); "tpu_flash" Pallas' kernel on TPUs.

    Raises:
      ValueError: unknown backend.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention backend {backend!r}: allowed are {', '.join(get_args(AttentionBackend))}")
    if backend == "tpu_flash":
        return _tpu_flash(query, key, value, key_bias)
    if backend == "cudnn" and key_bias is not None:
        return _cudnn_with_bias(query, key, value, key_bias)
    bias = None if key_bias is None else key_bias[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, bias=bias, implementation=backend)


def _cudnn_with_bias(query, key, value, key_bias):
    # With a bias, its kernels take even numbers of tokens only, and broadcast over batch and heads, not over queries.
    length = query.shape[1]
    query, key, value = (_pad_tokens(x, 2) for x in (query, key, value))
    bias = _pad_tokens(key_bias.astype(query.dtype), 2, float(jnp.finfo(query.dtype).min) / 2)
    bias = jnp.broadcast_to(bias[:, None, None, :], (bias.shape[0], 1, query.shape[1], bias.shape[-1]))
    result = jax.nn.dot_product_attention(query, key, value, bias=bias, implementation="cudnn")
    return result[:, :length]


def _tpu_flash(query, key, value, key_bias):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _flash_kernel(query, key, value, key_bias)
    # The compiler cannot partition a Pallas kernel, so every device runs it on its own examples and heads.
    spec = partition_spec(query.shape, (Axis.BATCH, None, Axis.HEADS, None), mesh.shape)
    bias_spec = None if key_bias is None else PartitionSpec(spec[0], None)
    kernel = jax.shard_map(_flash_kernel, in_specs=(spec, spec, spec, bias_spec), out_specs=spec, check_vma=False)
    return kernel(query, key, value, key_bias)


def _flash_kernel(query, key, value, key_bias):
    # Imported here: the module loads Pallas' TPU lowering, which other platforms do not need.
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    batch, queries, _, width = query.shape
    keys = key.shape[1]
    query, key, value = (jnp.swapaxes(_pad_tokens(x, FLASH_BLOCK), 1, 2) for x in (query, key, value))
    bias = None
    if key_bias is not None:
        # The kernel adds it before it scales the logits.
        bias = _pad_tokens(key_bias.astype(jnp.float32), FLASH_BLOCK) * width**0.5
        bias = jnp.broadcast_to(bias[:, None, None, :], (*query.shape[:3], key.shape[2]))
    real = jnp.broadcast_to(jnp.arange(key.shape[2]) < keys, (batch, key.shape[2])).astype(jnp.int32)
    segments = SegmentIds(q=jnp.ones((batch, query.shape[2]), jnp.int32), kv=real)  # padding is read by no query
    result = flash_attention(query, key, value, ab=bias, segment_ids=segments, sm_scale=width**-0.5)
    return jnp.swapaxes(result, 1, 2)[:, :queries]


def _pad_tokens(x, multiple, value=0.0):
    """Pads axis 1 up to a multiple of `multiple` tokens."""
    return jnp.pad(
        x, [(0, -x.shape[1] % multiple if axis == 1 else 0) for axis in range(x.ndim)], constant_values=value
    )
