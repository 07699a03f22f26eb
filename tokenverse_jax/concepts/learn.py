"""One step of learning a concept: Concept-Mod is trained on a frozen FLUX model (TokenVerse, section 3).

In the first stage, mostly at high noise, where an image is laid out, Concept-Mod learns a direction for each token of
the captions. In the second, mostly at low noise, a head for each block adds to it. The head's last layer starts at
zero, so the second stage starts from the first one's function. It has an optimizer of its own: moments and warm-up
begin anew.

Axes: B batch, h w grid of image tokens, N = h w, C channels of an image token, T text tokens, R first text tokens,
which hold all captions, J and P widths of the text encoders, D width of the modulation vector.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from runtime_jax.config import Duration
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.update import Metrics, Optimizer, guarded
from tokenverse_jax.concepts.concept_mod import ConceptModConfig, Params, directions, init_params
from tokenverse_jax.concepts.isolation import IsolationConfig, halves, isolation_loss, side_by_side
from tokenverse_jax.flux.autoencoder import image_ids
from tokenverse_jax.flux.model import Flux, FluxConfig
from tokenverse_jax.flux.offsets import NO_OFFSETS, OffsetBlocks, Offsets
from tokenverse_jax.flux.schedule import flow

# What a direction is added to: the modulation of its own token (M+, the method); the modulation of all tokens, image
# and text (M); its token of T5's output (like textual inversion). The method is compared with the last two.
Space = Literal["modulation", "modulation_all", "text"]
# The tokens that have a direction while learning: all of the caption, as in the paper, or only those of the words, so
# that no part of a concept goes to a token that is not stored.
Tokens = Literal["caption", "words"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Length of a stage, and the share of its examples at high noise, with a time above the boundary."""

    steps: int
    high_share: float

    def __post_init__(self):
        if self.steps < 0 or not 0 <= self.high_share <= 1:
            raise ValueError(f"steps={self.steps} must not be negative, high_share={self.high_share} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """How concepts are learned. Steps, times and flips are the paper's, which does not give the rest."""

    space: Space = "modulation"
    tokens: Tokens = "caption"  # that have a direction
    blocks: OffsetBlocks = "both"  # that take the directions
    per_block: bool = True  # whether the second stage has a head for each block
    concept_mod: ConceptModConfig = ConceptModConfig()
    stage_1: StageConfig = StageConfig(steps=800, high_share=0.92)
    stage_2: StageConfig = StageConfig(steps=600, high_share=0.08)
    boundary: float = 0.8  # between low and high times; either part is drawn from uniformly
    batch_size: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup=Duration(steps=20))  # of either stage
    guidance: float = 1.0  # strength during learning, for models with guidance_embeds
    flip: bool = True  # mirror images at random; not for captions that tell left from right
    isolation: IsolationConfig | None = None  # None: without the loss

    def __post_init__(self):
        if self.batch_size < 1 or self.stage_1.steps < 1 or not 0 < self.boundary < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and stage_1.steps={self.stage_1.steps} must be at least 1, "
                f"boundary={self.boundary} must be in (0, 1)"
            )
        if self.per_block and self.space != "modulation":
            raise ValueError(f"per_block with space={self.space!r}: only modulations differ from block to block")
        warmup = self.optimizer.warmup.to_steps(self.batch_size)
        for name in ("stage_1", "stage_2"):
            if 0 < (steps := getattr(self, name).steps) <= warmup:
                raise ValueError(f"optimizer.warmup of {warmup} steps must be shorter than {name}.steps={steps}")

    @property
    def total_steps(self) -> int:
        """Of both stages."""
        return self.stage_1.steps + self.stage_2.steps

    def stage(self, step: int) -> int:
        """1 or 2."""
        return 1 if step < self.stage_1.steps else 2


def make_optimizers(config: LearnConfig) -> tuple[Optimizer, ...]:
    """One for each stage that has steps."""
    return tuple(
        Optimizer.make(config.optimizer, total_steps=stage.steps, batch_size=config.batch_size)
        for stage in (config.stage_1, config.stage_2)
        if stage.steps
    )


@flax.struct.dataclass
class LearnState:
    """What a checkpoint holds, without the FLUX model."""

    step: Any  # untyped, as trees of shapes and of shardings have this structure too
    params: Params
    opt_state: Any


def init_state(config: LearnConfig, flux: FluxConfig, key: Array) -> LearnState:
    """A new state; the second stage's head is there from the start, unused in the first."""
    params = init_params(
        config.concept_mod,
        key,
        text_width=flux.joint_attention_dim,
        width=flux.joint_attention_dim if config.space == "text" else flux.width,
        num_blocks=flux.num_blocks if config.per_block else None,
    )
    opt_state = make_optimizers(config)[0].transformation.init(params)
    return LearnState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def steer(space: Space, txt: Float[Array, "B T J"], offsets: Offsets) -> tuple[Float[Array, "B T J"], Offsets]:
    """T5's outputs and the model's offsets with the directions of the first R tokens.

    In the space "modulation_all" all tokens take the sum of the directions; those of unused tokens are zero.
    """
    if space == "text":
        return txt.astype(jnp.float32).at[:, : offsets.shared.shape[1]].add(offsets.shared), NO_OFFSETS
    if space == "modulation_all":
        return txt, Offsets(everywhere=offsets.shared.sum(axis=1))
    return txt, offsets


def learn_step(
    state: LearnState,
    frozen: Params,
    batch: Mapping[str, Array],
    *,
    config: LearnConfig,
    flux: Flux,
    optimizer: Optimizer,
    stage: int,
    grid: tuple[int, int],
) -> tuple[LearnState, Metrics]:
    """One update of Concept-Mod. A batch holds everything random, see `concept_data.draw`, so there are no keys.

    Args:
      state: donated by the caller's jit.
      frozen: parameters of `flux`, never donated.
      batch: latents and noise [B, N, C], times [B], txt [B, T, J], vec [B, P], mask [B, R] of the tokens that have a
        direction. A step with an isolation loss is another program, and its batch also has pool_latents [B, N, C],
        pair_noise [B, 2 N, C], on_right [B] (the side of the concept's image), pair_txt and pair_vec of the merged
        captions, and pair_rows [B, M], which of the R rows belongs to each of their first M tokens, R for none. A step
        with a pair of the run's own images has other_latents, other_txt and other_mask of the right one instead of
        pool_latents and on_right, and pair_rows are of the rows of both.
      config, flux, optimizer, stage, grid: static.

    Returns:
      The new state and metrics as (sum, count); see `guarded` for a loss or gradient that is not finite.
    """
    first = 0 if stage == 1 else config.stage_1.steps
    fresh = optimizer.transformation.init(state.params)
    opt_state = jax.tree.map(functools.partial(jnp.where, state.step == first), fresh, state.opt_state)
    state = state.replace(opt_state=opt_state)
    (loss, metrics), gradients = jax.value_and_grad(_losses, has_aux=True)(
        state.params, frozen, batch, config, flux, stage, grid
    )
    norm = optax.tree.norm(gradients)
    params, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    new = state.replace(params=params, opt_state=opt_state)
    means = metrics | {"grad_norm": norm, "lr": optimizer.rate(state.step - first)}
    return guarded(state, new, means, watched=loss + norm)


def _losses(
    params: Params,
    frozen: Params,
    batch: Mapping[str, Array],
    config: LearnConfig,
    flux: Flux,
    stage: int,
    grid: tuple[int, int],
) -> tuple[Array, dict[str, Array]]:
    """The flow matching loss plus the weighted isolation losses, and each of them by name."""
    times = batch["times"]
    guidance = jnp.full_like(times, config.guidance) if flux.config.guidance_embeds else None

    def velocity(x: Array, columns: int, txt: Array, vec: Array, offsets: Offsets = NO_OFFSETS) -> Array:
        ids, txt_ids = image_ids((grid[0], columns)), jnp.zeros((txt.shape[1], 3))
        return flux.apply({"params": frozen}, x, ids, txt, txt_ids, times, vec, guidance, offsets=offsets)

    trained = params if stage == 2 else {"concept_mod": params["concept_mod"]}
    rows = batch["mask"].shape[1]
    learned = directions(trained, batch["txt"][:, :rows], batch["mask"]).replace(blocks=config.blocks)
    x, target = flow(batch["latents"], batch["noise"], times)
    txt, offsets = steer(config.space, batch["txt"], learned)
    loss = jnp.mean(jnp.square(velocity(x, grid[1], txt, batch["vec"], offsets) - target))
    if "pair_noise" not in batch:
        return loss, {"loss": loss}

    # A merged caption moves the tokens of the concept's own; its other tokens take no direction.
    move = jax.vmap(functools.partial(jnp.take, axis=-2, mode="fill", fill_value=0))
    together = "other_mask" in batch
    if together:
        others = directions(trained, batch["other_txt"][:, :rows], batch["other_mask"]).replace(blocks=config.blocks)
        learned = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), learned, others)
    txt, vec = batch["pair_txt"], batch["pair_vec"]
    moved = jax.tree.map(lambda part: move(part, batch["pair_rows"]), learned)
    steered_txt, offsets = steer(config.space, txt, moved)
    own, other = batch["latents"], batch["other_latents" if together else "pool_latents"]
    pair = side_by_side(own, other, grid)
    if not together:
        on_right = batch["on_right"]
        pair = jnp.where(on_right[:, None, None], side_by_side(other, own, grid), pair)
    x, target = flow(pair, batch["pair_noise"], times)
    steered = velocity(x, 2 * grid[1], steered_txt, vec, offsets)
    if together:
        metrics = {"loss": loss, "together": jnp.mean(jnp.square(steered - target))}
        return loss + metrics["together"], metrics
    base = velocity(x, 2 * grid[1], txt, vec)
    metrics = {"loss": loss, "isolation": isolation_loss(steered, base, grid, on_right)}
    loss += config.isolation.weight * metrics["isolation"]
    if config.isolation.own_weight:
        metrics["own_half"] = jnp.mean(jnp.square(halves(steered - target, grid, on_right)[0]))
        loss += config.isolation.own_weight * metrics["own_half"]
    return loss, metrics
