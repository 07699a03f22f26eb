"""Compares this project's modules with the outputs that reference implementations gave.

    python tests/check_golden.py tests/golden/encoder_gr.safetensors ...

A golden file holds `param/<state-dict name>`, `in/...` and `out/...`; its metadata key `config` is the reference
constructor's arguments as JSON. The module is told by the file's name, up to an optional suffix. Prints each output's
relative error, or the share of identical entries for integers, and exits non-zero above 1e-4, below 100 %, or for a
file that cannot be checked.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import golden_flux
import golden_inception
import golden_mergevq
import golden_text
import golden_vae
import jax
import numpy as np
from golden_tools import Tensors, parts, to_nhwc, to_tokens

from mergevq_jax.tokenizer import tome
from runtime_jax.weights import read_safetensors

TOLERANCE = 1e-4
RUNNERS: dict[str, Callable[[dict, Tensors, Tensors], Tensors]] = {
    **golden_flux.RUNNERS,
    **golden_inception.RUNNERS,
    **golden_mergevq.RUNNERS,
    **golden_text.RUNNERS,
    **golden_vae.RUNNERS,
}


def runner_for(path: Path) -> Callable[[dict, Tensors, Tensors], Tensors]:
    """The runner whose name is the longest start of the file's."""
    names = [name for name in RUNNERS if path.stem == name or path.stem.startswith(name + "_")]
    if not names:
        raise ValueError(f"{path}: no module of that name; known are {', '.join(sorted(RUNNERS))}")
    return RUNNERS[max(names, key=len)]


def compare(got: np.ndarray, expected: np.ndarray) -> tuple[float, bool]:
    """(relative error, False), or for integers and 0/1 matrices (share of identical entries, True)."""
    if got.shape != expected.shape and got.size == expected.size and expected.ndim > 2:
        expected = to_nhwc(expected) if to_nhwc(expected).shape == got.shape else to_tokens(expected)
    if got.shape != expected.shape:
        raise ValueError(f"shape {got.shape}, but the reference has {expected.shape}")
    if np.issubdtype(got.dtype, np.integer):
        return float(np.mean(got == expected)), True
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    scale = np.abs(expected).max() or 1.0
    return float(np.abs(got - expected).max() / scale), False


def check(path: Path) -> dict[str, tuple[float, bool]]:
    """(value, exact) of each output of one golden file; see `compare`.

    Raises:
      ValueError: the file cannot be read, lacks something, or does not fit a module of ours.
    """
    if path.name == "tome_schedule.json":
        return check_schedules(path)
    runner = runner_for(path)
    tensors, metadata = read_safetensors(path)
    expected = parts(tensors, "out")
    if not expected:
        raise ValueError(f"{path}: no out/... among its {len(tensors)} tensors")
    try:
        config = json.loads(metadata["config"])
        got = runner(config, parts(tensors, "param"), parts(tensors, "in"))
        return {name: compare(np.asarray(got[name]), expected[name]) for name in expected}
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing, from the file or from the module's outputs") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_schedules(path: Path) -> dict[str, tuple[float, bool]]:
    """The same for a JSON file of merge counts under "raw->kept/layers"."""
    result = {}
    for name, entry in json.loads(path.read_text()).items():
        raw, kept, layers = map(int, name.replace("->", "/").split("/"))
        counts = np.asarray(tome.merge_counts(raw, kept, layers))
        result[name] = compare(counts, np.asarray(entry["per_layer"]))
    return result


def good(value: float, exact: bool) -> bool:
    """Whether one compared output passes."""
    return value == 1.0 if exact else value <= TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    jax.config.update("jax_default_matmul_precision", "highest")
    failed = 0
    for path in parser.parse_args(argv).files:
        try:
            compared = check(path)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        for name, (value, exact) in compared.items():
            passed = good(value, exact)
            failed += not passed
            text = f"{100 * value:7.3f} % identical" if exact else f"{value:.2e} relative error"
            print(f"{path.stem:24} {name:20} {text}{'' if passed else '   FAILED'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
