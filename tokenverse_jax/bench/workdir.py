"""The files of a benchmark; those that exist are not made again.

config.json                      the config, and fingerprints of the weights
concepts/ROW/NUMBER.safetensors  the concepts that a row learned from a concept image
images/ROW/CASE.png              a row's images of a case, one for each seed, side by side
measurements.jsonl               a line for each row and case, see `table.Record`
table.md, TASK.png               the report
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from runtime_jax.data import decode_image
from runtime_jax.files import write_text
from runtime_jax.pictures import save_png
from runtime_jax.workdir import output_folder
from tokenverse_jax.bench.cases import Case
from tokenverse_jax.bench.table import Record

Images = UInt8[np.ndarray, "seeds H W 3"]


class Workdir:
    """The files of one benchmark."""

    def __init__(self, path: str | Path, config: dict[str, Any]):
        """Makes the folder; ValueError where it exists with another config, WorkdirError where it cannot be written."""
        self.path = output_folder(path)
        self._measurements = self.path / "measurements.jsonl"
        file, text = self.path / "config.json", json.dumps(config, indent=2) + "\n"
        if file.exists() and file.read_text() != text:
            raise ValueError(f"{file}: this workdir holds a benchmark with another config or weights; use a new one")
        write_text(file, text)

    def concept(self, row: str, number: int) -> Path:
        """The file of the concepts that a row learned from an image."""
        return self.path / "concepts" / _file_name(row) / f"{number:03}.safetensors"

    def has_images(self, row: str, case: Case) -> bool:
        """Whether a row's images of a case are there."""
        return self._strip(row, case).exists()

    def images(self, row: str, case: Case, seeds: int) -> Images:
        """A row's images of a case."""
        return np.stack(np.split(decode_image(self._strip(row, case).read_bytes()), seeds, axis=1))

    def save_images(self, row: str, case: Case, images: Images) -> None:
        """Writes a row's images of a case."""
        save_png(self._strip(row, case), np.concatenate(images, axis=1))

    def _strip(self, row: str, case: Case) -> Path:
        return self.path / "images" / _file_name(row) / f"{case.name}.png"

    def records(self) -> list[Record]:
        """All lines; an incomplete last one is dropped, from the file too."""
        if not self._measurements.exists():
            return []
        lines = self._measurements.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        write_text(self._measurements, "".join(whole))
        return [json.loads(line) for line in whole]

    def add_records(self, records: Sequence[Record]) -> None:
        """Appends lines."""
        with self._measurements.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9+.]+", "_", name)
