"""Models shipped with the package, by name."""

from pathlib import Path

TOKENIZERS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/config.json"))}
GENERATORS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("generators/*/config.json"))}
SHIPPED = {"tokenizer": TOKENIZERS, "generator": GENERATORS}
