"""Stage 2: one jitted step of a generator on the codes of a frozen tokenizer (paper section 4).

The codes come with the batch, or the step tokenizes the batch's images. Each kind of generator has its own loss.

Memory: on the backend "xla" attention holds logits of one layer at a time where `compute.remat` is on, of all layers
otherwise: [B, H, N, N], for MergeAR [B, H, N, P + K + window + 1] (see `merged_attention`). "cudnn" never holds them,
and takes the mask [B, 1, N, N] as a bias in bfloat16; "tpu_flash" does not hold them either, but its kernel wants that
bias for every head.

Axes: B batch, A parts of an update, L raster tokens, P prefix tokens, N = P + L, S sub-tokens, V values.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.kinds.kind import Counts
from mergevq_jax.generator.kinds.random import GROUP_STARTS
from mergevq_jax.generator.kinds.table import KINDS, KindName
from mergevq_jax.generator.losses import Means
from mergevq_jax.generator.sampling.plan import WINDOW
from mergevq_jax.generator.transformer import Params, init_params
from mergevq_jax.tokenizer import model as tokenizer_model
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.quantizers.quantizer import QUANTIZERS
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, stream_key
from runtime_jax.sharding import Axis, constrain
from runtime_jax.training import network
from runtime_jax.training.accumulate import accumulate
from runtime_jax.training.network import TrainState, updated
from runtime_jax.training.update import Metrics, Optimizer

Groups = Literal["source_map", "codes"]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything static that a train step reads."""

    model: GeneratorConfig
    tokenizer: TokenizerConfig | None = None  # of images; None: batches have codes
    kind: KindName = "merge"  # MergeAR, plain autoregression over all raster tokens, or RandAR over the distinct ones
    window: int = WINDOW  # "merge": recent tokens that are always seen
    groups: Groups = "source_map"  # "merge": which tokens form a group; "codes": those with equal codes, as in sampling
    compute: Compute = Compute()
    tokenizer_compute: Compute = Compute()
    accumulate: int = 1  # parts of one update; all terms are means over examples, so the result is the same
    ema_decay: float = 0.9999
    seed: int = 0

    def __post_init__(self):
        if self.accumulate < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"accumulate={self.accumulate} is at least 1, ema_decay={self.ema_decay} in [0, 1)")
        if not 1 <= self.window <= self.model.length:
            raise ValueError(f"window={self.window}: 1 to {self.model.length} recent tokens are allowed")
        if KINDS[self.kind].positions != self.model.position_instruction:
            raise ValueError(f"kind={self.kind!r} with model.position_instruction={self.model.position_instruction}")


@flax.struct.dataclass
class CountingState(TrainState):
    """The state of RandAR, which also counts where groups start."""

    group_starts: Any  # int32 [M, C, L], see `positions`

    @property
    def counts(self) -> Counts:
        """As `Kind.count` takes them."""
        return {GROUP_STARTS: self.group_starts}


def counts_of(state: TrainState) -> Counts:
    """What a state counts, beside its parameters."""
    return state.counts if isinstance(state, CountingState) else {}


def init_state(config: StepConfig, optimizer: Optimizer) -> TrainState:
    """A new state from the config's seed."""
    state = network.init_state(init_params(config.model, stream_key(config.seed, Stream.PARAMS)), optimizer)
    counts = KINDS[config.kind].new_counts(config.model)
    return CountingState(**vars(state), **counts) if counts else state


def train_step(
    state: TrainState,
    tokenizer: Params | None,
    batch: Mapping[str, Array],
    *,
    config: StepConfig,
    optimizer: Optimizer,
    keep: int,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      state: donated by the caller's jit.
      tokenizer: frozen parameters; None for codes.
      batch: of `data.make_batches`.
      config, optimizer, keep: static; all examples keep `keep` tokens.

    Returns:
      The new state and metrics as (sum, count). Where the loss or a gradient is not finite, everything but the step's
      number is kept as it was and "nonfinite" counts one.
    """
    key, kind = stream_key(config.seed, Stream.DROPOUT, state.step), KINDS[config.kind]

    def part(counts, micro_batch):
        codes = tokenize(tokenizer, micro_batch, config=config, keep=keep)
        loss = functools.partial(kind.loss, config=config, keep=keep)
        (_, means), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, codes, key)
        return gradients, kind.count(counts, codes, model=config.model, keep=keep), means

    gradients, counts, means = accumulate(part, counts_of(state), batch, config.accumulate)
    return updated(state, gradients, means, optimizer=optimizer, ema_decay=config.ema_decay, **counts)


def evaluate(
    params: Params, tokenizer: Params | None, batch: Mapping[str, Array], *, config: StepConfig, keep: int
) -> Means:
    """Means over a batch, without class dropout; arguments as in `train_step`."""
    codes = tokenize(tokenizer, batch, config=config, keep=keep)
    return KINDS[config.kind].loss(params, codes, None, config=config, keep=keep)[1]


def tokenize(
    tokenizer: Params | None, batch: Mapping[str, Array], *, config: StepConfig, keep: int
) -> Mapping[str, Array]:
    """The batch with "indices" [B, L], the code at every raster token, and "source_map" [B, L] in place of images."""
    if "image" not in batch:
        return batch
    images = constrain(tokenizer_model.to_float(batch["image"]), Axis.BATCH, None, None, None)
    encoded = tokenizer_model.encode(tokenizer, config.tokenizer, images, keep=keep, compute=config.tokenizer_compute)
    indices = QUANTIZERS[config.tokenizer.quantizer].to_indices(encoded.z)
    indices = jnp.take_along_axis(indices, encoded.source_map, axis=1)
    others = {name: value for name, value in batch.items() if name != "image"}
    return others | {"indices": indices, "source_map": encoded.source_map}
