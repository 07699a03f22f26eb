"""Stage 1: an autoencoder of FLUX's architecture on pictures.

Axes: B batch, H W image, h w grid of latents, C latent channels.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from runtime_jax.nn.compute import Compute
from runtime_jax.prng import Stream, example_keys, stream_key
from runtime_jax.training.network import Means, TrainingConfig
from tokenverse_jax.flux.autoencoder import Autoencoder, AutoencoderConfig, to_float, to_uint8

Params = Any


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Architecture, loss and training of the autoencoder; its scaling and shift are measured after training."""

    model: AutoencoderConfig
    l2_weight: float = 1.0  # beside the mean absolute error in [-1, 1]
    kl_weight: float = 1e-4  # of the mean over latents, in nats
    training: TrainingConfig


def init_params(config: VAEConfig, seed: int) -> Params:
    """Random parameters, float32."""
    side = config.model.downsampling
    key = stream_key(seed, Stream.PARAMS)
    return Autoencoder(config.model).init(key, jnp.zeros((1, side, side, 3)))["params"]


def loss(
    params: Params,
    batch: dict[str, Array],
    step: Array,
    *,
    frozen: Params,
    config: VAEConfig,
    compute: Compute,
    seed: int,
) -> tuple[Array, Means]:
    """Reconstruction error from samples of the latents, and the latents' divergence from a standard normal.

    Args:
      params, frozen: together the autoencoder's; frozen ones stay as they are.
      batch: "image" uint8 [B, H, W, 3], "example" int [B] that the noise depends on.
    """
    vae, images, params = Autoencoder(config.model, compute), to_float(batch["image"]), {**frozen, **params}
    posterior = vae.apply({"params": params}, images, method="encode")
    keys = example_keys(stream_key(seed, Stream.NOISE, step), batch["example"])
    noise = jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)
    error = vae.apply({"params": params}, posterior.sample(noise), method="decode") - images
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    kl = 0.5 * jnp.mean(jnp.square(posterior.mean) + jnp.exp(posterior.logvar) - posterior.logvar - 1.0)
    metrics = {"l1": absolute, "l2": squared, "kl": kl, "latent_std": jnp.std(posterior.mean)}
    metrics["noise_std"] = jnp.sqrt(jnp.mean(jnp.exp(posterior.logvar)))
    return absolute + config.l2_weight * squared + config.kl_weight * kl, metrics


@jax.jit(static_argnames=("model", "compute"))
def encode(
    params: Params, images: UInt8[Array, "B H W 3"], *, model: AutoencoderConfig, compute: Compute
) -> Float[Array, "B h w C"]:
    """Means of the latents, unscaled."""
    return Autoencoder(model, compute).apply({"params": params}, to_float(images), method="encode").mean


@jax.jit(static_argnames=("model", "compute"))
def reconstruct(
    params: Params, images: UInt8[Array, "B H W 3"], *, model: AutoencoderConfig, compute: Compute
) -> UInt8[Array, "B H W 3"]:
    """Pictures through the means of their latents."""
    rebuilt = Autoencoder(model, compute).apply({"params": params}, to_float(images))
    return to_uint8(rebuilt)


def psnr(images: UInt8[np.ndarray, "B H W 3"], rebuilt: UInt8[np.ndarray, "B H W 3"]) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures."""
    error = np.square(images.astype(np.float64) - rebuilt).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-9))))
