"""FLUX pipelines that are shipped with the package, by name."""

from pathlib import Path

SHIPPED = {path.name: path for path in sorted(Path(__file__).parent.iterdir()) if (path / "model_index.json").is_file()}
