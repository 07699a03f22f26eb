"""The patch discriminator and the adversarial losses of stage 1 (PatchGAN: Isola 2017; LeCam: Tseng 2021)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from runtime_jax.sharding import Axis, constrain
from runtime_jax.weights import CONV, Rule

Logits = Float[Array, "batch h w 1"]
Scalar = Float[Array, ""]

BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch in the running statistics
BATCH_NORM_EPSILON = 1e-5  # added to the variance


def _scale_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics.

    The batch is normalised by its biased variance, but the running variance takes the unbiased one (n / (n - 1)), which
    `flax.linen.BatchNorm` does not. Under jit on a mesh the statistics are those of the global batch.

    Attributes:
        dtype: dtype of the output; statistics are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width channels"]:
        channels = x.shape[-1]
        scale = self.param("scale", _scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - mean[None, None, None]), axis=(0, 1, 2))
            if not self.is_initializing():
                count = x.size // channels
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += BATCH_NORM_MOMENTUM * (jax.lax.stop_gradient(mean) - running_mean.value)
                running_var.value += BATCH_NORM_MOMENTUM * (jax.lax.stop_gradient(unbiased) - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        multiplier = scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        return ((x - mean[None, None, None]) * multiplier[None, None, None] + bias[None, None, None]).astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """PatchGAN: a convolutional classifier of overlapping patches (70x70 pixels at three layers).

    Attributes:
        ndf: width of the first convolution; later ones have ndf * min(2^n, 8).
        num_layers: number of stride-2 convolutions; a stride-1 one and the logits follow.
        dtype: dtype of the convolutions; parameters, statistics and logits are float32.
    """

    ndf: int = 64
    num_layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"], *, train: bool) -> Logits:
        """Maps images [B, H, W, 3] in [-1, 1] to patch logits [B, h, w, 1], float32.

        `train` normalises by the batch and updates the collection "batch_stats" (pass `mutable=["batch_stats"]`);
        otherwise the running statistics are used. Images too small for the convolutions raise ValueError.
        """
        smallest = 3 * 2**self.num_layers
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchDiscriminator with num_layers={self.num_layers} needs images of at least "
                f"{smallest}x{smallest} pixels, got {images.shape[1]}x{images.shape[2]}"
            )

        def conv(features: int, stride: int, use_bias: bool, name: str, dtype: DTypeLike) -> nn.Conv:
            return nn.Conv(
                features,
                (4, 4),
                strides=stride,
                padding=1,
                use_bias=use_bias,
                dtype=dtype,
                kernel_init=nn.initializers.normal(0.02),
                name=name,
            )

        x = conv(self.ndf, 2, True, "conv_0", self.dtype)(images.astype(self.dtype))
        x = constrain(nn.leaky_relu(x, 0.2), Axis.BATCH, None, None, None)
        for n in range(1, self.num_layers + 1):
            stride = 2 if n < self.num_layers else 1
            x = conv(self.ndf * min(2**n, 8), stride, False, f"conv_{n}", self.dtype)(x)
            x = BatchNorm(dtype=self.dtype, name=f"norm_{n}")(x, train=train)
            x = constrain(nn.leaky_relu(x, 0.2), Axis.BATCH, None, None, None)
        return conv(1, 1, True, "logits", jnp.float32)(x.astype(jnp.float32))


def _image_mean(logits: Logits) -> Float[Array, "batch"]:
    return reduce(logits.astype(jnp.float32), "b h w 1 -> b", "mean")


def hinge_d_loss(real: Logits, fake: Logits) -> Scalar:
    """Discriminator's hinge loss, the mean of the two halves, from patch logits [B, h, w, 1]."""
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def vanilla_d_loss(real: Logits, fake: Logits) -> Scalar:
    """Discriminator's logistic loss of each patch, the mean of the two halves, from patch logits [B, h, w, 1]."""
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return 0.5 * (jnp.mean(nn.softplus(-real)) + jnp.mean(nn.softplus(fake)))


def non_saturating_d_loss(real: Logits, fake: Logits) -> Scalar:
    """Discriminator's logistic loss of each image's mean logit: the counterpart of `non_saturating_g_loss`."""
    return 0.5 * (jnp.mean(nn.softplus(-_image_mean(real))) + jnp.mean(nn.softplus(_image_mean(fake))))


def hinge_g_loss(fake: Logits) -> Scalar:
    """Generator's loss that goes with the hinge: minus the mean patch logit."""
    return -jnp.mean(fake.astype(jnp.float32))


def non_saturating_g_loss(fake: Logits) -> Scalar:
    """Generator's non-saturating loss softplus(-l), with l the mean logit of each image."""
    return jnp.mean(nn.softplus(-_image_mean(fake)))


class LeCam(struct.PyTreeNode):
    """Moving averages of the mean logits of real and generated images, float32 scalars.

    Update before use: `ema = ema.update(real, fake, decay)`, then `lecam_loss(real, fake, ema)`.
    """

    real: Any  # untyped: trees of shapes and of shardings have this structure too
    fake: Any

    @staticmethod
    def zeros() -> "LeCam":
        """The state before the first step."""
        return LeCam(real=jnp.zeros((), jnp.float32), fake=jnp.zeros((), jnp.float32))

    def update(self, real: Logits, fake: Logits, decay: float = 0.999) -> "LeCam":
        """Moves the averages towards the means of patch logits [B, h, w, 1]; no gradient flows through them."""

        def moved(average: Scalar, logits: Logits) -> Scalar:
            mean = jnp.mean(jax.lax.stop_gradient(logits).astype(jnp.float32))
            return decay * average + (1.0 - decay) * mean

        return LeCam(real=moved(self.real, real), fake=moved(self.fake, fake))


def lecam_loss(real: Logits, fake: Logits, ema: LeCam) -> Scalar:
    """LeCam regulariser: logits are pulled inside the other side's moving average (`ema` already updated)."""
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return jnp.mean(jnp.square(nn.relu(real - ema.fake))) + jnp.mean(jnp.square(nn.relu(ema.real - fake)))


def discriminator_table(num_layers: int) -> tuple[Rule, ...]:
    """Rules from the released PatchGAN state dict to `{"params": .., "batch_stats": ..}` of `PatchDiscriminator`."""
    rules = [
        Rule("main.0.weight", "params/conv_0/kernel", CONV),
        Rule("main.0.bias", "params/conv_0/bias"),
        Rule(f"main.{3 * num_layers + 2}.weight", "params/logits/kernel", CONV),
        Rule(f"main.{3 * num_layers + 2}.bias", "params/logits/bias"),
    ]
    for n in range(1, num_layers + 1):
        norm = f"main.{3 * n}"
        rules += [
            Rule(f"main.{3 * n - 1}.weight", f"params/conv_{n}/kernel", CONV),
            Rule(f"{norm}.weight", f"params/norm_{n}/scale"),
            Rule(f"{norm}.bias", f"params/norm_{n}/bias"),
            Rule(f"{norm}.running_mean", f"batch_stats/norm_{n}/mean"),
            Rule(f"{norm}.running_var", f"batch_stats/norm_{n}/var"),
        ]
    return tuple(rules)


DISCRIMINATOR_IGNORED = (r"main\.\d+\.num_batches_tracked",)
