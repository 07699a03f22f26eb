"""The frozen DINOv2 teacher (Oquab et al. 2023): a ViT with LayerScale; weights in the layout of transformers."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from runtime_jax.files import path_of, write_json
from runtime_jax.nn.attention import AttentionBackend, attention
from runtime_jax.nn.gelu import gelu
from runtime_jax.prng import key_shape
from runtime_jax.sharding import Axis, constrain
from runtime_jax.weights import (
    CONV,
    Rule,
    Transform,
    WeightError,
    export_weights,
    import_weights,
    layer,
    norm,
    write_safetensors,
)
from runtime_jax.weights.hub import local_path, read_tensors, rename

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LAYER_NORM_EPSILON = 1e-6
BICUBIC_A = -0.75


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Sizes of a DINOv2 ViT; the defaults are DINOv2-Base's.

    `image_size` is the training size, to which the stored position embeddings belong; other inputs interpolate them.
    """

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    patch_size: int = 14
    image_size: int = 518
    layer_scale: bool = True  # False: DINO's first version, see `dino`
    layer_norm_epsilon: float = LAYER_NORM_EPSILON


# By hub id; giant has another MLP (SwiGLU), which is not supported.
PUBLISHED = {
    "facebook/dinov2-small": DINOv2Config(width=384, num_heads=6),
    "facebook/dinov2-base": DINOv2Config(),
    "facebook/dinov2-large": DINOv2Config(width=1024, num_layers=24, num_heads=16),
}


class DINOv2Output(NamedTuple):
    """`hidden` [B, 1 + h w, D] (class token first) and `pooled` [B, D], both after the final norm, float32."""

    hidden: Array
    pooled: Array


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of PyTorch's bicubic resize of one axis: a = -0.75, half-pixel centres, no antialias."""
    a = BICUBIC_A
    position = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(position).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(position - (first + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def resize_positions(
    positions: Float[Array, "cells width"], height: int, width: int
) -> Float[Array, "new_cells width"]:
    """Position embeddings of a square grid, resized bicubically to height x width cells, float32."""
    side = round(positions.shape[0] ** 0.5)
    grid = rearrange(positions.astype(jnp.float32), "(i j) d -> i j d", i=side)
    if (height, width) != (side, side):
        rows, columns = bicubic_matrix(side, height), bicubic_matrix(side, width)
        grid = jnp.einsum("ai,bj,ijd->abd", rows, columns, grid, precision="highest")
    return rearrange(grid, "i j d -> (i j) d")


def _layer_norm(config: DINOv2Config, x: Array, name: str) -> Array:
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)(x)


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale; its signature is that of `nn.scan`."""

    config: DINOv2Config
    backend: AttentionBackend
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], _: None
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def layer_scale(name: str):
            if not config.layer_scale:
                return 1
            return self.param(name, nn.initializers.ones, (config.width,))[None, None].astype(self.dtype)

        y = _layer_norm(config, x, "norm1").astype(self.dtype)
        query, key, value = (
            rearrange(dense(config.width, name)(y), "b l (h d) -> b l h d", h=config.num_heads)
            for name in ("query", "key", "value")
        )
        y = rearrange(attention(query, key, value, backend=self.backend), "b l h d -> b l (h d)")
        x = x + dense(config.width, "out")(y) * layer_scale("scale1")
        y = _layer_norm(config, x, "norm2").astype(self.dtype)
        y = gelu(dense(config.mlp_ratio * config.width, "fc1")(y))
        x = x + dense(config.width, "fc2")(y) * layer_scale("scale2")
        return constrain(x, Axis.BATCH, None, None), None


class DINOv2(nn.Module):
    """DINOv2 without registers.

    `dtype` is the compute dtype; norms, softmax and outputs are float32.
    """

    config: DINOv2Config = DINOv2Config()
    backend: AttentionBackend = "xla"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> DINOv2Output:
        """Features of ImageNet-standardised images (see `standardize`); sides are multiples of the patch size."""
        config = self.config
        height, width = images.shape[1] // config.patch_size, images.shape[2] // config.patch_size
        if (height * config.patch_size, width * config.patch_size) != images.shape[1:3] or not height * width:
            raise ValueError(
                f"DINOv2: image size {images.shape[1]}x{images.shape[2]} is not a multiple of {config.patch_size}"
            )
        patch = (config.patch_size, config.patch_size)
        x = nn.Conv(config.width, patch, strides=patch, padding="VALID", dtype=self.dtype, name="patch_embed")(
            images.astype(self.dtype)
        )
        x = rearrange(x, "b h w d -> b (h w) d").astype(jnp.float32)
        class_token = self.param("class_token", nn.initializers.normal(0.02), (config.width,))
        cells = (config.image_size // config.patch_size) ** 2
        positions = self.param("positions", nn.initializers.normal(0.02), (1 + cells, config.width))
        x = x + resize_positions(positions[1:], height, width)[None]
        first = jnp.broadcast_to((class_token + positions[0])[None, None], (x.shape[0], 1, config.width))
        x = jnp.concatenate([first, x], axis=1).astype(self.dtype)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(config, self.backend, self.dtype, name="blocks")
        x, _ = blocks(x, None)
        hidden = _layer_norm(config, x, "norm")
        return DINOv2Output(hidden=hidden, pooled=hidden[:, 0])


def standardize(images: Float[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
    """Images in [-1, 1] to DINOv2's range: in [0, 1], minus ImageNet's mean, divided by its standard deviation."""
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32)[None, None, None]
    std = jnp.asarray(IMAGENET_STD, jnp.float32)[None, None, None]
    return ((images.astype(jnp.float32) + 1.0) / 2.0 - mean) / std


_FIRST = Transform(lambda x: x[0, 0], lambda x: x[None, None])
_BATCH = Transform(lambda x: x[0], lambda x: x[None])
_LAYER = "encoder.layer.{i}"

TABLE = (
    Rule("embeddings.cls_token", "class_token", _FIRST),
    Rule("embeddings.position_embeddings", "positions", _BATCH),
    *layer("embeddings.patch_embeddings.projection", "patch_embed", CONV),
    *norm(f"{_LAYER}.norm1", "blocks[i]/norm1"),
    *layer(f"{_LAYER}.attention.q_proj", "blocks[i]/query"),
    *layer(f"{_LAYER}.attention.k_proj", "blocks[i]/key"),
    *layer(f"{_LAYER}.attention.v_proj", "blocks[i]/value"),
    *layer(f"{_LAYER}.attention.o_proj", "blocks[i]/out"),
    Rule(f"{_LAYER}.layer_scale1.lambda1", "blocks[i]/scale1"),
    *norm(f"{_LAYER}.norm2", "blocks[i]/norm2"),
    *layer(f"{_LAYER}.mlp.fc1", "blocks[i]/fc1"),
    *layer(f"{_LAYER}.mlp.fc2", "blocks[i]/fc2"),
    Rule(f"{_LAYER}.layer_scale2.lambda1", "blocks[i]/scale2"),
    *norm("layernorm", "norm"),
)
# Fields of transformers' config.json: what is supported, and the names of sizes.
_REQUIRED = {
    "model_type": "dinov2",
    "use_swiglu_ffn": False,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "num_channels": 3,
    "layer_norm_eps": LAYER_NORM_EPSILON,
}
_SIZES = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_ratio": "mlp_ratio",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_IGNORED = (r"embeddings\.mask_token",)
# Files older than transformers 5 have other names for the projections.
_RENAMES = (
    (r"^dinov2\.", ""),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)


def convert_dinov2(source: dict[str, np.ndarray], config: DINOv2Config) -> dict[str, Any]:
    """The parameters of `DINOv2(config)`, float32, from a transformers state dict (old or new names).

    Raises:
      WeightError: names or shapes that do not fit.
    """
    tensors = {rename(name, _RENAMES): array.astype(np.float32) for name, array in source.items()}
    return import_weights(TABLE, tensors, param_shapes(config), ignore=_IGNORED)


def param_shapes(config: DINOv2Config) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `DINOv2(config)`."""
    images = jax.ShapeDtypeStruct((1, config.patch_size, config.patch_size, 3), jnp.float32)
    return jax.eval_shape(DINOv2(config).init, key_shape(), images)["params"]


def parse_config(fields: dict[str, Any]) -> DINOv2Config:
    """The sizes in a transformers `config.json`.

    Raises:
      WeightError: another kind of model, or an unsupported variant (registers, SwiGLU, no qkv bias).
    """
    for name, value in _REQUIRED.items():
        if fields.get(name, value) != value:
            raise WeightError(f"DINOv2 config.json: {name} = {fields[name]!r}; only {value!r} is supported")
    missing = [source for source in _SIZES.values() if not isinstance(fields.get(source), int)]
    if missing:
        raise WeightError(f"DINOv2 config.json: not a whole number: {', '.join(missing)}")
    sizes = {name: fields[source] for name, source in _SIZES.items()}
    return DINOv2Config(**sizes, layer_norm_epsilon=LAYER_NORM_EPSILON)


def load_dinov2(source: str | os.PathLike) -> tuple[DINOv2Config, dict[str, Any]]:
    """Config and parameters from a folder with config.json and .safetensors files, or a hub id (facebook/dinov2-base).

    Raises:
      WeightError: the source is missing, unreadable or does not fit.
    """
    folder = local_path(source, ("*.safetensors", "config.json"))
    config = _read_config(folder / "config.json")
    return config, convert_dinov2(read_tensors(folder), config)


def save_dinov2(folder: str | os.PathLike, config: DINOv2Config, params: Mapping[str, Any]) -> None:
    """Writes what `load_dinov2` and transformers read: config.json and model.safetensors, each atomically."""
    tensors = export_weights(TABLE, params)
    tensors["embeddings.mask_token"] = np.zeros((1, config.width), np.float32)  # transformers expects one
    write_safetensors(path_of(folder) / "model.safetensors", tensors, {"format": "pt"})
    fields = {source: getattr(config, name) for name, source in _SIZES.items()}
    fields |= {"architectures": ["Dinov2Model"], "layerscale_value": 1.0, "drop_path_rate": 0.0}
    write_json(path_of(folder) / "config.json", _REQUIRED | fields)


def read_dinov2_config(source: str | os.PathLike) -> DINOv2Config:
    """The config of what `load_dinov2` loads; those of published hub ids are known here.

    Raises:
      WeightError: as `load_dinov2`.
    """
    known = PUBLISHED.get(str(source))
    return _read_config(local_path(source, ("config.json",)) / "config.json") if known is None else known


def _read_config(path: Path) -> DINOv2Config:
    try:
        return parse_config(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise WeightError(f"{path}: not a readable config.json ({error})") from error
