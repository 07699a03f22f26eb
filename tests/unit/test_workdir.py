"""Folders that are written: found out before anything is done, and one run at a time."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from runtime_jax import workdir
from runtime_jax.files import owner as owner_lib
from runtime_jax.files.buckets import BucketError
from runtime_jax.workdir import (
    LOCK_NAME,
    WorkdirError,
    check_output,
    only_writer,
    output_folder,
)

HOLD = """
import sys
from runtime_jax.workdir import only_writer
sys.argv[0] = "/usr/bin/mergevq"
with only_writer(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has the lock, as `mergevq train` would."""
    command = [sys.executable, "-c", HOLD, "train", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def owner(tmp_path):
    process = hold(tmp_path)
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_by_whom(tmp_path, owner):
    pattern = rf"{tmp_path}: another run is writing there: mergevq train on host {os.uname().nodename}, "
    pattern += rf"process {owner.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    with pytest.raises(WorkdirError, match=f"^{pattern}$"), only_writer(tmp_path):
        pass
    owner.communicate("")  # it ends
    with only_writer(tmp_path) as folder:
        assert folder == tmp_path and [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
        with pytest.raises(WorkdirError, match=f"process {os.getpid()}, since"), only_writer(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == owner.pid
    with only_writer(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()


def leave_lock(folder: Path, *, machine: str, process: int, silent: float) -> None:
    """What a run has left that gave no sign of life for so many seconds."""
    fields = {"command": "tokenverse learn", "host": "node7", "process": process, "since": "2026-01-02 03:04:05 UTC"}
    path = folder / LOCK_NAME
    path.write_text(json.dumps(fields | {"machine": machine}))
    os.utime(path, (time.time() - silent, time.time() - silent))


def test_a_run_on_another_machine_counts_as_dead_when_it_is_silent(tmp_path):
    leave_lock(tmp_path, machine="another", process=1, silent=20)
    message = "tokenverse learn on host node7, process 1, since 2026-01-02 03:04:05 UTC; "
    message += "last heard of (19|20|21) s ago; if it is dead, try again after 60 s of silence"
    with pytest.raises(WorkdirError, match=message), only_writer(tmp_path):
        pass
    leave_lock(tmp_path, machine="another", process=1, silent=61)
    with only_writer(tmp_path):
        pass


def test_a_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(owner_lib, "BEAT", 0.01)
    with only_writer(tmp_path):
        os.utime(tmp_path / LOCK_NAME, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / LOCK_NAME).stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_without_locks_of_the_file_system_a_living_process_counts(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    leave_lock(tmp_path, machine=owner_lib.machine(), process=os.getpid(), silent=999)
    with pytest.raises(WorkdirError, match=f"process {os.getpid()}"), only_writer(tmp_path):
        pass
    ended = subprocess.Popen(["true"])
    ended.wait()
    leave_lock(tmp_path, machine=owner_lib.machine(), process=ended.pid, silent=0)
    with only_writer(tmp_path):
        pass


def test_a_lock_file_that_was_cut_short_stops_nobody(tmp_path):
    (tmp_path / LOCK_NAME).write_text('{"host": "no')
    with only_writer(tmp_path):
        pass


def test_a_lock_that_was_removed_after_it_was_opened_is_not_a_lock(tmp_path, monkeypatch):
    """The run before ends between the opening and the locking of its file."""
    path, locks = tmp_path / LOCK_NAME, workdir._flock
    opened = []

    def flock(file, where):
        opened.append(file)
        if len(opened) == 1:
            path.unlink()
        return locks(file, where)

    monkeypatch.setattr(workdir, "_flock", flock)
    with only_writer(tmp_path):
        assert len(opened) == 2 and json.loads(path.read_text())["process"] == os.getpid()


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing"), only_writer(tmp_path / "runs" / "new"):
        raise ValueError("nothing")
    assert not (tmp_path / "runs" / "new").exists()
    (tmp_path / "old").mkdir()
    with only_writer(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()
    with only_writer(tmp_path / "full") as folder:
        (folder / "result").touch()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["result"]


@pytest.mark.parametrize("check", [check_output, output_folder])
def test_what_cannot_be_written(tmp_path, check):
    (tmp_path / "file").touch()
    for bad in ("file", "file/below", "file/further/below"):
        with pytest.raises(WorkdirError, match=rf"{tmp_path / bad}: cannot be written: (File exists|Not a directory)"):
            check(tmp_path / bad)
    with pytest.raises(BucketError, match=r"ftp://host/run: ftp:// is not supported; allowed are gs://"):
        check("ftp://host/run")
    with pytest.raises(BucketError, match=r"gs:/bucket/run: a URL begins with gs://"):
        check(Path("gs://bucket/run"))


def test_a_check_creates_nothing(tmp_path):
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not (tmp_path / "a").exists()
    assert output_folder(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())


def test_two_runs_that_start_at_once(tmp_path):
    """However the two interleave, exactly one of them gets the folder."""
    program = textwrap.dedent("""
        import sys, time
        from runtime_jax.workdir import WorkdirError, only_writer
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            with only_writer(sys.argv[1]):
                time.sleep(1)
            print("wrote")
        except WorkdirError as error:
            print(str(error))
    """)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], **pipes) for _ in range(3)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    said = sorted((run.communicate()[0].strip() for run in runs), key=len)
    assert said[0] == "wrote" and all(re.search("another run is writing there", text) for text in said[1:])
