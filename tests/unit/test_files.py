"""Files that are written whole."""

import os
import stat

import numpy as np
import pytest

from runtime_jax.files import replacing, write_text
from runtime_jax.weights import write_safetensors


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_of_other_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "text", "whole")
        write_safetensors(tmp_path / "weights", {"x": np.zeros(2)}, {"a": "1", "b": "2"})
        with replacing(tmp_path / "private") as new:
            new.chmod(0o600)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    write_text(tmp_path / "text", "whole")
    with pytest.raises(ValueError, match="half"), replacing(tmp_path / "text") as new:
        new.write_text("ha")
        raise ValueError("half")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
