"""Optimizers and schedules from config; they count updates, never micro-batches."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from runtime_jax.config import Duration
from runtime_jax.messages import cut

_KERNEL = re.compile(r"(^|/)kernel$")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam(W) with clipping and a schedule; with `muon_learning_rate`, Muon for kernels and NAdam for the rest."""

    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None  # follows the same schedule
    adam_kernels: tuple[str, ...] = ()  # patterns in the paths of kernels left to Adam (first and last layers)
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    warmup: Duration = Duration(steps=0)  # linear, from 0
    drops: tuple[Duration, ...] = ()  # "steps": times of the drops, from the start of the run
    drop_factor: float = 0.1
    final_fraction: float = 0.0  # "cosine": of the learning rate, at the end of the run
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; kernels only (with Muon, its own): no norm, bias, LayerScale or embedding
    clip_norm: float | None = None  # of the global gradient
    only: tuple[str, ...] = ()  # patterns in the paths of the parameters that are trained; empty: all

    def __post_init__(self):
        if (self.schedule == "steps") != bool(self.drops):
            what = f"schedule={self.schedule!r} with drops={self.drops}"
            raise ValueError(f"optimizer: {what}: drops belong to 'steps' only")
        if self.learning_rate <= 0 or self.weight_decay < 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError("optimizer: learning_rate and clip_norm are positive, weight_decay is not negative")
        if self.muon_learning_rate is None and self.adam_kernels:
            raise ValueError(f"optimizer.adam_kernels={self.adam_kernels}: without muon_learning_rate Adam takes all")
        if self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            raise ValueError(f"optimizer.muon_learning_rate={self.muon_learning_rate}: a positive number is needed")


def make_schedule(
    config: OptimizerConfig, *, total_steps: int, batch_size: int, num_examples: int | None
) -> optax.Schedule:
    """Learning rate of update number n, n = 0, 1, ...

    Raises:
      ValueError: the warm-up is longer than the run, or a duration is in epochs of unknown length.
    """
    warmup = config.warmup.to_steps(batch_size, num_examples)
    if warmup >= total_steps:
        raise ValueError(f"optimizer.warmup: {warmup} steps, but the run has {total_steps}")
    rate = config.learning_rate
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, total_steps - warmup, config.final_fraction)
    else:
        drops = [drop.to_steps(batch_size, num_examples) - warmup for drop in config.drops]
        if min(drops, default=1) < 1:
            raise ValueError("optimizer.drops: a drop lies before the end of the warm-up")
        if len(set(drops)) < len(drops):
            raise ValueError(f"optimizer.drops: two at one step, {sorted(drop + warmup for drop in drops)}")
        after = optax.piecewise_constant_schedule(rate, dict.fromkeys(drops, config.drop_factor))
    if not warmup:
        return after
    return optax.join_schedules([lambda step: rate * (step + 1) / warmup, after], [warmup])


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip; Adam, or Muon and NAdam; decoupled weight decay on kernels; minus the learning rate.

    With `only`, other parameters have no moments and don't change. A pattern that matches none is a ValueError, when
    the optimizer's state is made.
    """
    if not config.only:
        return _for_all(config, schedule)
    parts = {True: _for_all(config, schedule), False: optax.set_to_zero()}
    return optax.partition(parts, lambda params: _trained(params, config.only))


def constant_unless(params: Any, only: tuple[str, ...]) -> Any:
    """The parameters, of which those without a match in `only` have no gradient; empty: all have one."""
    if not only:
        return params
    return jax.tree.map(lambda x, keep: x if keep else jax.lax.stop_gradient(x), params, _trained(params, only))


def _trained(params: Any, only: tuple[str, ...]) -> Any:
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in only:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"optimizer.only: {pattern!r} matches no parameter; there are {cut(names)}")
    matches = re.compile("|".join(f"(?:{pattern})" for pattern in only)).search
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(matches(_name(path))), params)


def _for_all(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.muon_learning_rate is not None:
        ratio = config.muon_learning_rate / config.learning_rate
        return optax.chain(
            clip,
            muon(
                lambda step: ratio * schedule(step),
                eps=config.eps,
                weight_decay=config.weight_decay,
                adam_b1=config.b1,
                adam_b2=config.b2,
                adam_learning_rate=schedule,
                muon_weight_dimension_numbers=lambda params: _matrices(params, config.adam_kernels),
            ),
        )
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_is_kernel) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def _matrices(params: Any, adam_kernels: tuple[str, ...]) -> Any:
    """Input and output axes of each of Muon's kernels; None for Adam's leaves.

    The last axis is the output, all others the input, except the first of a scanned dense or convolution kernel (rank 3
    or 5). A depthwise kernel is no matrix.
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name, rank = _name(path), len(leaf.shape)
        if not _KERNEL.search(name) or rank < 2 or (rank > 3 and leaf.shape[-2] == 1):
            return None
        if any(re.search(pattern, name) for pattern in adam_kernels):
            return None
        return MuonDimensionNumbers(tuple(range(rank % 2, rank - 1)), rank - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_kernel(params: Any) -> Any:
    """Mask of the leaves named kernel; the rank does not decide, as a scanned norm has two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(_KERNEL.search(_name(path))), params)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def ema_update(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Moving average in float32; after n updates its decay is (1 + n) / (10 + n), at most `decay`."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)
    return jax.tree.map(lambda average, new: average + (1.0 - decay) * (new.astype(jnp.float32) - average), ema, params)
