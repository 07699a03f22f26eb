"""Runs of several real processes: equal to one process, resumed after kills and signals, mismatches found."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq_jax.tokens_folder import read_tokens
from runtime_jax.hosts import HostsError, find

ROOT = Path(__file__).parents[2]
TOY = [sys.executable, str(ROOT / "tests" / "toy_run.py")]


def environment(devices=2):
    """Of this test, with so many devices for each process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def coordinator():
    """An address with a free port and a free one after it: tests run side by side."""
    while True:
        with socket.create_server(("localhost", 0)) as first:
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("localhost", port + 1)):
                return f"localhost:{port}"


def launched(processes, folder, how="whole", when="0", options=()):
    """A run under launch.run."""
    command = [sys.executable, "-m", "launch.run", "--processes", str(processes), "--timeout", "60"]
    command += ["--coordinator", coordinator(), *options, "--", *TOY, str(folder), how, when]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(4 // processes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def metrics(folder):
    """Logged numbers by step, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def final(folder):
    with np.load(folder / "final.npz") as arrays:
        return dict(arrays)


def assert_close(folder, other, tolerance):
    for mine, theirs in zip(metrics(folder), metrics(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(np.isclose(mine[name], theirs[name], rtol=tolerance, atol=tolerance) for name in mine)
    arrays, others = final(folder), final(other)
    for name in arrays:
        np.testing.assert_allclose(arrays[name], others[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run by one process, and by two."""
    root = tmp_path_factory.mktemp("several")
    for count in (1, 2):
        code, _, err = ended(launched(count, root / str(count)))
        assert code == 0, err
    return root


def test_two_processes_equal_one(whole):
    assert_close(whole / "2", whole / "1", 1e-6)  # 1e-7


@pytest.mark.parametrize(("how", "when"), [("in-step", "15"), ("in-save", "12")])
def test_a_killed_process_ends_the_run_which_resumes(whole, tmp_path, how, when):
    folder = tmp_path / "killed"
    code, _, err = ended(launched(2, folder, how, when))
    victim = 1 if how == "in-step" else 0
    lines = [line for line in err.splitlines() if line.startswith("launch.run")]
    lost = rf"launch.run: process {victim} of 2 on \S+ \(pid \d+\) was lost \(SIGKILL\)"
    assert code == 75 and len(lines) == 1 and re.match(lost, lines[0])
    # A checkpoint is written while training goes on, so that of step 12 may be missing at step 15.
    saved = re.search(rf"; the same command resumes from {folder}/checkpoints/(6|12)$", lines[0])[1]
    assert saved == "6" or how == "in-step"
    assert "Check failure stack trace" not in err
    for count, tolerance in ((2, 0.0), (1, 1e-6)):
        again = tmp_path / str(count)
        subprocess.run(["cp", "-r", folder, again], check=True)
        code, out, err = ended(launched(count, again))
        assert code == 0 and f"origin: own checkpoint {again}/checkpoints/{saved}" in out, err
        assert_close(again, whole / "2", tolerance)


def test_restarts_finish_the_run(whole, tmp_path):
    code, _, err = ended(launched(2, tmp_path, "in-save-once", "12", ["--restarts", "1"]))
    assert "starting again (1 of 1)" in err and code == 0
    assert_close(tmp_path, whole / "2", 0.0)


def test_sigterm_saves_on_all_processes(whole, tmp_path):
    run = launched(2, tmp_path, "slowly", "0.5", ["--restarts", "3"])
    while not (tmp_path / "checkpoints" / "6").is_dir():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    code, out, err = ended(run)
    assert code == 143 and "starting again" not in err, err
    step = int(re.search(r"SIGTERM: stopped after step (\d+), saved", out)[1])
    assert 6 <= step < 20
    code, out, _ = ended(launched(2, tmp_path))
    assert code == 0 and f"checkpoints/{step}" in out
    assert_close(tmp_path, whole / "2", 0.0)


def test_two_processes_tokenize_as_one(tmp_path):
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    records = []
    for count in (1, 2):
        out = tmp_path / str(count)
        command = [sys.executable, "-m", "launch.run", "--processes", str(count), "--coordinator", coordinator()]
        command += ["--", sys.executable, "-m", "mergevq_jax.cli", "tokenize", "--folder", str(tmp_path / "pictures")]
        command += ["--out", str(out), "--shard-size", "3", "--batch-size", "3", "--keep", "144"]
        done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "10 images in 4 shards" in done.stdout, done.stderr
        records.append(list(read_tokens(out)))
    for one, two in zip(*records, strict=True):
        assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def test_commands_for_one_process_say_so():
    own = {"JAX_COORDINATOR_ADDRESS": "localhost:23491", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    command = [sys.executable, "-m", "mergevq_jax.cli", "reconstruct", "nothing.png"]
    done = subprocess.run(command, cwd=ROOT, env=environment() | own, capture_output=True, text=True)
    assert done.returncode == 1 and "this command runs as one process" in done.stderr


def test_processes_of_different_programs_are_refused(tmp_path):
    address = coordinator()

    def one(index, how):
        own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        command = [*TOY, str(tmp_path), how, "0"]
        return subprocess.Popen(command, env=environment() | own, stderr=subprocess.PIPE, text=True)

    runs = [one(0, "whole"), one(1, "slowly")]
    for run in runs:
        _, err = run.communicate(timeout=60)
        assert run.returncode == 1 and "process 1 runs something else than process 0" in err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "process 2 of 2"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "'a': HOST:PORT is needed"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "1"}, "a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "give the address of rank 0"),
    ],
)
def test_environments_that_do_not_say_enough(variables, message):
    with pytest.raises(HostsError, match=message):
        find(variables)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, ("a:12421", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, None),
        (
            {
                "TPU_WORKER_HOSTNAMES": "c,d",
                "TPU_WORKER_ID": "1",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "a:8080",
            },
            ("a:12421", 4, 3),
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[07-09]"},
            ("gpu07:12421", 3, 2),
        ),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu1"}, None),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "JAX_COORDINATOR_ADDRESS": "n1:5"},
            ("n1:5", 2, 1),
        ),
    ],
)
def test_environments(variables, expected):
    assert find(variables) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no command"),
        (["--hosts", "2", "--host", "2", "--", "true"], "--host 2: 0 to 1"),
        (["--coordinator", "here", "--", "true"], "HOST:PORT is needed"),
        (["--processes", "0", "--", "true"], "at least 1"),
    ],
)
def test_bad_options_of_the_launcher(options, message, capsys):
    from launch.run import main

    assert main(options) == 2 and message in capsys.readouterr().err


def test_two_hosts_and_one_that_is_lost():
    """Supervisors on two hosts, here the same one: the loss of a process on one ends the other."""

    address = coordinator()

    def host(number, seconds, then):
        command = [sys.executable, "-m", "launch.run", "--hosts", "2", "--host", str(number), "--timeout", "10"]
        script = f"sleep $((JAX_PROCESS_ID * {seconds})); {then}"
        command += ["--coordinator", address, "--", "sh", "-c", script]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)

    runs = [host(number, 60, "[ $JAX_PROCESS_ID = 1 ] || kill -9 $$") for number in (0, 1)]
    for run in runs:
        _, err = run.communicate(timeout=30)
        assert run.returncode == 75 and "process 0 of 2" in err and "was lost (SIGKILL)" in err
    runs = [host(number, 1, "exit 0") for number in (0, 1)]
    assert [run.wait(timeout=30) for run in runs] == [0, 0]


def test_a_signal_to_one_host_stops_all_and_none_starts_again(tmp_path):
    script = "trap 'exit 143' TERM; touch $0/$JAX_PROCESS_ID; while true; do sleep 0.1; done"
    address, runs = coordinator(), []
    for number in (0, 1, 2):
        command = [sys.executable, "-m", "launch.run", "--hosts", "3", "--host", str(number), "--timeout", "30"]
        command += ["--restarts", "2", "--coordinator", address, "--", "sh", "-c", script, str(tmp_path)]
        runs.append(subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True))
    while not all((tmp_path / str(number)).exists() for number in (0, 1, 2)):
        time.sleep(0.1)
    runs[1].send_signal(signal.SIGTERM)
    for run in runs:
        _, err = run.communicate(timeout=60)
        assert run.returncode == 143 and "starting again" not in err, err


def test_a_host_that_does_not_come(capsys):
    from launch.run import main

    address = coordinator()
    options = ["--hosts", "2", "--timeout", "1", "--coordinator", address, "--", "true"]
    assert main(options) == 75 and "process 1 of 2 did not come within 1 s" in capsys.readouterr().err
    assert main([*options[:2], "--host", "1", *options[2:]]) == 75
    assert f"no coordinator at localhost:{int(address.split(':')[1]) + 1} within 1 s" in capsys.readouterr().err
