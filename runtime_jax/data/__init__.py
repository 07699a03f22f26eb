"""Data: sources of pictures, and batches that are a pure function of the step."""

from runtime_jax.data.folder import image_files
from runtime_jax.data.picture import decode_image, image_size
from runtime_jax.data.pipeline import DataConfig, center_crop, make_batches, num_examples, read_batches
from runtime_jax.data.sources import MissingDatasetError, SourceConfig, check_same_classes, classes_of, open_source

__all__ = [
    "DataConfig",
    "MissingDatasetError",
    "SourceConfig",
    "center_crop",
    "check_same_classes",
    "classes_of",
    "decode_image",
    "image_files",
    "image_size",
    "make_batches",
    "num_examples",
    "open_source",
    "read_batches",
]
