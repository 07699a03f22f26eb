"""Look-up-free quantisation: a code is the signs of all channels; exact entropies over all 2^b codes, no codebook.

The dense form (MAGVIT-v2, arXiv 2310.05737) makes [N, 2^b] probabilities. Given a token its bits are independent, so
the entropy of one token is a sum of b binary entropies, and the mean distribution over all codes is one matrix product
of two [N, 2^(b/2)] factors.

Axes: ... any batch axes, N flattened tokens, C = b bits; channel 0 is the least significant bit of an index.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class EntropyTerms:
    """In nats: the mean of the tokens' entropies, and the entropy of their mean distribution."""

    per_sample: Float[Array, ""]
    codebook: Float[Array, ""]

    @property
    def loss(self) -> Float[Array, ""]:
        """Low where tokens are confident and use the whole codebook."""
        return self.per_sample - self.codebook


def quantize(z: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Sign of every channel (0 goes to -1) with the straight-through gradient."""
    return _sign(z) + (z - jax.lax.stop_gradient(z))  # in this order exactly +1 and -1


def _sign(z):
    return jnp.where(z > 0, 1.0, -1.0).astype(z.dtype)


def commitment_loss(z: Float[Array, "*batch C"]) -> Float[Array, ""]:
    """Mean squared distance of features from their codes."""
    z = z.astype(jnp.float32)
    return jnp.mean(jnp.square(z - jax.lax.stop_gradient(_sign(z))))


def to_indices(codes: Float[Array, "*batch C"]) -> Int[Array, "*batch"]:
    """Index sum_j 2^j [code_j > 0]; at most 31 bits."""
    ones = (codes > 0).astype(jnp.int32)
    return jnp.sum(ones << _bit_numbers(codes.shape[-1], codes.ndim), axis=-1, dtype=jnp.int32)


def from_indices(indices: Int[Array, "*batch"], bits: int) -> Float[Array, "*batch C"]:
    """The inverse of `to_indices`: codes of +1 and -1 in float32."""
    ones = (indices[..., None] >> _bit_numbers(bits, indices.ndim + 1)) & 1
    return 2.0 * ones.astype(jnp.float32) - 1.0


def _bit_numbers(bits: int, ndim: int) -> np.ndarray:
    """0, 1, ..., bits - 1 along the last of ndim axes."""
    return np.arange(bits, dtype=np.int32).reshape(*[1] * (ndim - 1), bits)


def entropy_terms(z: Float[Array, "*batch C"], *, temperature: float = 0.01, eps: float = 1e-5) -> EntropyTerms:
    """Exact entropies of softmax(2 z·c / temperature) over all 2^C codes c, in O(N 2^(C/2)) memory and one matmul.

    Args:
      z: features before the sign; under jit on a mesh the mean runs over the global batch.
      eps: inside the logarithm of the mean distribution, as in the released code.
    """
    logits = (4.0 / temperature) * z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    per_sample = jnp.mean(jnp.sum(_binary_entropy(logits), axis=-1))
    low, high = jnp.split(logits, [(logits.shape[-1] + 1) // 2], axis=-1)
    sums = jnp.einsum("nl,nh->hl", _code_probabilities(low), _code_probabilities(high), precision="highest")
    mean = sums / logits.shape[0]
    return EntropyTerms(per_sample=per_sample, codebook=-jnp.sum(mean * jnp.log(mean + eps)))


def _binary_entropy(logits):
    """Entropy of a Bernoulli variable from its log-odds; value and gradient are finite at any size."""
    size = jnp.minimum(jnp.abs(logits), 100.0)  # beyond it the entropy is 0 in float32, but inf * 0 is NaN
    return jnp.log1p(jnp.exp(-size)) + size * jax.nn.sigmoid(-size)


def _code_probabilities(logits: Float[Array, "N b"]) -> Float[Array, "N codes"]:
    """Probabilities [N, 2^b] of all codes of b independent bits; bit 0 varies fastest."""
    probabilities = jnp.ones((logits.shape[0], 1), jnp.float32)
    for bit in range(logits.shape[1]):
        one = jax.nn.sigmoid(logits[:, bit : bit + 1])
        zero = jax.nn.sigmoid(-logits[:, bit : bit + 1])
        probabilities = jnp.concatenate([probabilities * zero, probabilities * one], axis=1)
    return probabilities
