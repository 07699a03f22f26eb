"""Global alignment of the class token with a frozen teacher (MergeVQ), and initialisation from wider weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Features = Float[Array, "batch features"]
Scalar = Float[Array, ""]


def kl_alignment_loss(student: Features, teacher: Features, temperature: float = 4.0) -> Scalar:
    """temperature^2 times the KL divergence of the student's softmax over the features from the teacher's.

    Summed over the features, averaged over the batch; no gradient flows to the teacher. With the default temperature
    the factor is 16, as in the released code.
    """
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature
    log_teacher = jax.nn.log_softmax(teacher, axis=-1)
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return temperature**2 * jnp.mean(divergence)


def cosine_alignment_loss(student: Features, teacher: Features, epsilon: float = 1e-8) -> Scalar:
    """Minus the mean cosine of student and teacher [B, D], in [-1, 1]; no gradient flows to the teacher."""
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
    """One random crop of each image at size x size: the other view, made on the device.

    Args:
      images: any range.
      keys: one for each image.
      size: side of the result in pixels.
      scale: smallest and largest side of the crop, as a fraction of the image's.
    """

    def crop(image, key):
        side_key, place_key = jax.random.split(key)
        fraction = jax.random.uniform(side_key, (), minval=scale[0], maxval=scale[1])
        extent = jnp.asarray(image.shape[:2], jnp.float32)
        zoom = size / (fraction * extent)
        start = jax.random.uniform(place_key, (2,)) * (1.0 - fraction) * extent
        shape = (size, size, image.shape[2])
        return jax.image.scale_and_translate(image, shape, (0, 1), zoom, -start * zoom, "linear")

    return jax.vmap(crop)(images, keys)


def select_uniform(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Takes evenly spaced entries of a larger weight along every axis (weight selection, Xu et al. 2024).

    An axis whose length the wanted one divides is strided from entry 0; otherwise the entries are those nearest to
    evenly spaced positions from the first to the last.

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

    Query, key and value are selected each for itself, so that none takes channels of another.

    Args:
      blocks: the encoder's parameters `attn` (`blocks_0`, `blocks_1`, ..; other entries are returned as they are).
      dinov2: parameters as `load_dinov2` returns them; block i fills block i.

    Raises:
      ValueError: more or wider blocks than the teacher has.
    """
    teacher = jax.tree.map(np.asarray, dinov2["blocks"])
    layers = teacher["scale1"].shape[0]
    indices = sorted(int(name.removeprefix("blocks_")) for name in blocks if name.startswith("blocks_"))
    if not indices or indices[-1] >= layers:
        raise ValueError(
            f"the encoder has {len(indices)} transformer blocks, DINOv2 {layers}: 1 to {layers} can be filled"
        )
    filled = dict(blocks)
    for i in indices:
        source = jax.tree.map(lambda x, i=i: x[i], teacher)
        filled[f"blocks_{i}"] = _select_block(source, blocks[f"blocks_{i}"])
    return filled


def _select_block(source: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    width = target["ls1"]["gamma"].shape[0]
    parts = [
        jax.tree.map(lambda x: select_uniform(x, (width,) * x.ndim), source[name]) for name in ("query", "key", "value")
    ]
    layout = {
        "norm1": source["norm1"],
        "attn": {"qkv": jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *parts), "proj": source["out"]},
        "ls1": {"gamma": source["scale1"]},
        "norm2": source["norm2"],
        "mlp": {"fc1": source["fc1"], "fc2": source["fc2"]},
        "ls2": {"gamma": source["scale2"]},
    }
    return jax.tree.map(lambda x, wanted: select_uniform(x, tuple(wanted.shape)).astype(wanted.dtype), layout, target)
