"""Features of labelled images, as parts on disk.

Axes: n images, H W image, F features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.images import SourceImages
from mergevq_jax.evaluate.parts import Rows, Task, fitting, padded, split_over
from mergevq_jax.evaluate.representation.encoders import Encoder
from runtime_jax.data import SourceConfig, classes_of
from runtime_jax.finite import NotFiniteError
from runtime_jax.sharding import replicate

LABEL, DIGEST = "label", "digest"  # of the rows, beside the features by pooling


class Batch(NamedTuple):
    """Images and their classes."""

    images: UInt8[np.ndarray, "n H W 3"]
    labels: Int[np.ndarray, "n"]


class LabelledImages:
    """All images of a source as centre crops, and their classes."""

    def __init__(self, source: SourceConfig, size: int):
        """Raises ValueError for a missing source, or one whose images have no labels."""
        self.source, self._images = source, SourceImages(source, size)
        ((_, classes),) = classes_of([source])
        if classes is None:
            raise ValueError(f"{self.name}: its images have no labels")
        if len(classes) < 2:
            raise ValueError(f"{self.name}: one class, {classes[0]!r}; at least two are needed")
        self.classes = classes

    @property
    def name(self) -> str:
        """Of the source."""
        return self._images.name

    def describe(self) -> dict[str, Any]:
        """The protocol."""
        return results.describe_images(self._images) | {"classes": len(self.classes)}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, rows: Sequence[int]) -> Batch:
        """Raises ValueError for a picture that cannot be read."""
        return Batch(*self._images.labelled(rows))


def task_of(name: str, encoder: Encoder, images: LabelledImages, batch_size: int, mesh: Mesh) -> Task:
    """The features of all images, with their labels and digests; `mesh`: of this process's devices."""
    size = fitting(batch_size, len(images))
    params = replicate(encoder.params, mesh)

    @jax.jit
    def compute(params: Any, batch: UInt8[Array, "B H W 3"]) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):  # float32 on every device
            return encoder.apply(params, batch.astype(jnp.float32) / 127.5 - 1.0)

    def start(rows: range, batch: Batch) -> dict[str, Array]:
        return compute(params, split_over(mesh, padded(batch.images, size)))

    def finish(batch: Batch, found: dict[str, np.ndarray]) -> Rows:
        rows = {pooling: features[: len(batch.labels)] for pooling, features in found.items()}
        return rows | {LABEL: np.asarray(batch.labels, np.int32), DIGEST: results.digests(batch.images)}

    def check(rows: range, arrays: Rows) -> None:
        for pooling in encoder.shapes():
            if not np.isfinite(arrays[pooling]).all():
                where = f"{images.name} {rows.start} to {rows.stop - 1}"
                raise NotFiniteError(f"{encoder.name}: features ({pooling}) of {where} are not finite")

    return Task(name, f"{encoder.name}: {images.name}", len(images), size, images.read, start, finish, check)
