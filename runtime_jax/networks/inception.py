"""InceptionV3 as FID uses it: the graph of 2015-12-05 (Szegedy et al., arXiv 1512.00567).

It differs from other InceptionV3s: average pools do not count padding, the last block has a maximum pool, and there are
1008 classes. Computed in float32 on every device. Parameters have the names of PyTorch's files.

Axes: B batch, H W image, h w map, C D channels.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from runtime_jax.prng import key_shape
from runtime_jax.sharding import Axis, constrain
from runtime_jax.weights import CONV, LINEAR, Rule, import_weights
from runtime_jax.weights.hub import read_tensors

SIZE = 299  # pixels
CLASSES = 1008
SPATIAL_CHANNELS = 7
EPSILON = 1e-3  # of BatchNorm
HIGHEST = jax.lax.Precision.HIGHEST

Unit = tuple[int, int, int]  # a convolution: features, height and width of its kernel


class InceptionOutput(NamedTuple):
    """Features of images.

    pooled: mean of the last block over all positions, for FID, KID, precision and recall.
    spatial: the first 7 channels of Mixed_6d's 1 x 1 branch at its 17 x 17 positions, for sFID (Nash et al. 2021).
    logits: without the classifier's bias, for the Inception Score.
    """

    pooled: Float[Array, "B 2048"]
    spatial: Float[Array, "B S"]
    logits: Float[Array, "B 1008"]


class ConvNorm(nn.Module):
    """Convolution, BatchNorm with frozen statistics, ReLU; with a stride of 2 the convolution is not padded."""

    unit: Unit
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B new_h new_w D"]:
        features, *kernel = self.unit
        padding = "VALID" if self.stride > 1 else self.padding
        conv = nn.Conv(features, kernel, self.stride, padding, use_bias=False, precision=HIGHEST, name="conv")
        x = constrain(conv(x), Axis.BATCH, None, None, None)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        mean, var = self.param("mean", zeros, (features,)), self.param("var", ones, (features,))
        scale, bias = self.param("scale", ones, (features,)), self.param("bias", zeros, (features,))
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        return nn.relu(x * factor[None, None, None] + (bias - mean * factor)[None, None, None])


class Block(nn.Module):
    """Branches side by side.

    Attributes:
      branches: name and steps of each. A step is a convolution, or a pair of them side by side.
      pool: "average" or "maximum" of neighbours, or "reduce": this block halves the map.
      pooled: features of the convolution behind the pool, unless it is "reduce".
    """

    branches: tuple[tuple[str, tuple[Any, ...]], ...]
    pool: str
    pooled: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B new_h new_w D"]:
        halved, outputs = self.pool == "reduce", []
        for name, steps in self.branches:
            y = x
            for number, step in enumerate(steps, 1):
                own = name if len(steps) == 1 else f"{name}_{number}"
                units = {own: step} if isinstance(step[0], int) else {f"{own}a": step[0], f"{own}b": step[1]}
                stride = 2 if halved and number == len(steps) else 1
                y = jnp.concatenate([ConvNorm(unit, stride, name=own)(y) for own, unit in units.items()], axis=-1)
            outputs.append(y)
        if halved:
            return jnp.concatenate([*outputs, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)
        if self.pool == "average":
            y = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        else:
            y = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        return jnp.concatenate([*outputs, ConvNorm((self.pooled, 1, 1), name="branch_pool")(y)], axis=-1)


_A = (
    ("branch1x1", ((64, 1, 1),)),
    ("branch5x5", ((48, 1, 1), (64, 5, 5))),
    ("branch3x3dbl", ((64, 1, 1), (96, 3, 3), (96, 3, 3))),
)
_B = (("branch3x3", ((384, 3, 3),)), ("branch3x3dbl", ((64, 1, 1), (96, 3, 3), (96, 3, 3))))
_D = (
    ("branch3x3", ((192, 1, 1), (320, 3, 3))),
    ("branch7x7x3", ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))),
)
_PAIR = ((384, 1, 3), (384, 3, 1))
_E = (
    ("branch1x1", ((320, 1, 1),)),
    ("branch3x3", ((384, 1, 1), _PAIR)),
    ("branch3x3dbl", ((448, 1, 1), (384, 3, 3), _PAIR)),
)


def _c(width: int) -> tuple[tuple[str, tuple[Unit, ...]], ...]:
    row, column = (width, 1, 7), (width, 7, 1)
    return (
        ("branch1x1", ((192, 1, 1),)),
        ("branch7x7", ((width, 1, 1), row, (192, 7, 1))),
        ("branch7x7dbl", ((width, 1, 1), column, row, column, (192, 1, 7))),
    )


_BLOCKS: Mapping[str, tuple[Any, ...]] = {
    "Mixed_5b": (_A, "average", 32),
    "Mixed_5c": (_A, "average", 64),
    "Mixed_5d": (_A, "average", 64),
    "Mixed_6a": (_B, "reduce"),
    "Mixed_6b": (_c(128), "average", 192),
    "Mixed_6c": (_c(160), "average", 192),
    "Mixed_6d": (_c(160), "average", 192),
    "Mixed_6e": (_c(192), "average", 192),
    "Mixed_7a": (_D, "reduce"),
    "Mixed_7b": (_E, "average", 192),
    "Mixed_7c": (_E, "maximum", 192),
}


class InceptionV3(nn.Module):
    """The whole network."""

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> InceptionOutput:
        """Features of images in [-1, 1], of 299 x 299 pixels (see `resize`) wherever figures are compared.

        Raises:
          ValueError: a side has less than 75 pixels.
        """
        if min(images.shape[1:3]) < 75:
            raise ValueError(f"InceptionV3 needs at least 75 x 75 pixels, got {images.shape[1]} x {images.shape[2]}")
        x = ConvNorm((32, 3, 3), stride=2, name="Conv2d_1a_3x3")(images)
        x = ConvNorm((32, 3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = nn.max_pool(ConvNorm((64, 3, 3), name="Conv2d_2b_3x3")(x), (3, 3), (2, 2))
        x = ConvNorm((80, 1, 1), name="Conv2d_3b_1x1")(x)
        x = nn.max_pool(ConvNorm((192, 3, 3), padding="VALID", name="Conv2d_4a_3x3")(x), (3, 3), (2, 2))
        for name, block in _BLOCKS.items():
            x = Block(*block, name=name)(x)
            if name == "Mixed_6d":  # its 1 x 1 branch comes first
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        pooled = x.mean(axis=(1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision=HIGHEST, name="fc")(pooled)
        return InceptionOutput(pooled, spatial, logits)


def bilinear_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of TensorFlow 1's bilinear resize of one axis: pixel i lies at i * old / new, without antialiasing."""
    position = np.arange(new, dtype=np.float32) * np.float32(old / new)
    low = position.astype(int)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(new), np.minimum(low + 1, old - 1)), position - low)
    return matrix


def resize(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Images of any size as the network takes them: resized as TensorFlow 1 did, then (x - 128) / 128."""
    rows, columns = (bilinear_matrix(size, SIZE) for size in images.shape[1:3])
    resized = jnp.einsum("yi,bijc->byjc", rows, images.astype(jnp.float32), precision=HIGHEST)
    return (jnp.einsum("xj,byjc->byxc", columns, resized, precision=HIGHEST) - 128) / 128


def _unit(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.conv.weight", f"{target}/conv/kernel", CONV),
        Rule(f"{source}.bn.weight", f"{target}/scale"),
        Rule(f"{source}.bn.bias", f"{target}/bias"),
        Rule(f"{source}.bn.running_mean", f"{target}/mean"),
        Rule(f"{source}.bn.running_var", f"{target}/var"),
    )


TABLE = (
    *_unit("{unit}", "{unit}"),
    *_unit("{block}.{unit}", "{block}/{unit}"),
    Rule("fc.weight", "fc/kernel", LINEAR),
)
_IGNORED = (r".*\.num_batches_tracked", r"fc\.bias")


def param_shapes() -> dict[str, Any]:
    """Shapes and dtypes of the parameters."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, key_shape(), images)["params"]


def convert_inception(source: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters, float32, from the state dict of pytorch-fid or torch-fidelity.

    Raises:
      WeightError: names or shapes that do not fit.
    """
    source = {name: array.astype(np.float32) for name, array in source.items()}
    return import_weights(TABLE, source, param_shapes(), ignore=_IGNORED)


def load_inception(source: str | os.PathLike) -> dict[str, Any]:
    """The parameters, float32, from a file (.pth or .safetensors), a folder or a hub id.

    The usual file is pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, which torch-fidelity calls
    `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
      WeightError: the source is missing, unreadable or does not fit.
    """
    return convert_inception(read_tensors(source))
