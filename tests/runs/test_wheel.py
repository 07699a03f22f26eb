"""The wheel, installed and used in an empty folder."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mergevq_jax", "mini_scenes", "runtime_jax", "tokenverse_jax")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FEW_STEPS = ("stage_1.steps=2", "stage_2.steps=0", "isolation=None", "batch_size=1", "optimizer.warmup.steps=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command of the installed package in an empty folder."""
    tmp = tmp_path_factory.mktemp("wheel")
    source, site, empty = (tmp / name for name in ("source", "site", "empty"))
    for name in (*PACKAGES, "configs"):  # a copy, as setuptools writes beside its sources
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    # setuptools is of the extra `test`; older environments fetch it from PyPI.
    offline = int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", tmp, source]
    subprocess.run([*build, *(["--no-build-isolation"] if offline else [])], check=True)
    (wheel,) = tmp.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", site, wheel], check=True)
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def command(program, *args):
        called = [sys.executable, str(site / "bin" / program), *args]
        return subprocess.run(called, capture_output=True, text=True, cwd=empty, env=environment)

    command.site = site
    return command


def test_the_wheel_has_every_config_and_nothing_on_top_that_could_be_anybodys(run):
    top = {path.name for path in run.site.iterdir() if path.suffix != ".dist-info"}
    assert top == {*PACKAGES, "tokenverse_mergevq_configs", "bin"}
    shipped = {path.name for path in (run.site / "tokenverse_mergevq_configs").iterdir()}
    assert shipped == {path.name for path in (ROOT / "configs").glob("*.py")}


def test_a_config_by_name_in_an_empty_folder(run):
    done = run("mergevq", "inspect", "--config", "mergevq_tiny")
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr


def test_learning_from_a_shipped_example(run):
    steps = [f"--config.learn.{override}" for override in FEW_STEPS]
    settings = ["--config", "tokenverse_tiny:star", "--workdir", "runs/star", "--config.prompts=()", *steps]
    done = run("tokenverse", "learn", *settings)
    assert done.returncode == 0 and "concept.safetensors" in done.stdout, done.stderr


def test_a_name_that_is_not_there(run):
    done = run("mergevq", "train", "--config", "mergevq_tinny:demo", "--workdir", "x")
    assert done.returncode == 1 and done.stderr.startswith("mergevq train: mergevq_tinny:demo: no config is named")
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert f"did you mean 'mergevq_tiny'?; by name there are {', '.join(names)};" in done.stderr
