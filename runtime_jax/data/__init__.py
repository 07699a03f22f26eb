"""Data: sources of pictures, and batches that are a pure function of the step."""

from runtime_jax.data.folder import image_files
from runtime_jax.data.picture import decode_image, image_size
from runtime_jax.data.pipeline import (
    Batches,
    DataConfig,
    center_crop,
    make_batches,
    num_examples,
    random_crop,
    read_batches,
)
from runtime_jax.data.sources import (
    PHOTO_REGIONS,
    MissingDatasetError,
    Source,
    SourceConfig,
    check_same_classes,
    classes_of,
    open_source,
    photo_region,
)

__all__ = [
    "PHOTO_REGIONS",
    "Batches",
    "DataConfig",
    "MissingDatasetError",
    "Source",
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
    "photo_region",
    "random_crop",
    "read_batches",
]
