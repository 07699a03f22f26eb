"""Which package may import which, and what importing one must not do."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("runtime_jax", "mini_scenes", "mergevq_jax", "tokenverse_jax", "launch")
FORBIDDEN = {
    "runtime_jax": {"mini_scenes", "mergevq_jax", "tokenverse_jax", "launch"},
    "mini_scenes": {"mergevq_jax", "tokenverse_jax", "launch"},
    "mergevq_jax": {"tokenverse_jax", "launch"},
    "tokenverse_jax": {"mergevq_jax", "launch"},
    "launch": set(),
}
HEAVY = {"torch", "torchvision", "tensorflow", "clu", "kauldron"}


# Floors of a package, from the ground up; what is not named lies on the ground. Arrows go down only.
FLOORS = {
    "runtime_jax": (("weights", "nn", "data", "pictures"), ("networks", "training"), ("cli",)),
    "mini_scenes": (("judge",), ("command",)),
    "mergevq_jax": (
        ("tokenizer",),
        ("tokens_folder",),
        ("generator",),
        ("commands",),
        ("cli", "__init__"),
    ),
    "tokenverse_jax": (("flux",), ("concepts",), ("base", "bench", "evaluate", "commands"), ("cli", "__init__")),
    "launch": (),
}
MOST_FILES = 14  # in one folder of a package


def imported(tree: ast.AST, package: str) -> set[str]:
    """Top-level packages that a module imports anywhere in it, by statement or by name; `package` is its own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "lazy_import"):
                names.add(node.args[0].value)
    return {name.split(".")[0] for name in names}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_walk_finds_every_kind_of_import():
    source = """
import a.b, c as d
from e.f import g
from . import h
def function():
    import i
    from j import k
    importlib.import_module("l.m")
    __import__("n")
"""
    assert imported(ast.parse(source), "own") == {"a", "c", "e", "own", "i", "j", "l", "n"}


@pytest.mark.parametrize("package", [package for package in PACKAGES if modules(package)])
def test_packages_keep_to_the_import_rule(package):
    wrong = {}
    for path in modules(package):
        found = imported(ast.parse(path.read_text()), package) & (FORBIDDEN[package] | HEAVY)
        if found:
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


def own_imports(path: Path, package: str) -> set[str]:
    """The rooms of its own package that a module imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            rooms |= {alias.name for alias in node.names}
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return rooms


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_points_up(package):
    floor = {room: number for number, rooms in enumerate(FLOORS[package], 1) for room in rooms}
    assert all((ROOT / package / room).exists() or (ROOT / package / f"{room}.py").exists() for room in floor)
    wrong = {}
    for path in modules(package):
        room = path.relative_to(ROOT / package).with_suffix("").parts[0]
        above = {other for other in own_imports(path, package) if floor.get(other, 0) > floor.get(room, 0)}
        if above:
            wrong[str(path.relative_to(ROOT))] = above
    assert not wrong


def test_no_folder_is_too_long():
    folders = {path.parent for package in PACKAGES for path in modules(package)}
    assert {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES} == {}


def test_the_rule_covers_every_package():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(PACKAGES)


PROBE = """
import importlib, json, os, pkgutil, sys
import jax  # sets two variables itself
before = dict(os.environ)
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from jax._src import xla_bridge
print(json.dumps({
    "heavy": sorted(set(sys.argv[2].split(",")) & set(sys.modules)),
    "backends": sorted(xla_bridge._backends),
    "environment": sorted(key for key in os.environ.keys() | before.keys() if os.environ.get(key) != before.get(key)),
    "modules": len([name for name in sys.modules if name.startswith(sys.argv[1] + ".")]),
}))
"""


@pytest.mark.parametrize("package", [package for package in PACKAGES if modules(package)])
def test_importing_everything_starts_nothing(package, tmp_path):
    command = [sys.executable, "-c", PROBE, package, ",".join(sorted(HEAVY))]
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] >= len(modules(package)) - 3
    assert (found["heavy"], found["backends"], found["environment"]) == ([], [], [])
    assert [path.name for path in tmp_path.rglob("*")] == []
