"""The interface of a quantizer: a record of functions, chosen by name with `TokenizerConfig.quantizer`.

Axes: ... any batch axes, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from mergevq_jax.tokenizer.quantizers import lfq


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Functions of features [..., C].

    Attributes:
      vocab_size: number of indices, by C.
      quantize: features to codes [..., C], with a gradient.
      to_indices: features to int32 indices [...], 0 to vocab_size - 1.
      from_indices: indices and C to codes [..., C], equal to those of `quantize`.
      entropy: (features, temperature=...) to `lfq.EntropyTerms`, the entropy loss; None: the quantizer has none.
      commitment: features to the commitment loss; None: the quantizer has none.
    """

    vocab_size: Callable[[int], int]
    quantize: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    to_indices: Callable[[Float[Array, "..."]], Int[Array, "..."]]
    from_indices: Callable[[Int[Array, "..."], int], Float[Array, "..."]]
    entropy: Callable[..., lfq.EntropyTerms] | None = None
    commitment: Callable[[Float[Array, "..."]], Float[Array, ""]] | None = None


# By name. A quantizer that is added here before a config names it trains, saves, loads and generates like LFQ.
QUANTIZERS: dict[str, Quantizer] = {
    "lfq": Quantizer(
        vocab_size=lambda channels: 2**channels,
        quantize=lfq.quantize,
        to_indices=lfq.to_indices,
        from_indices=lfq.from_indices,
        entropy=lfq.entropy_terms,
        commitment=lfq.commitment_loss,
    )
}
