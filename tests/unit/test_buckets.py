"""Files in a bucket: written whole, copied where a local file is needed, locked; and errors that say what to do."""

import functools
import json
import os
import subprocess
import sys
import threading

import pytest

from runtime_jax.files import buckets, local, object_lock, owner, path_of, remove_tree, replacing, size_of, write_text
from runtime_jax.files.buckets import BucketError
from runtime_jax.workdir import LOCK_NAME, WorkdirError, check_output, only_writer


@pytest.fixture
def folder(bucket_folder):
    return bucket_folder


def names(folder) -> list[str]:
    return list(buckets.objects(folder))


def test_an_object_is_written_whole_or_not_at_all(folder):
    write_text(folder / "a" / "notes.txt", "whole")
    assert (folder / "a" / "notes.txt").read_text() == "whole" and size_of(folder / "a" / "notes.txt") == 5
    with pytest.raises(ValueError, match="midway"), replacing(folder / "a" / "notes.txt") as new:
        new.write_text("half of a new")
        raise ValueError("midway")
    assert (folder / "a" / "notes.txt").read_text() == "whole"
    assert names(folder) == ["a/notes.txt"] and size_of(folder / "none") == 0
    remove_tree(folder)
    remove_tree(folder)
    assert names(folder) == []


def test_local_copies(folder):
    for name in ("one/a.txt", "one/b.bin", "one/deep/c.txt", "one2/d.txt"):
        write_text(folder / name, name)
    copy = local(folder / "one")
    assert {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*.*")} == {
        name: f"one/{name}" for name in ("a.txt", "b.bin", "deep/c.txt")
    }
    assert local(folder / "one") == copy  # kept
    assert sorted(path.name for path in local(folder / "one", ("*.txt",)).rglob("*.*")) == ["a.txt", "c.txt"]
    assert local(folder / "one" / "a.txt").name == "a.txt"
    write_text(folder / "one" / "a.txt", "other")
    assert (local(folder / "one") / "a.txt").read_text() == local(folder / "one" / "a.txt").read_text() == "other"
    assert (copy / "a.txt").read_text() == "one/a.txt"  # who reads the old copy keeps it
    with pytest.raises(FileNotFoundError, match="no such object or folder"):
        local(folder / "none")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        local(folder / "one", ("*.json",))


def test_a_copy_needs_room_on_the_disk(folder, monkeypatch):
    write_text(folder / "a.txt", "a" * 2**20)
    usage = type("Usage", (), {"free": 2**19})
    monkeypatch.setattr(buckets.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BucketError, match=r"disk full: 1.0 MiB are copied to .*, where 0.5 MiB are free; or mount"):
        local(folder)


def test_a_folder_is_moved_also_in_two_goes(folder):
    for name in ("old/a", "old/b/c"):
        write_text(folder / name, name)
    write_text(folder / "new" / "a", "old/a")  # moved before an interruption
    (folder / "old" / "a").unlink()
    buckets.move(folder / "old", folder / "new")
    assert names(folder) == ["new/a", "new/b/c"] and (folder / "new" / "b" / "c").read_text() == "old/b/c"


def hold(folder) -> subprocess.Popen:
    """Another process that has the lock."""
    program = (
        "import sys\nfrom runtime_jax.workdir import only_writer\nsys.argv[0] = 'mergevq'\n"
        "with only_writer(sys.argv[2]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, "train", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_run_at_a_time_and_a_killed_one_is_taken_over(folder, monkeypatch):
    monkeypatch.setattr(object_lock, "SETTLE", 0.1)
    process = hold(folder)
    try:
        message = f"{folder}: another run is writing there: mergevq train on host .*, process {process.pid}, since"
        with pytest.raises(WorkdirError, match=message), only_writer(folder):
            pass
    finally:
        process.kill()
        process.wait()
    assert names(folder) == [LOCK_NAME]
    with only_writer(folder) as held:
        assert held == folder and json.loads(buckets.read(folder / LOCK_NAME))["process"] == os.getpid()
        with pytest.raises(WorkdirError, match=f"process {os.getpid()}, since"), only_writer(folder):
            pass
    assert names(folder) == []


def other_machine(heard: float) -> dict:
    fields = {"command": "tokenverse learn", "host": "node7", "process": 1, "since": "2026-01-02", "run": "other"}
    return fields | {"machine": "another", "heard": heard}


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_machine_has_time_for_a_sign_of_life(folder, monkeypatch, alive):
    for module, name, value in ((object_lock, "SETTLE", 0.1), (owner, "SILENCE", 1.0), (owner, "BEAT", 0.2)):
        monkeypatch.setattr(module, name, value)
    lock = folder / LOCK_NAME
    now = object_lock.time.time()
    buckets.write(lock, json.dumps(other_machine(now)).encode())
    if not alive:
        with only_writer(folder):
            assert json.loads(buckets.read(lock))["process"] == os.getpid()
        assert names(folder) == []
        return
    beat = threading.Timer(0.4, lambda: buckets.write(lock, json.dumps(other_machine(now + 1)).encode()))
    beat.start()
    with pytest.raises(WorkdirError, match="tokenverse learn on host node7"), only_writer(folder):
        pass
    beat.join()
    assert names(folder) == [LOCK_NAME]


def test_a_lock_given_back_while_another_run_waits_is_free(folder, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.2)
    buckets.write(folder / LOCK_NAME, json.dumps(other_machine(object_lock.time.time())).encode())
    end = threading.Timer(0.3, functools.partial(buckets.remove, folder / LOCK_NAME))
    end.start()
    with only_writer(folder):
        pass
    end.join()


def test_of_several_runs_that_start_at_once_one_gets_the_folder(folder, monkeypatch):
    """The same where they all find the lock of a dead run."""
    monkeypatch.setattr(object_lock, "SETTLE", 0.5)
    for dead in (False, True):
        if dead:
            buckets.write(folder / LOCK_NAME, json.dumps(other_machine(heard=0)).encode())
        ended, start, done = [], threading.Barrier(4), threading.Barrier(4)

        def run(ended=ended, start=start, done=done):
            start.wait()
            try:
                with object_lock.held(folder / LOCK_NAME):
                    ended.append("held")
                    done.wait()
            except WorkdirError as error:
                ended.append(str(error))
                done.wait()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended.count("held") == 1 and len(ended) == 4
        assert names(folder) == []


def test_signs_of_life_and_a_lock_that_was_lost(folder, monkeypatch, caplog):
    monkeypatch.setattr(owner, "BEAT", 0.05)
    lock = folder / LOCK_NAME
    with only_writer(folder):
        first = json.loads(buckets.read(lock))["heard"]
        end = object_lock.time.monotonic() + 10
        while json.loads(buckets.read(lock))["heard"] == first:
            assert object_lock.time.monotonic() < end
        other = json.dumps(other_machine(0)).encode()
        while "another one took it over: tokenverse learn on host node7" not in caplog.text:
            buckets.write(lock, other)
            assert object_lock.time.monotonic() < end
            object_lock.time.sleep(0.1)
    assert buckets.read(lock) == other  # it is not this run's to remove


def test_a_bucket_that_does_not_exist(bucket):
    with pytest.raises(BucketError, match=r"^gs://no-such-bucket/run: no such bucket$"):
        check_output("gs://no-such-bucket/run")


PROGRAM = """
import sys
from runtime_jax.workdir import check_output
try:
    check_output(sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""


def said(url: str, **environment: str) -> str:
    """The error of a check in a new process without network's help."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-c", PROGRAM, url]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_credentials(tmp_path):
    """gcsfs itself, which finds none: one line, and quickly (without NO_GCE_CHECK it also asks Google's hosts)."""
    message = said("gs://bucket/run", HOME=str(tmp_path), NO_GCE_CHECK="true")
    assert message.startswith("BucketError gs://bucket/run: no credentials found: run `gcloud auth application-default")
    key = tmp_path / "key.json"
    key.write_text('{"type": "service_account"}')
    message = said("gs://bucket/run", HOME=str(tmp_path), NO_GCE_CHECK="true", GOOGLE_APPLICATION_CREDENTIALS=str(key))
    assert message.startswith("BucketError gs://bucket/run: no credentials found")


def test_a_scheme_without_its_library():
    assert said("s3://bucket/run").startswith("BucketError s3://bucket/run: s3:// needs s3fs: pip install s3fs")


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError("Forbidden: https://storage\nno storage.objects.create access"), "permission is missing"),
        (type("HttpError", (Exception,), {"code": 401})("Anonymous caller"), "no valid credentials: run `gcloud auth"),
        (type("ClientError", (OSError,), {})("Cannot connect to host"), "the bucket cannot be reached"),
    ],
)
def test_errors_of_the_libraries_are_one_line(error, expected):
    path = path_of("gs://bucket/run")
    with pytest.raises(BucketError, match=f"^gs://bucket/run: {expected}") as caught, buckets.explained(path):
        raise error
    assert "\n" not in str(caught.value)
