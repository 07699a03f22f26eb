"""Processes that find each other, supervisors that restart and stop them, and mismatches that are found."""

import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from run_tools import logged
from several_tools import ROOT, coordinator, ended, environment, launched

from runtime_jax.hosts import HostsError, Processes, find, start

TOY = str(ROOT / "tests" / "toy_run.py")


def toy(processes, folder, how="whole", when="0", options=()):
    """A run of the toy."""
    return launched(processes, [TOY, str(folder), how, when], options)


def final(folder):
    with np.load(folder / "final.npz") as arrays:
        return dict(arrays)


def test_restarts_finish_the_run(tmp_path):
    code, _, err = ended(toy(2, tmp_path / "whole"))
    assert code == 0, err
    code, _, err = ended(toy(2, tmp_path / "killed", "in-save-once", "12", ["--restarts", "1"]))
    assert code == 0, err
    says = [line for line in err.splitlines() if line.startswith("launch.run")]
    lost = r"launch.run: process 0 of 2 on \S+ \(pid \d+\) was lost \(SIGKILL\)"
    resumes = f"; the same command resumes from {tmp_path}/killed/checkpoints/6"
    assert re.fullmatch(lost + re.escape(resumes), says[0]) and says[1] == "launch.run: starting again (1 of 1)"
    assert len(says) == 2 and "Check failure stack trace" not in err
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    ours, theirs = final(tmp_path / "killed"), final(tmp_path / "whole")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_commands_for_one_process_say_so():
    own = {"JAX_COORDINATOR_ADDRESS": "localhost:23491", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    command = [sys.executable, "-m", "mergevq_jax.cli", "reconstruct", "nothing.png"]
    done = subprocess.run(command, cwd=ROOT, env=environment() | own, capture_output=True, text=True)
    assert done.returncode == 1 and "this command runs as one process" in done.stderr


def test_processes_of_different_programs_are_refused(tmp_path):
    address = coordinator()

    def one(index, how):
        own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        command = [sys.executable, TOY, str(tmp_path), how, "0"]
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


@pytest.mark.parametrize(
    ("index", "message"),
    [(0, "process 1, 2 of 3 did not come within 1 s"), (1, "no coordinator at localhost:{port} within 1 s")],
)
def test_processes_that_do_not_come(index, message):
    address = coordinator()
    with pytest.raises(HostsError, match=message.format(port=address.split(":")[1])):
        start(Processes(address, 3, index), ["program"], timeout=1.0)


def test_the_last_lines_of_a_process_are_printed():
    """To a reader that is slower than the processes: when they have ended, the pipes are full."""
    script = "seq 10000; echo last of $JAX_PROCESS_ID"
    command = [sys.executable, "-m", "launch.run", "--processes", "2", "--", "sh", "-c", script]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    lines = run.communicate(timeout=60)[0].splitlines()
    assert run.returncode == 0 and len(lines) == 20002
    assert {"[0] last of 0", "[1] last of 1"} <= set(lines)


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
