"""Golden files that are made anew pass their check."""

import json

import check_golden
import make_goldens
import pytest

from runtime_jax.weights import read_safetensors


@pytest.mark.parametrize("name", sorted(make_goldens.MAKERS))
def test_a_new_golden_file_passes(tmp_path, goldens, name):
    path = make_goldens.make(name, tmp_path, seed=1)
    compared = check_golden.check(path)
    assert compared and all(check_golden.good(*result) for result in compared.values()), compared
    (new, metadata), (old, old_metadata) = read_safetensors(path), read_safetensors(goldens / path.name)
    assert {key: (value.shape, value.dtype) for key, value in new.items()} == {
        key: (value.shape, value.dtype) for key, value in old.items()
    }
    assert json.loads(metadata["config"]) == json.loads(old_metadata["config"])
