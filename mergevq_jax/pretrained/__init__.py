"""Models that are shipped with the package, by name."""

import os
from pathlib import Path

from mergevq_jax import model_folder
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer, read_config
from runtime_jax.compute import Compute

SHIPPED = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/config.json"))}
GENERATORS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("generators/*/config.json"))}


def read_tokenizer_config(source: str | os.PathLike) -> TokenizerConfig:
    """The architecture of a shipped tokenizer, or of a folder's or hub id's: its config.json alone, without weights.

    Raises:
      ValueError: as `Tokenizer.from_pretrained`.
    """
    folder = model_folder.find_folder(SHIPPED.get(str(source), source), "tokenizer")
    return read_config(folder / model_folder.CONFIG_NAME)


def load_tokenizer(source: str | os.PathLike, *, compute: Compute = Compute()) -> Tokenizer:
    """A shipped tokenizer by its name ("tiny"), otherwise a folder or hub id.

    Raises:
      ValueError: as `Tokenizer.from_pretrained`.
    """
    return Tokenizer.from_pretrained(SHIPPED.get(str(source), source), compute=compute)
