"""Aligns the class token with a frozen teacher (MergeVQ, global alignment), and initialises from wider weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Features = Float[Array, "batch features"]
Scalar = Float[Array, ""]


def kl_alignment_loss(student: Features, teacher: Features, temperature: float = 4.0) -> Scalar:
    """temperature^2 KL(teacher || student) between softmaxes over the features, averaged over the batch.

    The default temperature gives the released code's factor 16. No gradient flows to the teacher.
    """
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature
    log_teacher = jax.nn.log_softmax(teacher, axis=-1)
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return temperature**2 * jnp.mean(divergence)


def cosine_alignment_loss(student: Features, teacher: Features, epsilon: float = 1e-8) -> Scalar:
    """Minus the mean cosine of student and teacher, in [-1, 1]; no gradient flows to the teacher."""
    student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)

    def unit(x: Features) -> Features:
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(squares, epsilon**2))

    return -jnp.mean(jnp.sum(unit(student) * unit(teacher), axis=-1))


def smoothed_cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.1
) -> Scalar:
    """Cross-entropy with the target (1 - smoothing) on the label and smoothing spread evenly over all classes."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    target = jax.nn.one_hot(labels, logits.shape[-1]) * (1.0 - smoothing) + smoothing / logits.shape[-1]
    return -jnp.mean(jnp.sum(target * log_probabilities, axis=-1))


def resized(images: Float[Array, "batch height width 3"], size: int) -> Float[Array, "batch size size 3"]:
    """Whole images at size x size, bilinear with antialiasing."""
    return jax.image.resize(images, (images.shape[0], size, size, images.shape[3]), "linear")


def random_resized_crops(
    images: Float[Array, "batch height width 3"],
    keys: Key[Array, "batch"],
    size: int,
    scale: tuple[float, float] = (0.4, 1.0),
) -> Float[Array, "batch size size 3"]:
    """One random crop of each image, resized to size x size on the device: the teacher's view.

    `scale` bounds the side of a crop, as a fraction of the image's.
    """

    def crop(image, key):
        side_key, start_key = jax.random.split(key)
        fraction = jax.random.uniform(side_key, (), minval=scale[0], maxval=scale[1])
        extent = jnp.asarray(image.shape[:2], jnp.float32)
        zoom = size / (fraction * extent)
        start = jax.random.uniform(start_key, (2,)) * (1.0 - fraction) * extent
        shape = (size, size, image.shape[2])
        return jax.image.scale_and_translate(image, shape, (0, 1), zoom, -start * zoom, "linear")

    return jax.vmap(crop)(images, keys)


def select_uniform(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Takes evenly spaced entries of a larger weight along every axis (weight selection, Xu et al. 2024).

    Where the new length divides the old one, entries are strided from 0. Otherwise they are those nearest to evenly
    spaced positions from the first entry to the last.

    Raises:
      ValueError: another number of axes, or an axis that would have to grow.
    """
    if len(shape) != array.ndim or any(new > old or new < 1 for new, old in zip(shape, array.shape, strict=True)):
        raise ValueError(f"select_uniform: {tuple(shape)} cannot be taken from a weight of shape {array.shape}")
    for axis, (old, new) in enumerate(zip(array.shape, shape, strict=True)):
        even = np.arange(new) * (old // new) if old % new == 0 else np.round(np.linspace(0, old - 1, new)).astype(int)
        array = np.take(array, even, axis=axis)
    return array


def init_blocks_from_dinov2(blocks: Mapping[str, Any], dinov2: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's transformer blocks, filled from DINOv2's by uniform selection (released code: G and G+R).

    Query, key and value are selected separately, so that none takes channels of another.

    Args:
      blocks: the encoder's parameters `attn` or their shapes; only `blocks_0`, `blocks_1`, .. are used and returned.
      dinov2: parameters as `load_dinov2` returns them; block i fills block i.

    Raises:
      ValueError: more or wider blocks than the teacher has.
    """
    teacher = jax.tree.map(np.asarray, dinov2["blocks"])
    layers = teacher["scale1"].shape[0]
    indices = sorted(int(name.removeprefix("blocks_")) for name in blocks if name.startswith("blocks_"))
    if not indices or indices[-1] >= layers:
        raise ValueError(
            f"the encoder has {len(indices)} transformer blocks, DINOv2 {layers}: only 1 to {layers} can be filled"
        )
    return {
        f"blocks_{i}": _select_block(jax.tree.map(lambda x, i=i: x[i], teacher), blocks[f"blocks_{i}"]) for i in indices
    }


def _select_block(source: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    width = target["ls1"]["gamma"].shape[0]
    narrow = [
        jax.tree.map(lambda x: select_uniform(x, (width,) * x.ndim), source[name]) for name in ("query", "key", "value")
    ]
    layout = {
        "norm1": source["norm1"],
        "attn": {"qkv": jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *narrow), "proj": source["out"]},
        "ls1": {"gamma": source["scale1"]},
        "norm2": source["norm2"],
        "mlp": {"fc1": source["fc1"], "fc2": source["fc2"]},
        "ls2": {"gamma": source["scale2"]},
    }
    return jax.tree.map(lambda x, leaf: select_uniform(x, tuple(leaf.shape)).astype(leaf.dtype), layout, target)
