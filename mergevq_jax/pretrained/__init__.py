"""Models that are shipped with the package, by name."""

import os
from pathlib import Path

from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax.compute import Compute

SHIPPED = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/config.json"))}
GENERATORS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("generators/*/config.json"))}


def load_tokenizer(source: str | os.PathLike, *, compute: Compute = Compute()) -> Tokenizer:
    """A shipped tokenizer by its name ("tiny"), otherwise a folder or hub id.

    Raises:
      ValueError: as `Tokenizer.from_pretrained`.
    """
    return Tokenizer.from_pretrained(SHIPPED.get(str(source), source), compute=compute)
