"""What runs leave behind, and whether two states are equal."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """Each leaf differs by at most `tolerance` of its largest value."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = functools.reduce(
            lambda tree, key: tree[key.key] if hasattr(key, "key") else getattr(tree, key.name), path, got
        )
        scale = np.abs(leaf).max() + 1e-3
        assert np.abs(np.asarray(other) - leaf).max() / scale < tolerance, jax.tree_util.keystr(path)
