"""Networks whose features metrics compare: mini_scenes' judge, FID's InceptionV3, DINOv2.

Axes: B batch, H W image, F features, S spatial features, C classes.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from mini_scenes.judge import Judge
from mini_scenes.judge.model import JudgeConfig, JudgeNet
from runtime_jax.networks import inception
from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config, load_dinov2, standardize
from runtime_jax.sharding import Axis, constrain, replicate
from runtime_jax.weights.fingerprint import fingerprint

DINOV2_SIZE = 224  # pixels
JUDGE, INCEPTION, DINOV2 = "judge", "inception", "dinov2"
Images = UInt8[Array, "B H W 3"] | UInt8[np.ndarray, "B H W 3"]


class Features(NamedTuple):
    """What a network says of images, float32."""

    pool: Float[Array, "B F"]
    spatial: Float[Array, "B S"] | None = None  # for sFID
    logits: Float[Array, "B C"] | None = None  # for the Inception Score


Compute = Callable[[Any, Array], Features]  # parameters and images to features


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A frozen network: `network(images).pool`.

    Under `jax.set_mesh`, batches are split over the mesh, which holds a copy of the weights for each device; without a
    mesh, the default device computes. Features of an image don't depend, but for rounding, on its batch and the mesh.
    Each size of batch is compiled once.

    Attributes:
      name: "judge", "inception" or "dinov2".
      fingerprint: SHA-256 of the weights.
      resize: what happens to images before the network reads them: part of the protocol.
      side: of which number of pixels sides must be multiples.
    """

    name: str
    fingerprint: str
    resize: str
    params: Mapping[str, Any]
    compute: Compute
    side: int = 1
    _placed: dict[Mesh, Any] = field(default_factory=dict, repr=False)

    def __call__(self, images: Images) -> Features:
        """Features of images.

        Raises:
          ValueError: not uint8 [B, H, W, 3], or a side that is not a multiple of `side`.
        """
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != 3:
            raise ValueError(f"features need images uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
        if any(pixels % self.side for pixels in images.shape[1:3]):
            raise ValueError(
                f"{self.name} needs images whose sides are multiples of {self.side} pixels, got "
                f"{images.shape[1]} x {images.shape[2]}"
            )
        mesh = jax.sharding.get_mesh()
        if mesh not in self._placed:
            self._placed[mesh] = jax.device_put(self.params) if mesh.empty else replicate(self.params, mesh)
        return _features(self._placed[mesh], images, self.compute)


@functools.partial(jax.jit, static_argnames="compute")
def _features(params: Any, images: Array, compute: Compute) -> Features:
    with jax.default_matmul_precision("highest"):  # float32 on every device
        features = compute(params, constrain(images, Axis.BATCH, None, None, None))
    return jax.tree.map(lambda x: constrain(x.astype(jnp.float32), Axis.BATCH, None), features)


def load_feature_network(source: str) -> FeatureNetwork:
    """The network of a source.

    Args:
      source: "judge", which is shipped and reads scenes of mini_scenes; "inception:PATH" with FID's weights (see
        `runtime_jax.networks.inception.load_inception`); "dinov2:PATH" with DINOv2's in a folder or a hub id.

    Raises:
      ValueError: another source.
      WeightError: weights that are missing or do not fit.
    """
    name, _, path = source.partition(":")
    if source == JUDGE:
        judge = Judge.load()
        resize = "none: images are read as they are, in [0, 1]"
        return _network(JUDGE, resize, judge.params, functools.partial(_judge, judge.config), side=8)
    if name == INCEPTION and path:
        resize = (
            "bilinear to 299 x 299 as in TensorFlow 1 (pixel i lies at i * old / 299; no antialiasing, no rounding), "
            "then (x - 128) / 128"
        )
        return _network(INCEPTION, resize, inception.load_inception(path), _inception)
    if name == DINOV2 and path:
        config, params = load_dinov2(path)
        resize = (
            f"bicubic to {DINOV2_SIZE} x {DINOV2_SIZE} as Pillow does (a = -0.5, antialiased, rounded to 8 bits), "
            "then standardised by ImageNet's mean and standard deviation"
        )
        return _network(DINOV2, resize, params, functools.partial(_dinov2, config))
    raise ValueError(f"feature network {source!r}: known are judge, inception:PATH and dinov2:PATH")


def _network(name: str, resize: str, params: Any, compute: Compute, side: int = 1) -> FeatureNetwork:
    return FeatureNetwork(name, fingerprint(params), resize, params, compute, side)


def _judge(config: JudgeConfig, params: Any, images: UInt8[Array, "B H W 3"]) -> Features:
    """The logits are the log of the share of each class in an image's pixels, without the background."""
    views = JudgeNet(config).apply({"params": params}, images.astype(jnp.float32) / 255)
    shares = jax.nn.log_softmax(views.kind, axis=-1)[..., 1:]
    return Features(views.features, logits=jax.nn.logsumexp(shares, axis=(1, 2)))


def _inception(params: Any, images: UInt8[Array, "B H W 3"]) -> Features:
    return Features(*inception.InceptionV3().apply({"params": params}, inception.resize(images)))


def _dinov2(config: DINOv2Config, params: Any, images: UInt8[Array, "B H W 3"]) -> Features:
    pixels = standardize(bicubic(images, DINOV2_SIZE) / 127.5 - 1)
    return Features(DINOv2(config).apply({"params": params}, pixels).pooled)


def bicubic(images: UInt8[Array, "B H W 3"], size: int) -> Float[Array, "B h w 3"]:
    """Images of size x size as Pillow makes them, up to one of 255 levels; whole numbers."""
    batch, height, *_ = images.shape
    x = images.astype(jnp.float32)
    for shape in ((batch, height, size, 3), (batch, size, size, 3)):  # Pillow rounds after each axis
        x = jnp.round(jnp.clip(jax.image.resize(x, shape, "cubic", antialias=True), 0, 255))
    return x
