"""Draws a sub-token from logits: guidance, top-k, top-p, and the draw itself; all in float32.

Axes: B examples, V values of a sub-token, L raster tokens, S sub-tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

CfgSchedule = Literal["constant", "linear", "interval", "power-cosine"]


def guidance_scales(
    scales: tuple[float, ...],
    length: int,
    schedule: CfgSchedule,
    interval: tuple[float, float] = (0.0, 1.0),
    power: float = 1.0,
) -> Float[np.ndarray, "L S"]:
    """Scale of classifier-free guidance for every raster token and sub-token; 1 is no guidance.

    Args:
      scales: one for each sub-token.
      length: L.
      schedule: "constant"; "linear", from 1 at the first token to the scale at the last; "interval", the scale for
        the tokens in a part of the sequence, else 1; "power-cosine", from 1 at the first token to the scale at the last
        as 1 - cos(pi (token / (L - 1))^power) rises (RAR, Yu et al. 2024).
      interval: that part, as fractions of the sequence: start <= token / L < end.
      power: of "power-cosine"; the higher, the later it rises.
    """
    position = np.arange(length)
    elapsed = position / max(length - 1, 1)
    if schedule == "linear":
        share = elapsed
    elif schedule == "power-cosine":
        share = (1 - np.cos(np.pi * elapsed**power)) / 2
    elif schedule == "interval":
        share = (position >= interval[0] * length) & (position < interval[1] * length)
    else:
        share = np.ones(length)
    return (1 + share[:, None] * (np.asarray(scales) - 1)).astype(np.float32)


def guided(logits: Float[Array, "B 2 V"], scale: Float[Array, ""]) -> Float[Array, "B V"]:
    """Classifier-free guidance: null + scale (class - null), from the logits of class and null class."""
    conditional, null = logits[:, 0], logits[:, 1]
    return null + scale * (conditional - null)


def keep_likely(
    logits: Float[Array, "B V"], top_k: int = 0, top_p: Float[Array, ""] | None = None
) -> Float[Array, "B V"]:
    """Keeps the k likeliest values, and of them the fewest whose probabilities add up to p; -inf for the others.

    Values as likely as the last one kept are kept too.

    Args:
      top_k: 0: all values.
      top_p: above 0; None: no such limit.
    """
    if not top_k and top_p is None:
        return logits
    ranked = jax.lax.top_k(logits, top_k or logits.shape[-1])[0]
    last = ranked[:, -1]
    if top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.min(jnp.where(likelier < top_p, ranked, jnp.inf), axis=-1)
    return jnp.where(logits >= last[:, None], logits, -jnp.inf)


def draw(logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """A value from softmax(logits) for each example, by the Gumbel-max trick with the example's own key."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return likeliest(jax.lax.optimization_barrier(logits + noise))  # without it, each reduction makes the noise again


def likeliest(scores: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The first value with the highest score: two plain reductions, as XLA's own argmax is not vectorised on CPU."""
    value = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
    is_best = scores == scores.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_best, value, scores.shape[-1] - 1), axis=-1)
