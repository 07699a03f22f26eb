"""LPIPS, the learned perceptual distance on VGG16 features (Zhang et al. 2018, version 0.1)."""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from runtime_jax.prng import key_shape
from runtime_jax.sharding import Axis, constrain
from runtime_jax.weights import CONV, Rule, Transform, WeightError, import_weights, layer
from runtime_jax.weights.hub import merge_tensors, read_tensors, rename

Images = Float[Array, "batch height width 3"]
FeatureMap = Float[Array, "batch h w channels"]

CONVS_PER_STAGE = (2, 2, 3, 3, 3)
VGG16_WIDTHS = (64, 128, 256, 512, 512)
# ImageNet statistics for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
    """The convolutions of VGG16; returns the last activation of each of its five stages."""

    widths: tuple[int, ...] = VGG16_WIDTHS
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> list[Array]:
        """Standardised images [B, H, W, 3] to five maps [B, H/2^s, W/2^s, widths[s]]."""
        x = images.astype(self.dtype)
        features = []
        for stage, (width, convs) in enumerate(zip(self.widths, CONVS_PER_STAGE, strict=True)):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for n in range(convs):
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv_{stage}_{n}")(x))
                x = constrain(x, Axis.BATCH, None, None, None)
            features.append(x)
        return features


def unit_normalize(features: FeatureMap, epsilon: float = 1e-10) -> FeatureMap:
    """Divides each position's feature vector by its length plus epsilon, in float32; zero vectors stay zero."""
    features = features.astype(jnp.float32)
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # The root's gradient is infinite at zero: dead positions take the constant branch.
    alive = squares > 0
    length = jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1.0)), 0.0)
    return features / (length + epsilon)


class LPIPS(nn.Module):
    """Perceptual distance of two images: weighted squared differences of unit-normalised VGG16 features.

    Its parameters are frozen: pass them to the train step apart from the state. There is no dropout.

    Attributes:
        widths: channels of the five stages (VGG16's own; narrower for tests).
        dtype: dtype of the convolutions; normalisation and distance are float32.
    """

    widths: tuple[int, ...] = VGG16_WIDTHS
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images, targets: Images) -> Float[Array, "batch"]:
        """Distance >= 0 of images and targets in [-1, 1] with sides of at least 16 pixels."""
        if min(images.shape[1:3]) < 16:
            raise ValueError(f"LPIPS halves images four times and needs at least 16x16 pixels, got {images.shape[1:3]}")
        vgg = VGG16Features(self.widths, self.dtype, name="vgg")
        shift = jnp.asarray(SHIFT, jnp.float32)[None, None, None]
        scale = jnp.asarray(SCALE, jnp.float32)[None, None, None]
        pairs = zip(vgg((images - shift) / scale), vgg((targets - shift) / scale), strict=True)
        distance = jnp.zeros(images.shape[0], jnp.float32)
        for stage, (a, b) in enumerate(pairs):
            weight = self.param(f"lin_{stage}", nn.initializers.constant(1.0 / a.shape[-1]), (a.shape[-1],))
            difference = jnp.square(unit_normalize(a) - unit_normalize(b))
            distance += reduce(difference * weight[None, None, None], "b h w c -> b", "sum") / (a.shape[1] * a.shape[2])
        return distance


_FLATTEN = Transform(lambda x: np.reshape(x, -1), lambda x: np.reshape(x, (1, -1, 1, 1)))
# Positions of the convolutions in torchvision's vgg16().features, stage by stage.
_TORCHVISION_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

TABLE = (
    *(
        rule
        for stage, positions in enumerate(_TORCHVISION_LAYERS)
        for n, position in enumerate(positions)
        for rule in layer(f"features.{position}", f"vgg/conv_{stage}_{n}", CONV)
    ),
    Rule("lin{i}.model.1.weight", "lin_{i}", _FLATTEN),
)
_IGNORED = (r"classifier\..*", r"pre_logits\..*", r"head\..*", r"scaling_layer\..*")
# The lpips package slices torchvision's layers, keeps their numbers and lists its linear layers twice.
_RENAMES = ((r"^net\.slice\d\.", "features."), (r"^lins\.(\d)\.", r"lin\1."), (r"^(lin\d)\.model\.0\.", r"\1.model.1."))


def lpips_shapes(widths: tuple[int, ...] = VGG16_WIDTHS) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `LPIPS(widths)`."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(LPIPS(widths).init, key_shape(), images, images)["params"]


def load_lpips(*sources: str | os.PathLike, widths: tuple[int, ...] = VGG16_WIDTHS) -> dict[str, Any]:
    """The parameters of `LPIPS(widths)`, float32, from published weights.

    Args:
      sources: files (.safetensors or PyTorch's), folders of them, or hub ids, which together hold VGG16's convolutions
        (torchvision's or timm's `features.N.*`, or the lpips package's `net.sliceK.N.*`) and the linear layers
        (`linN.model.1.weight`). Classifier weights are ignored. Usual are torchvision's `vgg16-397923af.pth` and the
        lpips package's `weights/v0.1/vgg.pth`.
      widths: channels of the five stages.

    Raises:
      WeightError: a source is missing or unreadable, names or shapes do not fit, or a linear weight is negative.
    """
    if not sources:
        raise WeightError("LPIPS needs weights of VGG16 and of its linear layers: give a file, folder or hub id")
    parts = []
    for source in sources:
        for name, array in read_tensors(source).items():
            parts.append((source, {rename(name, _RENAMES): array.astype(np.float32)}))
    params = import_weights(TABLE, merge_tensors(parts), lpips_shapes(widths), ignore=_IGNORED)
    negative = [name for name in params if name.startswith("lin_") and np.any(params[name] < 0)]
    if negative:
        raise WeightError(f"{', '.join(negative)}: LPIPS' linear weights must be >= 0")
    return params
