"""The notebooks of colab/: their committed form, and each executed top to bottom on the tiny models."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import notebook
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
URL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Repository")

# Values of form fields that make a notebook short, and how many pictures it shows.
SHORT = {
    "mergevq": ({"keeps": "64, 144", "classes": "star, heart", "steps": "4"}, 5),
    "research": ({"steps": 2, "num_images": 8, "batch_size": 2, "offsets_steps": 2, "offsets_batch": 2}, 3),
    "tokenverse": (
        {
            "steps": 3,
            "steps_per_block": 2,
            "images_for_isolation": 1,
            "num": 1,
            "strengths": "0, 1",
            "direction_strengths": "8",
        },
        4,
    ),
}


def book(path):
    return json.loads(path.read_text())


def test_all_notebooks_are_executed():
    assert {path.stem for path in NOTEBOOKS} == set(SHORT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_form(path):
    whole = book(path)
    cells = whole["cells"]
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5) and len(cells) <= 25
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in cells:
        own = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | own
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert sum("%pip install" in source for source in notebook.code_cells(path).values()) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_and_install_cell_follow_the_projects_url(path):
    """Without [project.urls] Repository in pyproject.toml, Colab asks for the repository, and so does the field."""
    link = URL.replace("https://github.com", "") + f"/blob/main/colab/{path.name}" if URL else "/"
    badge = f"(https://colab.research.google.com/github{link})"
    title = "".join(book(path)["cells"][0]["source"])
    assert badge in title and badge in (ROOT / "README.md").read_text()
    assert notebook.fields(notebook.code_cells(path)[notebook.INSTALL])["source"] == (f"git+{URL}" if URL else "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_have_fields_and_call_the_library_alone(path):
    cells = notebook.code_cells(path)
    install = cells.pop(notebook.INSTALL)
    assert sum(len(notebook.fields(source)) for source in cells.values()) >= 8
    assert not re.search(r"^\s*[!%]", "\n".join(cells.values()), re.MULTILINE)
    assert not re.search(r"argparse|subprocess|os\.system|cli\b|torch", "\n".join(cells.values()))
    for source in cells.values():
        ast.parse(source)
    assert ["%pip" in line for line in install.splitlines()].count(True) == 1


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs_top_to_bottom(name, tmp_path):
    """In an empty folder, without network; the programs are compiled as those of the other tests are."""
    values, pictures = SHORT[name]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", ""),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "HF_HUB_OFFLINE": "1",
        "https_proxy": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }
    command = [sys.executable, ROOT / "tests" / "notebook.py", ROOT / "colab" / f"{name}.ipynb"]
    command += [*(f"{field}={value}" for field, value in values.items()), "--out", tmp_path / "all.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "runs on CPU: " in done.stdout and f"{pictures} pictures" in done.stdout
    assert (tmp_path / "all.png").stat().st_size > 10_000
