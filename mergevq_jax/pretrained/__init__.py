"""Models shipped with the package, by name."""

import os
from pathlib import Path

TOKENIZERS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/config.json"))}
GENERATORS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("generators/*/config.json"))}


def shipped(source: str | os.PathLike) -> str | os.PathLike:
    """The folder of a shipped model by its name; anything else unchanged."""
    return (TOKENIZERS | GENERATORS).get(str(source), source)
