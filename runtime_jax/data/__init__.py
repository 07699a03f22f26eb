"""Data: sources of pictures, and batches that are a pure function of the step."""

from runtime_jax.data.folder import image_files
from runtime_jax.data.picture import decode_image, image_size
from runtime_jax.data.pipeline import (
    DataConfig,
    batch_sequence,
    make_batches,
    num_examples,
    picture_sequence,
    read_batches,
)
from runtime_jax.data.sources import MissingDatasetError, SourceConfig, check_same_classes, classes_of, open_source
from runtime_jax.data.views import ResizedCropConfig, ViewConfig, center_crop, resize_and_crop

__all__ = [
    "DataConfig",
    "MissingDatasetError",
    "ResizedCropConfig",
    "SourceConfig",
    "ViewConfig",
    "batch_sequence",
    "center_crop",
    "check_same_classes",
    "classes_of",
    "decode_image",
    "image_files",
    "image_size",
    "make_batches",
    "num_examples",
    "open_source",
    "picture_sequence",
    "read_batches",
    "resize_and_crop",
]
