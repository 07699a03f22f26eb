"""Samples RandAR: several codes at a time, in one compiled loop with a KV cache of static shape.

A step computes the known tokens that are not yet in the KV cache (the prefix, later the position instructions and codes
of the previous step, in the order of training), and the position instructions of the next codes. Each of these
instructions sees all known tokens and itself, but no other: it predicts its code as if it came next and alone. The KV
cache keeps the known tokens; the next step overwrites the slots of the instructions.

Axes: B examples, R rows of the network (two for each example under guidance), K codes, T steps, n codes that are drawn
at most in one step, S sub-tokens, C slots, P prefix tokens, D width.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mergevq_jax.generator.config import GeneratorConfig
from mergevq_jax.generator.kinds.positions import draw_positions, shares
from mergevq_jax.generator.kinds.randar import Codes, alternating, check_randar, prefix_rope, rope_rows
from mergevq_jax.generator.sampling import decode
from mergevq_jax.generator.sampling.head import HeadSampler, check_drawn, draw_keys
from mergevq_jax.generator.sampling.plan import DrawPlan, Knobs, SamplingConfig, checked_request, draw_plan
from mergevq_jax.generator.sampling.position_cache import KVCache
from mergevq_jax.generator.transformer import Generator, Params
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key

STEPS = 64  # the paper's for variant G+R


def cosine_counts(codes: int, steps: int) -> tuple[int, ...]:
    """Codes to draw in each step: at least one, and never fewer than in the previous step.

    After a share t of the steps, about 1 - cos(pi t / 2) of the codes are drawn.

    Raises:
      ValueError: fewer than one step, or more steps than codes.
    """
    if not 1 <= steps <= codes:
        raise ValueError(f"{steps} steps: allowed are 1 to {codes}, the number of codes")
    step = np.arange(steps + 1)
    drawn = np.floor(codes * (1 - np.cos(np.pi / 2 * step / steps)) + 0.5).astype(int)
    drawn[-1] = codes
    return tuple(sorted(np.diff(np.maximum(drawn, step)).tolist()))  # rounding can put a 2 in front of a 1


class Step(NamedTuple):
    """The state of one step, as numbers of tokens."""

    start: Int[Array | np.ndarray, "*T"]  # codes drawn before
    stored: Int[Array | np.ndarray, "*T"]  # known tokens that are in the KV cache
    pending: Int[Array | np.ndarray, "*T"]  # known tokens that are not


@dataclass(frozen=True, kw_only=True)
class RandarPlan(DrawPlan):
    """The static part of the sampler in random order."""

    counts: tuple[int, ...]  # codes of each step

    @property
    def width(self) -> int:
        """n."""
        return max(self.counts)

    @property
    def steps(self) -> Step:
        """All steps, [T]."""
        start = np.cumsum((0, *self.counts[:-1]))
        known = self.config.prefix + 2 * start
        stored = np.concatenate([[0], known[:-1]])
        return Step(start, stored, known - stored)

    @property
    def slots(self) -> int:
        """C; a step writes 2 n known tokens, some of them padding, and n instructions."""
        return int(self.steps.stored[-1]) + 3 * self.width


def make_randar_plan(
    config: GeneratorConfig, sampling: SamplingConfig, keep: int | None, steps: int | None, compute: Compute
) -> tuple[RandarPlan, Knobs]:
    """The static and the dynamic part of the sampler in random order; steps None: 64, or one for each code.

    Raises:
      ValueError: lists all settings that this generator cannot sample with.
    """
    check_randar(config)
    config.merge_index(keep)
    codes = keep or config.length
    problems = [
        f"{name}={getattr(sampling, name)}: for raster order; in random order every code is kept"
        for name in ("window", "capacity", "policy")
        if getattr(sampling, name) != getattr(SamplingConfig(), name)
    ]
    draws, knobs = draw_plan(config, sampling, compute, codes, problems)
    return RandarPlan(**draws, counts=cosine_counts(codes, min(STEPS, codes) if steps is None else steps)), knobs


def randar_sample(
    params: Params,
    labels: Int[Array, "B"] | Int[np.ndarray, "B"],
    keep: int | None,
    *,
    config: GeneratorConfig,
    sampling: SamplingConfig,
    seed: int,
    steps: int | None = None,
    examples: Int[Array, "B"] | Int[np.ndarray, "B"] | None = None,
    start_counts: Int[Array, "M C L"] | Int[np.ndarray, "M C L"] | None = None,
    positions: Int[Array, "B K"] | Int[np.ndarray, "B K"] | None = None,
    compute: Compute = Compute(),
) -> Codes:
    """K codes of one image for each label, and their positions; K is `keep`, or L without merge instruction.

    Args:
      params, labels, config, seed, examples, compute: as in `sampling.sample`.
      keep: codes of an image, one of `keeps`; None without merge instruction.
      sampling: how to draw; guidance schedules run over the codes, and all codes of a step share a scale.
      steps: calls of the network, 1 to K; None: 64, or K.
      start_counts: where groups started in training, counted as in `positions`; positions are drawn by these counts.
      positions: raster positions of the codes in the order of drawing, such as those of a real image's groups; instead
        of `start_counts`.

    Raises:
      ValueError: this generator cannot sample so.
      NotFiniteError: logits that are not finite; names the first code that has them.
    """
    labels, examples, merge = checked_request(labels, examples, keep, config)
    plan, knobs = make_randar_plan(config, sampling, keep, steps, compute)
    codes = sum(plan.counts)
    if positions is not None:
        positions = np.asarray(positions, np.int32)
        _check_positions(positions, (len(labels), codes), config.length)
    elif start_counts is not None:
        probabilities = shares(start_counts, config)[0 if merge is None else merge, labels]
        positions = draw_positions(probabilities, example_keys(stream_key(seed, Stream.ORDER), examples), codes)
    else:
        raise ValueError("positions of the codes, or start_counts to draw them from, are needed")
    drawn = run(params, labels, merge, positions, stream_key(seed, Stream.SAMPLE), examples, knobs, plan=plan)
    check_drawn(drawn.indices, params)
    return drawn


def _check_positions(positions: np.ndarray, shape: tuple[int, int], length: int) -> None:
    if positions.shape != shape:
        raise ValueError(
            f"positions {list(positions.shape)}: one for each code of each example is needed, {list(shape)}"
        )
    ordered = np.sort(positions, axis=1)
    if ordered.min() < 0 or ordered.max() >= length or not np.diff(ordered, axis=1).all():
        raise ValueError(f"positions: different numbers from 0 to {length - 1} are needed in every example")


@functools.partial(jax.jit, static_argnames="plan")
def run(
    params: Params,
    labels: Int[Array, "B"],
    merge: Int[Array, "B"] | None,
    positions: Int[Array, "B K"],
    key: Key[Array, ""],
    examples: Int[Array, "B"],
    knobs: Knobs,
    *,
    plan: RandarPlan,
) -> Codes:
    """The compiled sampler: one scan over the steps."""
    sampler = RandarSampler(params, plan, knobs)
    draws = draw_keys(example_keys(key, examples), sum(plan.counts), len(plan.config.vocab_sizes))

    def body(carry, now):
        return sampler.step(carry, now, positions, draws)

    _, drawn = lax.scan(body, sampler.start(labels, merge), jax.tree.map(jnp.asarray, plan.steps))
    step, number = np.nonzero(np.arange(plan.width) < np.asarray(plan.counts)[:, None])
    return Codes(drawn[step, :, number].T, positions)


class Carry(NamedTuple):
    """What one step passes to the next."""

    kv_cache: KVCache
    pending: Float[Array, "R known D"]  # known tokens that are not in the KV cache, first
    rope: Float[Array, "2 R known pairs"]  # their rows of the rope table


class RandarSampler(HeadSampler):
    """One step, and what all steps share."""

    plan: RandarPlan

    def start(self, labels: Int[Array, "B"], merge: Int[Array, "B"] | None) -> Carry:
        """Before the first step: an empty KV cache, and the known prefix."""
        plan, config = self.plan, self.config
        prefix = self.prefix(labels, merge)
        rows = len(prefix)
        missing = (0, 2 * plan.width - config.prefix)
        return Carry(
            kv_cache=decode.new_kv_cache(config, plan.compute, layers=config.num_layers, rows=rows, slots=plan.slots),
            pending=jnp.pad(prefix, ((0, 0), missing, (0, 0))),
            rope=jnp.pad(prefix_rope(config, rows), ((0, 0), (0, 0), missing, (0, 0))),
        )

    def step(
        self, carry: Carry, now: Step, positions: Int[Array, "B K"], keys: Key[Array, "K S B"]
    ) -> tuple[Carry, Int[Array, "B n"]]:
        """Draws the next n codes; those beyond the step's count are padding."""
        width, scales = self.plan.width, self.knobs.scales[now.start]
        positions = lax.dynamic_slice_in_dim(positions, now.start, width, axis=1)
        keys = lax.dynamic_slice_in_dim(keys, now.start, width, axis=0)
        hidden, asked, rope, kv_cache = self.ask(carry, now, positions)
        indices, embedded = self.next_indices(hidden, scales, jnp.moveaxis(keys, 0, -1))
        return Carry(kv_cache, alternating(asked, embedded), jnp.repeat(rope, 2, axis=2)), indices

    def ask(
        self, carry: Carry, now: Step, positions: Int[Array, "B n"]
    ) -> tuple[Float[Array, "R n D"], Float[Array, "R n D"], Float[Array, "2 R n pairs"], KVCache]:
        """Writes pending tokens to the KV cache, and asks for codes at `positions`.

        Returns:
          the trunk's outputs that predict the codes, the instructions and their rows of the rope table, the KV cache.
        """
        rope = rope_rows(self.rows(positions), self.config)
        asked = self.apply(rope, method=Generator.embed_positions)
        x = jnp.concatenate([carry.pending, asked], axis=1)
        slots, visible = self.layout(now)
        hidden, kv_cache = self.step_blocks(
            self.blocks,
            carry.kv_cache,
            x,
            jnp.concatenate([carry.rope, rope], axis=2),
            jnp.broadcast_to(slots, (len(x), len(slots))),
            visible[None],
        )
        return hidden[:, -self.plan.width :], asked, rope, kv_cache

    def layout(self, now: Step) -> tuple[Int[Array, "tokens"], Bool[Array, "tokens C"]]:
        """Slots of a step's tokens, and the slots that each of them sees.

        A known token sees those before it, an instruction sees all known tokens; each sees itself.
        """
        number, known = jnp.arange(3 * self.plan.width), 2 * self.plan.width
        slots = now.stored + number
        seen = now.stored + jnp.where(number < known, number, now.pending)
        slot = jnp.arange(self.plan.slots)
        return slots, (slot[None] < seen[:, None]) | (slot[None] == slots[:, None])
