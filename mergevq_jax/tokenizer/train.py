"""Stage 1: one jitted step updates generator and discriminator from one forward pass (paper section 3.4).

The two losses share a backward pass. The generator's term sees the discriminator's parameters as constants, and the
discriminator's term sees the reconstruction as one, so the gradient of their sum consists of the two gradients.

Axes: B batch, A parts of an update, H W image, L raw tokens, K kept tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mergevq_jax.tokenizer import model, recovery, tome
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.losses import adversarial, alignment
from mergevq_jax.tokenizer.losses.adversarial import LeCam, PatchDiscriminator
from mergevq_jax.tokenizer.losses.perceptual import LPIPS
from mergevq_jax.tokenizer.quantizers.quantizer import QUANTIZERS
from runtime_jax.networks import dinov2
from runtime_jax.networks.dinov2 import DINOv2Config
from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.sharding import IF_LARGE, Axis, Rule, constrain
from runtime_jax.training.accumulate import accumulate
from runtime_jax.training.optimizer import constant_unless, ema_update
from runtime_jax.training.update import Metrics, Optimizer, guarded

Params = Any
VIEWS = STUDENT, TEACHER = "student", "teacher"  # views in a batch that the alignment loss reads

DISCRIMINATOR_LOSSES = {
    "hinge": adversarial.hinge_d_loss,
    "vanilla": adversarial.vanilla_d_loss,
    "non_saturating": adversarial.non_saturating_d_loss,
}
GENERATOR_LOSSES = {"hinge": adversarial.hinge_g_loss, "non_saturating": adversarial.non_saturating_g_loss}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of stage 1 with the released code's defaults. A term of weight 0 is not computed."""

    pixel: Literal["l1", "l2"] = "l1"
    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.1
    generator: Literal["hinge", "non_saturating"] = "non_saturating"
    discriminator: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    discriminator_start: int = 0  # updates before the adversarial terms start
    lecam_weight: float = 0.01
    lecam_decay: float = 0.999
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    commitment_weight: float = 0.25
    source_weight: float = 0.5
    alignment_weight: float = 0.0
    alignment: Literal["kl", "cosine", "label"] = "kl"
    alignment_size: int = 224  # side of the aligned view, pixels


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator."""

    ndf: int = 64
    num_layers: int = 3


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything static that a train step reads."""

    model: TokenizerConfig
    compute: Compute = Compute()
    losses: LossConfig = LossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    accumulate: int = 1  # parts of one update; see `taken_by_part`
    only: tuple[str, ...] = ()  # patterns of the generator's parameters that are trained; empty: all
    ema_decay: float = 0.999
    teacher: DINOv2Config | None = None  # of the alignment losses but "label"
    seed: int = 0

    def __post_init__(self):
        losses, config = self.losses, self.model
        if self.accumulate < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1, ema_decay={self.ema_decay} in [0, 1)")
        for term in ("entropy", "commitment"):
            if getattr(losses, f"{term}_weight") and getattr(QUANTIZERS[config.quantizer], term) is None:
                raise ValueError(f"losses.{term}_weight is not 0, but quantizer {config.quantizer!r} has no such loss")
        if losses.alignment_weight:
            if config.dist_head is None:
                raise ValueError("losses.alignment_weight is not 0, but model.dist_head is None: nothing to align")
            if losses.alignment != "label" and self.teacher is None:
                raise ValueError(f"losses.alignment={losses.alignment!r} needs a teacher: give its folder or hub id")
            if losses.alignment != "label" and config.num_classes != self.teacher.width:
                raise ValueError(
                    f"model.num_classes={config.num_classes} must be the teacher's width, {self.teacher.width}"
                )
            if losses.alignment != "label" and losses.alignment_size % self.teacher.patch_size:
                raise ValueError(
                    f"losses.alignment_size={losses.alignment_size} must be a multiple of the teacher's patches of "
                    f"{self.teacher.patch_size} pixels"
                )
            if losses.alignment_size % config.downsampling:
                raise ValueError(
                    f"losses.alignment_size={losses.alignment_size} must be a multiple of the tokenizer's "
                    f"downsampling {config.downsampling}"
                )
        decoded = (losses.pixel_weight, losses.perceptual_weight, losses.adversarial_weight)
        if not any((*decoded, losses.source_weight, losses.alignment_weight)):
            raise ValueError("losses: pixel, perceptual, adversarial, source and alignment weights are all 0")
        if losses.source_weight and config.recovery is None:
            raise ValueError("losses.source_weight is not 0, but model.recovery is None: nothing to learn")

    def taken_by_part(self) -> tuple[str, ...]:
        """Terms that are not means over examples: with `accumulate`, each part has its own."""
        losses = self.losses
        terms = ["entropy of the mean code"] if losses.entropy_weight else []
        if losses.adversarial_weight:
            terms.append("batch statistics of the discriminator")
            terms += ["update of LeCam's running averages"] if losses.lecam_weight else []
        return tuple(terms)

    def patch_discriminator(self) -> PatchDiscriminator:
        """The discriminator module."""
        return PatchDiscriminator(self.discriminator.ndf, self.discriminator.num_layers, self.compute.jax_dtype)


class Optimizers(NamedTuple):
    """Of the two sides."""

    generator: Optimizer
    discriminator: Optimizer


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds; all of it is donated to the step."""

    step: Any  # untyped: trees of shapes and of shardings have the same structure
    params: Params
    opt_state: Any
    ema: Params
    disc_params: Params
    disc_stats: Any
    disc_opt_state: Any
    lecam: Any


@flax.struct.dataclass
class Frozen:
    """Parameters that a step reads and never changes; None if the losses do not need them."""

    lpips: Params | None = None
    teacher: Params | None = None


SHARDING_RULES: tuple[Rule, ...] = (
    (r"decoder/attn/blocks/attn/qkv/kernel", (None, Axis.EMBED, Axis.HEADS)),
    (r"decoder/attn/blocks/attn/proj/kernel", (None, Axis.HEADS, Axis.EMBED)),
    (r"decoder/attn/blocks/mlp/fc1/kernel", (None, Axis.EMBED, Axis.MLP)),
    (r"decoder/attn/blocks/mlp/fc2/kernel", (None, Axis.MLP, Axis.EMBED)),
    (r"decoder/attn/blocks/mlp/dwconv/kernel", (None, None, None, None, Axis.MLP)),
    (r"(attn/qkv|blocks_\d+/(q|kv))/kernel", (Axis.EMBED, Axis.HEADS)),
    (r"(attn|blocks_\d+)/proj/kernel", (Axis.HEADS, Axis.EMBED)),
    (r"(mlp|head)/fc1/kernel", (Axis.EMBED, Axis.MLP)),
    (r"(mlp|head)/fc2/kernel", (Axis.MLP, Axis.EMBED)),
    (r"head/out/kernel", (Axis.EMBED, None)),
    (r".*", IF_LARGE),  # convolutions, the discriminator's too; norms, biases and statistics are small
)


def init_state(config: StepConfig, optimizers: Optimizers) -> TrainState:
    """A new state from the config's seed."""
    params_key, disc_key = jax.random.split(stream_key(config.seed, Stream.PARAMS))
    params = model.init_params(config.model, params_key)
    side = config.model.resolution
    disc = config.patch_discriminator().init(
        disc_key, jnp.zeros((1, side, side, config.model.in_channels)), train=False
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizers.generator.transformation.init(params),
        ema=jax.tree.map(jnp.copy, params),
        disc_params=disc["params"],
        disc_stats=disc["batch_stats"],
        disc_opt_state=optimizers.discriminator.transformation.init(disc["params"]),
        lecam=LeCam.zeros(),
    )


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: dict[str, Array],
    *,
    config: StepConfig,
    optimizers: Optimizers,
    keep: int,
) -> tuple[TrainState, Metrics]:
    """One update of generator and discriminator.

    Args:
      state: donated by the caller's jit.
      frozen: perceptual network and alignment teacher.
      batch: "image" uint8 [B, H, W, 3]; "label" int32 [B] and "example" int [B] if the alignment loss needs them;
        it reads the views "student" and "teacher" uint8 [B, S, S, 3] if they are there.
      config, optimizers, keep: static.

    Returns:
      The new state and metrics as (sum, count). If a loss or gradient is not finite, only the step's number changes and
      "nonfinite" is 1.
    """

    def part(carry, micro_batch):
        (_, aux), gradients = jax.value_and_grad(_losses, has_aux=True)(
            (state.params, state.disc_params), *carry, frozen, micro_batch, state.step, config, keep
        )
        metrics, *carry = aux
        return gradients, tuple(carry), metrics

    gradients, (stats, lecam), metrics = accumulate(part, (state.disc_stats, state.lecam), batch, config.accumulate)
    norms = {"grad_norm": optax.tree.norm(gradients[0]), "disc/grad_norm": optax.tree.norm(gradients[1])}

    params, opt_state = optimizers.generator.update(gradients[0], state.opt_state, state.params)
    disc_params, disc_opt_state = optimizers.discriminator.update(gradients[1], state.disc_opt_state, state.disc_params)
    new_state = state.replace(
        params=params,
        opt_state=opt_state,
        ema=ema_update(state.ema, params, state.step, config.ema_decay),
        disc_params=disc_params,
        disc_stats=stats,
        disc_opt_state=disc_opt_state,
        lecam=lecam,
    )
    watched = metrics["loss"] + metrics["disc/loss"] + norms["grad_norm"] + norms["disc/grad_norm"]
    means = metrics | norms | {"lr": optimizers.generator.rate(state.step)}
    return guarded(state, new_state, means, watched=watched)


def _losses(trained, disc_stats, lecam, frozen, batch, step, config: StepConfig, keep: int):
    """Sum of both sides' losses of one micro-batch; aux: metrics, batch statistics, LeCam averages."""
    params, disc_params = trained
    params = constant_unless(params, config.only)
    losses = config.losses
    images = constrain(model.to_float(batch["image"]), Axis.BATCH, None, None, None)
    encoded = model.encode(params, config.model, images, keep=keep, compute=config.compute)
    quantizer = QUANTIZERS[config.model.quantizer]
    codes = quantizer.quantize(encoded.z)
    metrics, terms = {}, {}
    if losses.pixel_weight or losses.perceptual_weight or losses.adversarial_weight:
        grid = config.model.grid(*images.shape[1:3])
        rebuilt = model.decode(params, config.model, codes, encoded.source_map, grid, compute=config.compute)
        metrics["mse"] = jnp.mean(jnp.square(jnp.clip(rebuilt, -1, 1) - images))
    if losses.pixel_weight:
        error = rebuilt - images
        distance = jnp.mean(jnp.abs(error) if losses.pixel == "l1" else jnp.square(error))
        terms["pixel"] = (losses.pixel_weight, distance)
    if losses.perceptual_weight:
        distances = LPIPS(dtype=config.compute.jax_dtype).apply({"params": frozen.lpips}, images, rebuilt)
        terms["perceptual"] = (losses.perceptual_weight, jnp.mean(distances))
    if losses.entropy_weight:
        entropy = quantizer.entropy(encoded.z, temperature=losses.entropy_temperature)
        terms["entropy"] = (losses.entropy_weight, entropy.loss)
        metrics |= {"entropy/per_sample": entropy.per_sample, "entropy/codebook": entropy.codebook}
    if losses.commitment_weight:
        terms["commitment"] = (losses.commitment_weight, quantizer.commitment(encoded.z))
    if losses.source_weight:
        # Codes are constants here: recovery learns to read them and does not shape them.
        starts = tome.group_starts(encoded.source_map, keep)
        constant_codes = jax.lax.stop_gradient(codes)
        logits = model.recover(params, config.model, constant_codes, starts, compute=config.compute)
        terms["source"] = (losses.source_weight, recovery.source_loss(logits, encoded.source_map))
        known = starts if config.model.recovers_from_starts else None
        metrics["source/accuracy"] = jnp.mean(recovery.recovered_source_map(logits, known) == encoded.source_map)
    if losses.alignment_weight:
        loss = _alignment_loss(params, frozen.teacher, images, batch, step, config, keep / encoded.source_map.shape[1])
        terms["alignment"] = (losses.alignment_weight, loss)
    total = sum(weight * value for weight, value in terms.values())
    metrics |= {name: value for name, (_, value) in terms.items()}
    disc_loss = jnp.zeros(())
    if losses.adversarial_weight:
        on = (step >= losses.discriminator_start).astype(jnp.float32)
        sides = _adversarial_losses(disc_params, disc_stats, lecam, images, rebuilt, config)
        total = total + on * losses.adversarial_weight * sides.generator
        disc_loss, disc_stats, lecam = on * sides.discriminator, sides.stats, sides.lecam
        metrics |= {"adversarial": sides.generator, **sides.metrics}
    return total + disc_loss, (metrics | {"loss": total, "disc/loss": disc_loss}, disc_stats, lecam)


class _Sides(NamedTuple):
    generator: Array
    discriminator: Array
    stats: Any
    lecam: LeCam
    metrics: dict[str, Array]


def _adversarial_losses(disc_params, disc_stats, lecam, images, rebuilt, config: StepConfig) -> _Sides:
    losses, module = config.losses, config.patch_discriminator()

    def logits(params, stats, x):
        return module.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])

    constant = jax.lax.stop_gradient
    seen_by_generator, _ = logits(constant(disc_params), disc_stats, rebuilt)
    real, updated = logits(disc_params, disc_stats, images)
    # The generator's forward pass again; only the gradients differ.
    fake, updated = logits(disc_params, updated["batch_stats"], constant(rebuilt))
    discriminator = DISCRIMINATOR_LOSSES[losses.discriminator](real, fake)
    metrics = {"disc/real": jnp.mean(real), "disc/fake": jnp.mean(fake)}
    if losses.lecam_weight:
        lecam = lecam.update(real, fake, losses.lecam_decay)
        regulariser = adversarial.lecam_loss(real, fake, lecam)
        discriminator = discriminator + losses.lecam_weight * regulariser
        metrics["disc/lecam"] = regulariser
    generator = GENERATOR_LOSSES[losses.generator](seen_by_generator)
    return _Sides(generator, discriminator, updated["batch_stats"], lecam, metrics)


def _alignment_loss(params, teacher, images, batch, step, config: StepConfig, fraction: float) -> Float[Array, ""]:
    """Of one view with this fraction of tokens kept, to the label or the teacher's output for another view.

    Views that the batch lacks are made of its images: the student's is the whole image, the teacher's a random crop.
    """
    size = config.losses.alignment_size
    student_view = model.to_float(batch[STUDENT]) if STUDENT in batch else alignment.resized(images, size)
    raw = (size // config.model.downsampling) ** 2
    student = model.encode(
        params, config.model, student_view, keep=max(1, round(fraction * raw)), with_head=True, compute=config.compute
    ).head
    if config.losses.alignment == "label":
        return alignment.smoothed_cross_entropy(student, batch["label"])
    if TEACHER in batch:
        teacher_view = model.to_float(batch[TEACHER])
    else:
        keys = example_keys(stream_key(config.seed, Stream.AUGMENT, step), batch["example"])
        teacher_view = alignment.random_resized_crops(images, keys, size)
    features = dinov2.DINOv2(config.teacher).apply({"params": teacher}, dinov2.standardize(teacher_view)).pooled
    loss = alignment.kl_alignment_loss if config.losses.alignment == "kl" else alignment.cosine_alignment_loss
    return loss(student, jax.lax.stop_gradient(features))
