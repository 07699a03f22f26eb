"""`make gpu-check` at toy sizes, so that nothing has to be mended on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]


def run(*options: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run([*SCRIPT, *options], capture_output=True, text=True, env=env)


def test_every_section_has_rows(tmp_path):
    done = run("--toy", "--out", str(tmp_path / "toy.json"))
    assert done.returncode == 0, done.stderr
    sections = json.loads((tmp_path / "toy.json").read_text())["sections"]
    assert [row["name"] for row in sections["tokenizer"]["rows"]] == ["encode", "decode", "train"]
    assert sections["personalisation"]["rows"][0]["seconds"] > 0
    assert {row.get("name") for row in sections["mergear"]["rows"]} >= {"plain", "MergeAR, K = 9"}
    assert sections["attention"]["rows"][0]["backend"] == "xla"


def test_what_was_not_run_is_told(tmp_path):
    done = run("--toy", "--only", "attention", "--minutes", "-1", "--out", str(tmp_path / "toy.json"))
    assert done.returncode == 1 and "without attention" in done.stdout
    found = json.loads((tmp_path / "toy.json").read_text())
    assert found["sections"]["attention"]["skipped"] == "-1 minutes were over" and found["platform"] == "cpu"


def test_a_cpu_is_refused(tmp_path):
    done = run("--out", str(tmp_path / "none.json"))
    assert done.returncode == 2 and "JAX finds no GPU here; --toy tries the script on a CPU" in done.stderr
