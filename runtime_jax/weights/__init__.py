"""Weights of other programs: finding them, recognising them, and the table that turns them into parameters."""

from runtime_jax.weights.table import (
    CONV,
    IDENTITY,
    LINEAR,
    POINTWISE,
    Rule,
    Transform,
    WeightError,
    export_weights,
    fits,
    import_weights,
    joined,
    layer,
    norm,
    prefixed,
    read_safetensors,
    write_safetensors,
)

__all__ = [
    "CONV",
    "IDENTITY",
    "LINEAR",
    "POINTWISE",
    "Rule",
    "Transform",
    "WeightError",
    "export_weights",
    "fits",
    "import_weights",
    "joined",
    "layer",
    "norm",
    "prefixed",
    "read_safetensors",
    "write_safetensors",
]
