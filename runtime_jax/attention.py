"""One attention function for both packages; where it runs is a config value, what it computes is not."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AttentionBackend = Literal["xla", "cudnn", "tpu_flash"]


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
      key_bias: added to the logits of a key for every query and head (ToMe's log(size)).
      backend: "xla" anywhere; "cudnn" fused on NVIDIA GPUs (bfloat16 or float16); "tpu_flash" the Pallas kernel on TPUs.

    Raises:
      ValueError: unknown backend.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention backend {backend!r}: allowed are {', '.join(get_args(AttentionBackend))}")
    if backend == "tpu_flash":
        return _tpu_flash(query, key, value, key_bias)
    bias = (
        None
        if key_bias is None
        else key_bias[:, None, None, :].astype(jnp.float32 if backend == "xla" else query.dtype)
    )
    if bias is not None and backend == "cudnn":  # its kernel broadcasts over batch and heads only
        bias = jnp.broadcast_to(bias, (bias.shape[0], 1, query.shape[1], bias.shape[-1]))
    return jax.nn.dot_product_attention(query, key, value, bias=bias, implementation=backend)


def _tpu_flash(query, key, value, key_bias):
    # Imported here: the module loads Pallas' TPU lowering, which other platforms do not need.
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    scale = query.shape[-1] ** -0.5
    bias = None
    if key_bias is not None:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        bias = jnp.broadcast_to(key_bias[:, None, None, :].astype(jnp.float32), shape)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(flash_attention(query, key, value, ab=bias, sm_scale=scale), 1, 2)
