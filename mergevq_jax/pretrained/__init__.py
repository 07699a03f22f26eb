"""Tokenizers that are shipped with the package, by name."""

import os
from pathlib import Path

from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax.compute import Compute

SHIPPED = {path.name: path for path in sorted(Path(__file__).parent.iterdir()) if (path / "config.json").is_file()}


def load_tokenizer(source: str | os.PathLike, *, compute: Compute = Compute()) -> Tokenizer:
    """A shipped tokenizer by its name ("tiny"), otherwise a folder or hub id.

    Raises:
      ValueError: as `Tokenizer.from_pretrained`.
    """
    return Tokenizer.from_pretrained(SHIPPED.get(str(source), source), compute=compute)
