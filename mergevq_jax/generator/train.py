"""Stage 2: one jitted step of a generator on the codes of a frozen tokenizer (paper section 4).

The codes come with the batch, or the step tokenizes the batch's images. What is learned is one entry of `LOSSES`.

Memory: on the backend "xla" attention holds logits of one layer at a time where `compute.remat` is on, of all layers
otherwise: [B, H, N, N], for MergeAR [B, H, N, P + K + window + 1] (see `merged_attention`). "cudnn" never holds them,
and takes the mask [B, 1, N, N] as a bias in bfloat16; "tpu_flash" does not hold them either, but its kernel wants that
bias for every head.

Axes: B batch, A parts of an update, L raster tokens, P prefix tokens, N = P + L, S sub-tokens, V values.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.kinds.positions import count_starts, new_counts
from mergevq_jax.generator.kinds.randar import randar_loss
from mergevq_jax.generator.losses import Means, next_code_loss
from mergevq_jax.generator.mask import first_members, merge_mask
from mergevq_jax.generator.merged_attention import merged_keys
from mergevq_jax.generator.sampling.plan import WINDOW
from mergevq_jax.generator.transformer import Params, init_params
from mergevq_jax.tokenizer import lfq
from mergevq_jax.tokenizer import model as tokenizer_model
from mergevq_jax.tokenizer.config import TokenizerConfig
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, stream_key
from runtime_jax.sharding import Axis, constrain
from runtime_jax.training import network
from runtime_jax.training.accumulate import accumulate
from runtime_jax.training.network import TrainState, updated
from runtime_jax.training.update import Metrics, Optimizer

Kind = Literal["merge", "plain", "random"]
Groups = Literal["source_map", "codes"]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything static that a train step reads."""

    model: GeneratorConfig
    tokenizer: TokenizerConfig | None = None  # of images; None: batches have codes
    kind: Kind = "merge"  # MergeAR, plain autoregression over all raster tokens, or RandAR over the distinct ones
    window: int = WINDOW  # "merge": recent tokens that are always seen
    groups: Groups = "source_map"  # "merge": what makes tokens one group; with "codes" as when sampling
    compute: Compute = Compute()
    tokenizer_compute: Compute = Compute()
    accumulate: int = 1  # parts of one update; all terms are means over examples, so they change nothing
    ema_decay: float = 0.9999
    seed: int = 0

    def __post_init__(self):
        if self.accumulate < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"accumulate={self.accumulate} is at least 1, ema_decay={self.ema_decay} in [0, 1)")
        if not 1 <= self.window <= self.model.length:
            raise ValueError(f"window={self.window}: 1 to {self.model.length} recent tokens are allowed")
        if (self.kind == "random") != self.model.position_instruction:
            raise ValueError(f"kind={self.kind!r} with model.position_instruction={self.model.position_instruction}")


@flax.struct.dataclass
class CountingState(TrainState):
    """Of kind "random", which also counts where groups start."""

    group_starts: Any  # int32 [M, C, L], see `positions`


def init_state(config: StepConfig, optimizer: Optimizer) -> TrainState:
    """A new state from the config's seed."""
    state = network.init_state(init_params(config.model, stream_key(config.seed, Stream.PARAMS)), optimizer)
    return CountingState(**vars(state), group_starts=new_counts(config.model)) if config.kind == "random" else state


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
      tokenizer: frozen parameters, which images need.
      batch: of `data.make_batches`.
      config, optimizer, keep: static; all examples keep `keep` tokens.

    Returns:
      The new state and metrics as (sum, count). Where the loss or a gradient is not finite, everything but the step's
      number is kept as it was and "nonfinite" counts one.
    """
    key = stream_key(config.seed, Stream.DROPOUT, state.step)

    def part(starts, micro_batch):
        codes = tokenize(tokenizer, micro_batch, config=config, keep=keep)
        loss = functools.partial(LOSSES[config.kind], config=config, keep=keep)
        (_, means), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, codes, key)
        if starts is not None:
            starts = count_starts(starts, codes["label"], codes["source_map"], config=config.model, keep=keep)
        return gradients, starts, means

    counting = isinstance(state, CountingState)
    starts = state.group_starts if counting else None
    gradients, starts, means = accumulate(part, starts, batch, config.accumulate)
    fields = {"group_starts": starts} if counting else {}
    return updated(state, gradients, means, optimizer=optimizer, ema_decay=config.ema_decay, **fields)


def evaluate(
    params: Params, tokenizer: Params | None, batch: Mapping[str, Array], *, config: StepConfig, keep: int
) -> Means:
    """Means over a batch, with every example's own class; arguments as in `train_step`."""
    return LOSSES[config.kind](
        params, tokenize(tokenizer, batch, config=config, keep=keep), None, config=config, keep=keep
    )[1]


def tokenize(
    tokenizer: Params | None, batch: Mapping[str, Array], *, config: StepConfig, keep: int
) -> Mapping[str, Array]:
    """The batch with "indices" [B, L], the code at every raster token, and "source_map" [B, L] in place of images."""
    if "image" not in batch:
        return batch
    images = constrain(tokenizer_model.to_float(batch["image"]), Axis.BATCH, None, None, None)
    encoded = tokenizer_model.encode(tokenizer, config.tokenizer, images, keep=keep, compute=config.tokenizer_compute)
    indices = jnp.take_along_axis(lfq.codes_to_indices(encoded.z), encoded.source_map, axis=1)
    others = {name: value for name, value in batch.items() if name != "image"}
    return others | {"indices": indices, "source_map": encoded.source_map}


def merge_loss(
    params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: StepConfig, keep: int
) -> tuple[Array, Means]:
    """MergeAR: a position sees recent tokens, and of the older ones the first of each group (paper section 4.2).

    Args:
      params: of `Generator`.
      batch: of `tokenize`.
      key: of the class dropout; None: no dropout.
      config, keep: static.
    """
    groups = batch["source_map"] if config.groups == "source_map" else batch["indices"]
    first, model, near = first_members(groups), config.model, {"window": config.window, "prefix": config.model.prefix}
    if config.compute.attention == "xla" and keep + config.window < model.length:
        seen = merged_keys(first, keep, **near)
    else:
        seen = merge_mask(first, **near)
    return next_code_loss(params, batch, key, config=model, compute=config.compute, keep=keep, seen=seen)


def plain_loss(
    params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: StepConfig, keep: int
) -> tuple[Array, Means]:
    """Plain autoregression: a position sees all before it; arguments as in `merge_loss`."""
    return next_code_loss(params, batch, key, config=config.model, compute=config.compute, keep=keep, seen=None)


def random_loss(
    params: Params, batch: Mapping[str, Array], key: Key[Array, ""] | None, *, config: StepConfig, keep: int
) -> tuple[Array, Means]:
    """RandAR: the distinct codes in random order, each after its position; arguments as in `merge_loss`."""
    return randar_loss(params, batch, key, config=config.model, compute=config.compute, keep=keep)


# (params, batch of `tokenize`, key of the class dropout or None, config, keep) -> the loss and what is logged of it.
LOSSES: Mapping[Kind, Callable[..., tuple[Array, Means]]] = {
    "merge": merge_loss,
    "plain": plain_loss,
    "random": random_loss,
}
