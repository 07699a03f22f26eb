"""Concept files that are shipped with the package, by name; learned on the pipeline "tiny"."""

from pathlib import Path

SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}
