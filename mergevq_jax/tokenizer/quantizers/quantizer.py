"""What a tokenizer asks of its quantizer; a record of functions, so that another one needs no edit of this package.

Axes: ... any batch axes, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from mergevq_jax.tokenizer.quantizers import lfq


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Functions of features [..., C]; static arguments of compiled programs.

    Attributes:
      name: goes into the `model_type` of folders, so that a tokenizer is never read with another quantizer.
      bits: of an index, by C; indices are 0 to 2^bits - 1, and the quantizer may leave some of them out.
      quantize: features to codes [..., C], with a gradient.
      to_indices: features to int32 indices [...].
      from_indices: indices and C to codes [..., C], the same as `quantize` gives.
      entropy: features and temperature to the entropy loss; None: it has none.
      commitment: features to the commitment loss; None: it has none.
    """

    name: str
    bits: Callable[[int], int]
    quantize: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    to_indices: Callable[[Float[Array, "..."]], Int[Array, "..."]]
    from_indices: Callable[[Int[Array, "..."], int], Float[Array, "..."]]
    entropy: Callable[..., lfq.EntropyTerms] | None = None
    commitment: Callable[[Float[Array, "..."]], Float[Array, ""]] | None = None


LFQ = Quantizer(
    name="lfq",
    bits=lambda channels: channels,
    quantize=lfq.quantize,
    to_indices=lfq.codes_to_indices,
    from_indices=lfq.indices_to_codes,
    entropy=lfq.entropy_terms,
    commitment=lfq.commitment_loss,
)
