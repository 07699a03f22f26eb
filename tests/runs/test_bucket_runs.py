"""Whole runs in a bucket: the same results as on a disk, also after a kill."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import toy_run

from runtime_jax.files import buckets, local
from runtime_jax.training.checkpoint import Checkpointer

# A read that fails leaves futures in Orbax that nobody waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def lines(workdir) -> list[dict]:
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on the disk that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    toy_run.train(workdir, 20)
    return workdir


def assert_same_run(got, want) -> None:
    with np.load(local(got / "final.npz")) as a, np.load(want / "final.npz") as b:
        assert set(a.files) == set(b.files)
        for key in b.files:
            np.testing.assert_array_equal(a[key], b[key])
    assert lines(got) == lines(want)


def killed(workdir, how: str, when: int) -> None:
    command = [sys.executable, toy_run.__file__, str(workdir), how, str(when)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(("how", "when"), [("in-step", 16), ("in-save", 12)])
def test_a_killed_run_goes_on_bit_equal(bucket_folder, whole, capsys, caplog, how, when):
    workdir = bucket_folder / how
    killed(workdir, how, when)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        newest = checkpointer.latest()
    found = {name.split("/")[1] for name in buckets.objects(workdir) if name.startswith("checkpoints/")}
    if how == "in-save":  # in a bucket, an unfinished checkpoint has its final name
        assert newest == 6 and found == {"6", "12"}
    toy_run.train(workdir, 20)
    assert f"origin: own checkpoint {workdir}/checkpoints/{newest}" in capsys.readouterr().out
    warned = f"passing over half-written checkpoint {workdir}/checkpoints/12" in caplog.text
    assert warned or how == "in-step"
    assert_same_run(workdir, whole)
    events = [name for name in buckets.objects(workdir) if name.startswith("tensorboard/events")]
    assert len(events) == 2 and all(buckets.objects(workdir)[name]["size"] > 500 for name in events)


def test_a_damaged_checkpoint_is_set_aside(bucket_folder, caplog):
    toy_run.train(bucket_folder, 12)
    data = [name for name in buckets.objects(bucket_folder) if name.startswith("checkpoints/12/state/")]
    for name in data:
        if "/d/" in name:
            buckets.remove(bucket_folder / name)
    toy_run.train(bucket_folder, 12)
    assert f"passing over damaged checkpoint {bucket_folder}/checkpoints/12" in caplog.text
    assert any(name.startswith("checkpoints/12.damaged/") for name in buckets.objects(bucket_folder))
    with Checkpointer(bucket_folder, read_only=True) as checkpointer:
        assert checkpointer.steps() == [6, 12]
