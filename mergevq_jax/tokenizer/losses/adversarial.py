"""The patch discriminator and the adversarial losses of stage 1 (PatchGAN: Isola 2017; LeCam: Tseng 2021)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from mergevq_jax.tokenizer.layers import convolve
from runtime_jax.sharding import Axis, constrain

Logits = Float32[Array, "batch h w 1"]
Scalar = Float[Array, ""]

BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch in the running statistics
BATCH_NORM_EPSILON = 1e-5  # added to the variance


def _scale_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics.

    The batch is normalised by its biased variance, while the running variance averages the unbiased one (n / (n - 1));
    `flax.linen.BatchNorm` averages the biased one. Under jit on a mesh the statistics are those of the global batch.

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
        ndf: width of the first convolution; the n-th after it has ndf * min(2^n, 8).
        num_layers: number of stride-2 convolutions; one of stride 1 and the logits follow.
        dtype: dtype of the convolutions; parameters, statistics and logits are float32.
    """

    ndf: int = 64
    num_layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"], *, train: bool) -> Logits:
        """Patch logits of images in [-1, 1].

        `train` normalises by the batch and updates the collection "batch_stats" (pass `mutable=["batch_stats"]`);
        otherwise the running statistics are used. Images too small for the convolutions raise ValueError.
        """
        smallest = 3 * 2**self.num_layers
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchDiscriminator with num_layers={self.num_layers} needs images of at least "
                f"{smallest}x{smallest} pixels, got {images.shape[1]}x{images.shape[2]}"
            )
        conv = functools.partial(
            nn.Conv,
            kernel_size=(4, 4),
            padding=1,
            kernel_init=nn.initializers.normal(0.02),
            conv_general_dilated=convolve,
        )
        x = conv(self.ndf, strides=2, dtype=self.dtype, name="conv_0")(images.astype(self.dtype))
        x = constrain(nn.leaky_relu(x, 0.2), Axis.BATCH, None, None, None)
        for n in range(1, self.num_layers + 1):
            width, stride = self.ndf * min(2**n, 8), 2 if n < self.num_layers else 1
            x = conv(width, strides=stride, use_bias=False, dtype=self.dtype, name=f"conv_{n}")(x)
            x = BatchNorm(dtype=self.dtype, name=f"norm_{n}")(x, train=train)
            x = constrain(nn.leaky_relu(x, 0.2), Axis.BATCH, None, None, None)
        return conv(1, dtype=jnp.float32, name="logits")(x.astype(jnp.float32))


def _image_mean(logits: Logits) -> Float[Array, "batch"]:
    return reduce(logits, "b h w 1 -> b", "mean")


def hinge_d_loss(real: Logits, fake: Logits) -> Scalar:
    """Discriminator's hinge loss, the mean of the two halves."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def vanilla_d_loss(real: Logits, fake: Logits) -> Scalar:
    """Discriminator's logistic loss of each patch, the mean of the two halves."""
    return 0.5 * (jnp.mean(nn.softplus(-real)) + jnp.mean(nn.softplus(fake)))


def non_saturating_d_loss(real: Logits, fake: Logits) -> Scalar:
    """Discriminator's logistic loss of each image's mean logit: the counterpart of `non_saturating_g_loss`."""
    return 0.5 * (jnp.mean(nn.softplus(-_image_mean(real))) + jnp.mean(nn.softplus(_image_mean(fake))))


def hinge_g_loss(fake: Logits) -> Scalar:
    """The generator's counterpart of the hinge loss: minus the mean patch logit."""
    return -jnp.mean(fake)


def non_saturating_g_loss(fake: Logits) -> Scalar:
    """Generator's non-saturating loss softplus(-l), with l the mean logit of each image."""
    return jnp.mean(nn.softplus(-_image_mean(fake)))


class LeCam(struct.PyTreeNode):
    """Moving averages of the mean logits of real and generated images, float32 scalars.

    Update before use: `ema = ema.update(real, fake, decay)`, then `lecam_loss(real, fake, ema)`.
    """

    real: Any  # untyped: trees of shapes and of shardings have the same structure
    fake: Any

    @staticmethod
    def zeros() -> "LeCam":
        """The state before the first step."""
        return LeCam(real=jnp.zeros((), jnp.float32), fake=jnp.zeros((), jnp.float32))

    def update(self, real: Logits, fake: Logits, decay: float = 0.999) -> "LeCam":
        """Moves the averages towards the means of the logits; no gradient flows through them."""

        def moved(average: Scalar, logits: Logits) -> Scalar:
            return decay * average + (1.0 - decay) * jnp.mean(jax.lax.stop_gradient(logits))

        return LeCam(real=moved(self.real, real), fake=moved(self.fake, fake))


def lecam_loss(real: Logits, fake: Logits, ema: LeCam) -> Scalar:
    """LeCam regulariser: pulls logits inside the other side's moving average (`ema` already updated)."""
    return jnp.mean(jnp.square(nn.relu(real - ema.fake))) + jnp.mean(jnp.square(nn.relu(ema.real - fake)))
