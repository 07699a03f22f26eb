"""DINOv2 and the projection head with which self-distillation trains it; only DINOv2 is kept.

DINO: Caron et al. 2021, arXiv 2104.14294. Axes: B batch, H W image, P prototypes.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config, standardize
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.gelu import gelu
from runtime_jax.sharding import Axis, constrain

BACKBONE = "backbone"  # name of DINOv2's parameters


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of the projection head; the defaults are DINO's."""

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536

    def __post_init__(self):
        if min(self.hidden, self.bottleneck, self.prototypes) < 1:
            raise ValueError(f"head: {self}: sizes are at least 1")


class Projected(nn.Module):
    """DINOv2's class token, and its cosines with learned prototypes."""

    config: DINOv2Config
    head: HeadConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Cosines in [-1, 1], float32, of images in [-1, 1]."""
        network = DINOv2(self.config, self.compute.attention, self.compute.jax_dtype, name=BACKBONE)
        x = network(standardize(images)).pooled
        return _Head(self.head, self.compute, name="head")(x)


class _Head(nn.Module):
    """A perceptron of three layers to a narrow unit vector, then its cosines with the prototypes."""

    config: HeadConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B P"]:
        config, dtype = self.config, self.compute.jax_dtype
        for name in ("fc1", "fc2"):
            x = constrain(gelu(nn.Dense(config.hidden, dtype=dtype, name=name)(x)), Axis.BATCH, None)
        x = _unit(nn.Dense(config.bottleneck, dtype=dtype, name="fc3")(x))
        prototypes = self.param("prototypes", nn.initializers.normal(1.0), (config.prototypes, config.bottleneck))
        return constrain(jnp.einsum("bd,pd->bp", x, _unit(prototypes), precision="highest"), Axis.BATCH, None)


def _unit(x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Rows of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
