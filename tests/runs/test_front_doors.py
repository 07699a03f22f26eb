"""What a user meets first: README's examples run, packages name what they have, help tells shapes and errors."""

import importlib
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


EXCHANGED = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
# Run after the examples of docs/extend.md: what they added works.
USE = """
import dataclasses
from mergevq_jax import Tokenizer, init_params, load_tokenizer

assert samples.indices.shape == (2, 256) and samples.kept[:, 0].all()
assert images.shape == (1, 64, 64, 3)
tiny = load_tokenizer("tiny")
tokens = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, merge_rule="next")).encode(images)
assert max(tokens.source_map[0].tolist()) == 143
config = dataclasses.replace(tiny.config, quantizer="fsq", z_channels=7)
tokens = Tokenizer(config, init_params(config, jax.random.key(0))).encode(images)
assert 0 <= tokens.indices.min() <= tokens.indices.max() < 3**7
"""


def test_readme_has_an_example_for_each_method():
    assert [re.search(r"from (\w+)_jax", example)[1] for example in EXAMPLES] == ["mergevq", "tokenverse"]
    assert all(len(example.strip().splitlines()) <= 14 for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=["mergevq", "tokenverse"])
def test_an_example_of_the_readme_runs_as_it_stands(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing is
    names: dict = {}
    exec(example, names)
    images = names["drawn"] if "drawn" in names else names["images"]
    assert images.shape == (2, 64, 64, 3) and images.dtype == "uint8" and images.std() > 10


def test_the_examples_of_exchanged_parts_run_as_they_stand():
    """In a process of their own, since they add to tables."""
    code = "\n".join([*EXCHANGED, USE])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["mergevq_jax", "tokenverse_jax", "mini_scenes", "mini_scenes.judge"])
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(dir(module)) and all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mergevq_jax.encode", ("B H W 3", "[-1, 1]", "Raises:")),
        ("mergevq_jax.load_tokenizer", ("Raises:", "hub id")),
        ("tokenverse_jax.learn_concepts", ("H W 3", "pixels", "Raises:")),
        ("tokenverse_jax.generate", ("N H W 3", "pixels", "Raises:")),
    ],
)
def test_help_tells_shapes_units_and_errors(name, told):
    package, _, attribute = name.rpartition(".")
    text = pydoc.render_doc(getattr(importlib.import_module(package), attribute), renderer=pydoc.plaintext)
    assert all(each in text for each in told)


def test_importing_a_package_or_asking_for_help_imports_no_jax():
    for statement in ("import mergevq_jax, tokenverse_jax", "from mergevq_jax import cli; cli.main(['--help'])"):
        code = f"import sys, atexit; atexit.register(lambda: print('jax' in sys.modules)); {statement}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.splitlines()[-1] == "False"
