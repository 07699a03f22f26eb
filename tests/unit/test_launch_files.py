"""What the launchers for TPU VMs, GKE and SLURM would do, and the scripts that they write, run here with stand-ins."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch import gke, slices, slurm, tpu_vm
from launch.common import LaunchError
from runtime_jax.hosts import PORT

ROOT = Path(__file__).parents[2]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
TPU = ["--slice", "v5e:4x4", "--zone", "us-west4-a"]
IMAGE = ["--image", "gcr.io/project/mergevq:tpu"]
# Words that a shell, YAML or Kubernetes would change if they were not quoted.
HARD = [
    "mergevq",
    "train",
    "--config.lpips=('a b','c')",
    "$HOME $(HOSTNAME) $$ `id`",
    'a"b\\',
    "* ; true",
    "no: #x",
    "",
]
LAUNCHERS = {"tpu_vm": tpu_vm, "gke": gke, "slurm": slurm}


@pytest.fixture
def nothing_runs(monkeypatch):
    """A context in which no program can be started."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a dry run started {args}")

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", refuse)
            patch.setattr(subprocess, "Popen", refuse)
            yield

    return context


@pytest.fixture
def dry(nothing_runs, capsys):
    """Runs a launcher with --dry-run; what it printed."""

    def run(launcher: str, *words: str, command: list[str] = ()) -> str:
        with nothing_runs():
            assert LAUNCHERS[launcher].main([*words, "--dry-run", "--", *command]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def stand_in(tmp_path):
    """Makes programs in a folder; the folder comes first in PATH of `bash`."""

    def make(name: str, body: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    return make


def bash(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path), **environment}
    command = ["bash", "-c", script]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)


RECORD = """printf '%s\\0' "$@" >>"$HOME/record.part"; mv "$HOME/record.part" "$HOME/record" """


def recorded(tmp_path: Path) -> list[str]:
    """The arguments that a stand-in with RECORD got."""
    deadline = time.monotonic() + 10
    while not (tmp_path / "record").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return (tmp_path / "record").read_text().split("\0")[:-1]


def lint(script: str, shell: str = "bash") -> None:
    assert subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr == ""
    assert SHELLCHECK, "shellcheck is missing: pip install -e '.[test]'"
    command = [SHELLCHECK, f"--shell={shell}", "--exclude=SC1003,SC2016", "-"]  # both doubt that quotes are meant
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Slices


@pytest.mark.parametrize(
    ("text", "same", "chips", "hosts"),
    [
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5e:2x4", "v5litepod-8", 8, 1),
        ("v5e:4x4", "v5litepod-16", 16, 4),
        ("v6e:16x16", "v6e-256", 256, 64),
        ("v5p:2x2x1", "v5p-8", 4, 1),
        ("v5p:2x2x4", "v5p-32", 16, 4),
        ("v4:4x4x4", "v4-128", 64, 16),
    ],
)
def test_a_slice_has_one_name_here_and_one_at_google(text, same, chips, hosts):
    tpu = slices.find(text)
    assert tpu == slices.find(same)
    assert (tpu.accelerator_type, tpu.chips, tpu.hosts()) == (same, chips, hosts)


def test_no_two_slices_share_an_accelerator_type():
    for name, generation in slices.GENERATIONS.items():
        types = [slices.Slice(name, topology).accelerator_type for topology in generation.topologies]
        assert len(set(types)) == len(types)


def test_a_small_slice_may_be_one_host_or_two():
    assert slices.find("v6e:2x4").hosts(4) == 2
    assert slices.find("v6e:2x4").hosts(8) == 1
    with pytest.raises(LaunchError, match="v6e:4x4 has hosts of 4 chips, not of 8"):
        slices.find("v6e:4x4").hosts(8)


# Bad input


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tpu_vm run pod --slice v5e:4x4 --zone us-west4-a", "no command"),
        ("tpu_vm run Pod --slice v5e:4x4 --zone us-west4-a -- x", "name 'Pod': lower-case letters"),
        ("tpu_vm run pod --slice v5e:4x5 --zone us-west4-a -- x", "no slice 'v5e:4x5'; there are v5e:1x1"),
        ("tpu_vm run pod --slice v5litepod-17 --zone us-west4-a -- x", "no slice 'v5litepod-17'; there are v5lite"),
        ("tpu_vm run pod --slice v9 --zone us-west4-a -- x", "no TPU 'v9'; expected something like v5e:4x4"),
        ("tpu_vm run pod --slice v5e:4x4 --zone here -- x", "--zone 'here': expected something like us-west4-a"),
        ("tpu_vm run pod --slice v5e:4x4 --zone us-west4-a --slices 0 -- x", "--slices 0: must be at least 1"),
        (
            "tpu_vm run pod --slice v5e:4x4 --zone us-west4-a -- x --workdir runs/x",
            "--workdir runs/x: each of the 4 hosts would have its own; use an absolute path of a shared",
        ),
        (
            "tpu_vm run pod --slice v5e:4x4 --zone us-west4-a -- x --workdir s3://b/x",
            "--workdir s3://b/x: allowed are gs:// and paths of a file system",
        ),
        ("tpu_vm create pod --slice v5e:4x4 --zone us-west4-a --now --slices 2", "--now creates one slice"),
        ("tpu_vm install pod --slice v5e:4x4 --zone us-west4-a --python 3.9", "--python '3.9'"),
        ("tpu_vm stop pod --slice v5e:4x4 --zone us-west4-a -- x", "stop takes no command"),
        ("gke x --image i --slice v5e:4x4", "no command"),
        ("gke x --image i --slice v5e:4x4 --chips-per-host 8 -- x", "v5e:4x4 has hosts of 4 chips, not of 8"),
        ("gke x --image i --slice v5e:4x4 --nodes 2 -- x", "--nodes is for GPUs"),
        ("gke x --image i --gpu nvidia-l4 --slices 2 -- x", "--slices and --chips-per-host are for TPUs"),
        ("gke x --image i --gpu nvidia-l4 -- x --workdir=/w", "--workdir /w: lost with the pod; use a folder of a"),
        (
            "gke x --image i --gpu nvidia-l4 --pvc c:/d -- x --out /data",
            "--out /data: lost with the pod; use /d",
        ),
        ("gke x --image i --gpu nvidia-l4 --pvc c -- x", "--pvc 'c': expected something like claim:/data"),
        ("gke x --image i --gpu nvidia-l4 --env A -- x", "--env 'A': expected something like NAME=VALUE"),
        ("gke x --image 'i j' --gpu nvidia-l4 -- x", "--image 'i j'"),
        (f"gke {'x' * 40} --image i --gpu nvidia-l4 -- x", "at most 39 characters"),
        ("slurm x", "no command"),
        ("slurm 'x y' -- x", "name 'x y'"),
        ("slurm x --time tomorrow -- x", "--time 'tomorrow': expected something like 24:00:00"),
        ("slurm x --partition 'a b' -- x", "--partition 'a b'"),
        ("slurm x --sbatch qos -- x", "--sbatch 'qos': expected something like qos=high"),
        ("slurm x --gpus-per-node 0 --task-per gpu -- x", "--task-per gpu needs --gpus-per-node"),
        ("slurm x --log nowhere/x.out -- x", "--log nowhere/x.out: no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(line, message, nothing_runs, capsys):
    launcher, *words = shlex.split(line)
    with nothing_runs():
        assert LAUNCHERS[launcher].main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"launch.{launcher}: ") and message in output.err
    assert output.err.count("\n") == 1


def test_a_missing_program_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.main(["x", "--", "true"]) == 2
    assert capsys.readouterr().err == "launch.slurm: sbatch is not installed on this machine (--dry-run does without)\n"


# TPU VMs


def calls(printed: str) -> list[list[str]]:
    """The commands that a dry run printed; they can be pasted into a shell."""
    found, part = [], ""
    for line in printed.splitlines(keepends=True):
        part += line
        try:
            found.append(shlex.split(part, comments=True))
            part = ""
        except ValueError:  # inside quotes
            continue
    assert part == ""
    return found


def test_create_queues_and_waits(dry):
    create, look = calls(dry("tpu_vm", "create", "pod", *TPU, "--spot", "--project", "mine", "--gcloud=--network=net"))
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {*create[6:]} == {
        *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=pod", "--accelerator-type=v5litepod-16"),
        *("--spot", "--zone=us-west4-a", "--project=mine", "--network=net"),
    }
    assert look[3:6] == ["queued-resources", "describe", "pod"]


def test_create_several_reserved_slices(dry):
    [create] = calls(dry("tpu_vm", "create", "pod", *TPU, "--slices", "2", "--reserved", "--no-wait"))
    assert {"--node-count=2", "--reserved"} < {*create} and "--node-id=pod" not in create


def test_create_now(dry):
    [create] = calls(dry("tpu_vm", "create", "pod", *TPU, "--now"))
    assert create[3:6] == ["tpu-vm", "create", "pod"] and "--version=v2-alpha-tpuv5-lite" in create


def test_create_waits_until_the_slice_is_there(stand_in, monkeypatch, tmp_path, capsys):
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nACTIVE\n")
    stand_in("gcloud", f'case "$4" in describe) head -n 1 {tmp_path}/states; sed -i 1d {tmp_path}/states;; esac')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(tpu_vm, "POLL", 0)
    assert tpu_vm.main(["create", "pod", *TPU]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["WAITING_FOR_RESOURCES", "ACTIVE"]


def test_create_says_that_a_request_has_failed(stand_in, monkeypatch, tmp_path, capsys):
    stand_in("gcloud", 'case "$4" in describe) echo FAILED;; esac')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert tpu_vm.main(["create", "pod", *TPU]) == 1
    assert "the request is FAILED" in capsys.readouterr().err


def test_install_copies_to_all_hosts(dry):
    pack, copy, install = calls(dry("tpu_vm", "install", "pod", *TPU))
    assert pack[:1] == ["git"] and pack[3:4] == ["archive"]
    assert copy[3:7] == ["tpu-vm", "scp", "pod.tar.gz", "pod:"] and "--worker=all" in copy
    assert install[3:6] == ["tpu-vm", "ssh", "pod"] and "--worker=all" in install
    lint(tpu_vm.install_script("pod", "3.12"))


def test_several_slices_are_reached_together(dry):
    for action in ("logs", "stop"):
        [call] = calls(dry("tpu_vm", action, "pod", *TPU, "--slices", "2"))
        assert call[3:6] == ["queued-resources", "ssh", "pod"] and {"--worker=all", "--node=all"} < {*call}


def test_logs_are_fetched_into_a_folder(dry):
    made = calls(dry("tpu_vm", "logs", "pod", *TPU, "--slices", "2", "--out", "my logs"))
    assert [call[:2] for call in made] == [["mkdir", "-p"], ["gcloud", "compute"]] * 2
    assert [call[-1] for call in made[::2]] == ["my logs/slice-0", "my logs/slice-1"]
    assert {"--node=1", "--output-directory=my logs/slice-1"} < {*made[3]}


def test_delete_asks_unless_told(dry):
    [call] = calls(dry("tpu_vm", "delete", "pod", *TPU))
    assert call[3:6] == ["queued-resources", "delete", "pod"] and "--force" in call and "--quiet" not in call
    [call] = calls(dry("tpu_vm", "delete", "pod", *TPU, "--now", "--yes"))
    assert call[3:6] == ["tpu-vm", "delete", "pod"] and "--quiet" in call


@pytest.fixture
def host(stand_in, tmp_path):
    """A TPU VM: its metadata, and the folder that `install` made."""

    def make(**metadata: str) -> None:
        (tmp_path / "metadata").mkdir(exist_ok=True)
        for name, value in metadata.items():
            (tmp_path / "metadata" / name.replace("_", "-")).write_text(value)
        stand_in("curl", f'exec cat "{tmp_path}/metadata/$(basename "${{@: -1}}")"')
        python = stand_in("python", RECORD)
        (tmp_path / "pod/.venv/bin").mkdir(parents=True, exist_ok=True)
        shutil.copy(python, tmp_path / "pod/.venv/bin/python")

    return make


def run_call(dry, *words: str, command: list[str]) -> str:
    [call] = calls(dry("tpu_vm", "run", "pod", *TPU, *words, command=command))
    [script] = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
    lint(script)
    return script


HOST = ["-m", "launch.run", "--hosts"]


@pytest.mark.parametrize("endpoints", ["10.0.0.7,10.0.0.8,10.0.0.9,10.0.0.10", "a:0:10.0.0.7,b:1:10.0.0.8,c:2:x,d:3:y"])
def test_run_finds_its_host_and_the_coordinator(dry, host, tmp_path, endpoints):
    host(agent_worker_number="2", worker_network_endpoints=endpoints)
    script = run_call(dry, "--restarts", "3", "--timeout", "60", command=HARD)
    done = bash(script, tmp_path)
    assert done.returncode == 0, done.stderr
    options = ["--restarts=3", "--timeout=60", "--"]
    assert recorded(tmp_path) == [*HOST, "4", "--host", "2", "--coordinator", "10.0.0.7:12421", *options, *HARD]


def test_run_on_several_slices(dry, host, tmp_path):
    lines = ["ZONE: 'z'", "MEGASCALE_NUM_SLICES: '2'", "MEGASCALE_SLICE_ID: '1'"]
    environment = "\n".join([*lines, "MEGASCALE_COORDINATOR_ADDRESS: '10.1.0.1:8080'", ""])
    host(agent_worker_number="3", worker_network_endpoints="a,b,c,d", tpu_env=environment)
    done = bash(run_call(dry, "--slices", "2", command=["x"]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path) == [*HOST, "8", "--host", "7", "--coordinator", "10.1.0.1:12421", "--", "x"]


def test_run_on_one_host_needs_no_metadata(dry, host, tmp_path):
    host()
    [call] = calls(dry("tpu_vm", "run", "pod", "--slice", "v6e-8", "--zone", "us-west4-a", command=["x", "--out", "y"]))
    assert bash(call[-2].removeprefix("--command="), tmp_path).returncode == 0
    assert recorded(tmp_path) == ["-m", "launch.run", "--", "x", "--out", "y"]


def test_run_refuses_another_slice_than_it_was_told(dry, host, tmp_path):
    host(agent_worker_number="0", worker_network_endpoints="a,b", tpu_env="MEGASCALE_NUM_SLICES: '3'\n")
    done = bash(run_call(dry, command=["x"]), tmp_path)
    assert done.returncode == 1 and "this slice has 2 hosts, not 4: is --slice right?" in done.stderr
    host(worker_network_endpoints="a,b,c,d")
    done = bash(run_call(dry, "--slices", "2", command=["x"]), tmp_path)
    assert done.returncode == 1 and "this TPU has '3' slices, not 2: is --slices right?" in done.stderr
    assert not (tmp_path / "record").exists()


def test_a_second_run_is_refused_and_stop_ends_the_first(dry, host, tmp_path):
    host(agent_worker_number="0", worker_network_endpoints="a,b,c,d")
    (tmp_path / "pod/.venv/bin/python").write_text(
        "#!/bin/bash\ntrap 'echo saved; exit 143' TERM\nwhile :; do sleep 0.05; done\n"
    )
    script = run_call(dry, command=["x"])
    assert "started, process" in bash(script, tmp_path).stdout
    process = int((tmp_path / "pod/run.pid").read_text())
    try:
        again = bash(script, tmp_path)
        assert again.returncode == 1 and f"a run is going on, process {process}" in again.stderr
        stop = tpu_vm.stop_script("pod")
        lint(stop)
        assert "stopped" in bash(stop, tmp_path).stdout
        assert (tmp_path / "pod/run.log").read_text() == "saved\n"
        assert "no run" in bash(stop, tmp_path).stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


# GKE

NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def fields(required: str = "", **properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def many(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: str) -> dict:
    return {"enum": [*values]}


# What the launcher uses of the JobSet API (jobset.x-k8s.io/v1alpha2) and of the Job and Pod in it (batch/v1, v1).
CONTAINER = fields(
    "name image command resources",
    name=NAME,
    image={"type": "string"},
    command=many({"type": "string"}),
    env={"type": "array", "items": fields("name value", name={"type": "string"}, value={"type": "string"})},
    ports=many(fields("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=fields("limits", limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=many(fields("name mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"})),
    securityContext=fields(privileged={"type": "boolean"}, runAsUser=COUNT),
)
POD = fields(
    "restartPolicy containers",
    restartPolicy=one_of("Never"),  # a pod failure policy allows no other
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=STRINGS,
    tolerations=many(
        fields(
            "key operator",
            key={"type": "string"},
            operator=one_of("Exists", "Equal"),
            value={"type": "string"},
            effect=one_of("NoSchedule"),
        )
    ),
    securityContext=fields(fsGroup=COUNT),
    containers=many(CONTAINER),
    volumes=many(
        fields(
            "name",
            name=NAME,
            emptyDir=fields(medium=one_of("Memory")),
            persistentVolumeClaim=fields("claimName", claimName=NAME),
        )
    ),
    hostNetwork={"type": "boolean"},
    dnsPolicy=one_of("ClusterFirstWithHostNet"),
    serviceAccountName=NAME,
)
CODES = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 255}, "uniqueItems": True}
JOB = fields(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed"),
    backoffLimit=COUNT,
    podFailurePolicy=fields(
        "rules",
        rules=many(
            fields(
                "action",
                action=one_of("FailJob", "Ignore", "Count"),
                onExitCodes=fields("operator values", containerName=NAME, operator=one_of("In", "NotIn"), values=CODES),
                onPodConditions=many(fields("type status", type={"type": "string"}, status=one_of("True", "False"))),
            )
        ),
    ),
    template=fields("spec", spec=POD),
)
RULE = fields(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    onJobFailureReasons={
        "type": "array",
        "items": one_of("PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded"),
    },
)
JOBSET = fields(
    "apiVersion kind metadata spec",
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=fields("name", name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS),
    spec=fields(
        "replicatedJobs",
        network=fields(enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}),
        failurePolicy=fields(maxRestarts=COUNT, rules=many(RULE)),
        replicatedJobs=many(
            fields("name template", name=NAME, replicas=COUNT, template=fields("spec", spec=JOB)),
        ),
    ),
)


def manifest(dry, *words: str, command: list[str] = HARD) -> dict:
    """The JobSet that the launcher prints, checked."""
    found = yaml.safe_load(dry("gke", "gr-d64", *IMAGE, *words, command=command))
    jsonschema.validate(found, JOBSET)
    return found


def job_of(manifest: dict) -> dict:
    [replicated] = manifest["spec"]["replicatedJobs"]
    return {"replicas": replicated["replicas"], **replicated["template"]["spec"]}


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]


def test_two_tpu_slices(dry):
    found = manifest(dry, "--slice", "v5e:4x4", "--slices", "2", "--service-account", "trainer", "--queue", "q")
    job, pod = job_of(found), pod_of(found)
    assert (job["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["serviceAccountName"] == "trainer"
    annotation = found["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert annotation == "cloud.google.com/gke-nodepool"
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}


def test_a_slice_of_one_host(dry):
    found = manifest(dry, "--slice", "v6e-8", "--chips-per-host", "8", "--unprivileged")
    assert job_of(found)["parallelism"] == 1
    assert pod_of(found)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}
    assert "securityContext" not in pod_of(found)["containers"][0]


def test_gpu_nodes_with_a_volume(dry):
    words = ["--gpu", "nvidia-h100-80gb", "--nodes", "2", "--pvc", "images:/data", "--spot", "--namespace", "team"]
    found = manifest(dry, *words, command=["mergevq", "train", "--workdir", "/data/run"])
    pod = pod_of(found)
    assert (job_of(found)["replicas"], job_of(found)["parallelism"]) == (1, 2)
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "claim-0", "mountPath": "/data"} in pod["containers"][0]["volumeMounts"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert found["metadata"]["namespace"] == "team"


def test_interruptions_restart_without_counting(dry):
    found = manifest(dry, "--slice", "v5e:4x4", "--restarts", "2", "--grace", "200")
    policy, rules = found["spec"]["failurePolicy"], job_of(found)["podFailurePolicy"]["rules"]
    assert policy["maxRestarts"] == 2
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    codes, conditions = rules
    assert codes == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "run", "operator": "In", "values": [75, 143]},
    }
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job_of(found)["backoffLimit"] == 0
    assert pod_of(found)["terminationGracePeriodSeconds"] == 200


def kubernetes(text: str, environment: dict[str, str]) -> str:
    """How Kubernetes expands a container's command: $(NAME) if it knows it, $$ to $."""

    def value(match: re.Match) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", value, text)


@pytest.mark.parametrize(
    ("words", "environment", "place"),
    [
        (["--gpu", "nvidia-b200", "--nodes", "2"], {"JOB_COMPLETION_INDEX": "1"}, ("2", "1")),
        (["--slice", "v5e:4x4"], {"TPU_WORKER_ID": "3"}, ("4", "3")),
        (["--slice", "v5e:4x4", "--slices", "3"], {"TPU_WORKER_ID": "3", "MEGASCALE_SLICE_ID": "2"}, ("12", "11")),
        (["--gpu", "nvidia-l4", "--gpus-per-node", "1"], {}, None),
    ],
)
def test_a_pod_starts_the_command_as_given(dry, stand_in, tmp_path, words, environment, place):
    stand_in("python", RECORD)
    program, flag, script = pod_of(manifest(dry, *words, "--timeout", "90"))["containers"][0]["command"]
    assert (program, flag) == ("bash", "-c")
    script = kubernetes(script, {"HOSTNAME": "wrong", **environment})
    lint(script)
    done = bash(script, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    where = ["--hosts", place[0], "--host", place[1]] if place else []
    where += ["--coordinator", "gr-d64-slice-job-0-0.gr-d64:12421"] if place else []
    assert recorded(tmp_path) == ["-m", "launch.run", *where, "--timeout=90", "--", *HARD]


def test_a_pod_without_its_variables_fails(dry, stand_in, tmp_path):
    stand_in("python", RECORD)
    script = kubernetes(pod_of(manifest(dry, "--slice", "v5e:4x4"))["containers"][0]["command"][2], {})
    done = bash(script, tmp_path)
    assert done.returncode != 0 and "TPU_WORKER_ID" in done.stderr


def test_environment_variables_keep_their_values(dry):
    value = "a=b $(HOME) $$ yes: no"
    [variable] = pod_of(manifest(dry, "--slice", "v5e:4x4", "--env", f"X={value}"))["containers"][0]["env"]
    assert variable["name"] == "X" and kubernetes(variable["value"], {"HOME": "wrong"}) == value


def xpk_of(printed: str) -> list[str]:
    return shlex.split(printed.splitlines()[-1].removeprefix("# with XPK: "))


def test_the_xpk_command_does_the_same(dry, stand_in, tmp_path):
    printed = dry("gke", "gr-d64", *IMAGE, "--slice", "v6e:4x4", "--slices", "2", "--cluster", "c", command=HARD)
    words = xpk_of(printed)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--workload=gr-d64", "--cluster=c", "--tpu-type=v6e-16", "--num-slices=2"} < {*words}
    assert "--restart-on-exit-codes=75,143" in words
    stand_in("python", RECORD)
    environment = {"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"}
    assert bash(words[-1].removeprefix("--command="), tmp_path, **environment).returncode == 0
    assert recorded(tmp_path)[2:6] == ["--hosts", "8", "--host", "4"] and recorded(tmp_path)[-len(HARD) :] == HARD


def test_xpk_for_gpus(dry):
    words = xpk_of(dry("gke", "x", *IMAGE, "--gpu", "nvidia-h200-141gb", "--nodes", "2", command=["x"]))
    assert {"--device-type=h200-141gb-8", "--num-nodes=2"} < {*words}


@pytest.mark.parametrize("words", [["--gpu", "nvidia-l4"], ["--slice", "v5e:2x4", "--chips-per-host", "8"]])
def test_no_xpk_command_for_nodes_that_it_does_not_know(dry, words):
    assert dry("gke", "x", *IMAGE, *words, command=["x"]).splitlines()[-1] == "# XPK has no such nodes"


def test_a_command_of_several_lines(dry):
    printed = dry("gke", "x", *IMAGE, "--gpu", "nvidia-b200", command=["x", "a\nb"])
    assert printed.splitlines()[-1] == "# XPK takes no values of several lines"
    assert "'a\nb'" in pod_of(yaml.safe_load(printed))["containers"][0]["command"][2]


def test_the_manifest_is_applied(stand_in, monkeypatch, tmp_path, capsys):
    stand_in("kubectl", f'echo "$@" >{tmp_path}/arguments; cat >{tmp_path}/applied')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert gke.main(["x", *IMAGE, "--slice", "v5e:4x4", "--", "true"]) == 0
    assert (tmp_path / "arguments").read_text() == "apply --filename=-\n"
    jsonschema.validate(yaml.safe_load((tmp_path / "applied").read_text()), JOBSET)
    assert "kubectl delete jobset x" in capsys.readouterr().out


# SLURM


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_batch_script_asks_for_what_it_was_told(dry):
    words = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1-00:00:00", "--partition", "gpu", "--sbatch", "mem=0"]
    script = dry("slurm", "gr-d64", *words, "--cpus-per-task", "16", "--setup", "module load cuda", command=HARD)
    lint(script)
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    assert options_of(script) == {
        **{"job-name": "gr-d64", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "4", "cpus-per-task": "16"},
        **{"time": "1-00:00:00", "partition": "gpu", "mem": "0", "requeue": "", "open-mode": "append"},
        **{"signal": "TERM@120", "output": "%x-%j.out"},
    }
    assert script.index("#SBATCH --requeue") < script.index("module load cuda") < script.index("srun ")


@pytest.fixture
def cluster(stand_in, tmp_path):
    """Stand-ins for SLURM: srun runs the second of four tasks here and ends with the status in $ENDS."""
    stand_in("python", f"{RECORD}; exit $ENDS")
    task = 'while [ "${1#-}" != "$1" ]; do shift; done; SLURM_NTASKS=4 SLURM_PROCID=1 SLURM_LOCALID=1 exec "$@"'
    stand_in("srun", f'echo "$@" >{tmp_path}/srun; {task}')
    stand_in("scontrol", f'if [ "$1" = show ]; then echo node7; echo node9; else echo "$@" >{tmp_path}/requeued; fi')
    stand_in("squeue", 'echo "$STATE"')

    def run(script: str, status: int = 0, state: str = "RUNNING", **environment: str) -> subprocess.CompletedProcess:
        job = {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_ID": "2050", "ENDS": str(status), "STATE": state}
        return bash(script, tmp_path, **job, **environment)

    return run


def test_each_task_starts_the_command_as_given(dry, cluster, tmp_path):
    done = cluster(dry("slurm", "x", "--nodes", "4", "--timeout", "90", command=HARD))
    assert (done.returncode, done.stderr) == (0, "")
    where = ["--hosts", "4", "--host", "1", "--coordinator", "node7:12425"]
    assert recorded(tmp_path) == ["-m", "launch.run", *where, "--timeout=90", "--", *HARD]


def test_one_task_per_gpu_sees_its_own(dry, cluster, stand_in, tmp_path):
    stand_in("python", f'echo "$CUDA_VISIBLE_DEVICES" >{tmp_path}/gpus')
    script = dry("slurm", "x", "--nodes", "2", "--gpus-per-node", "2", "--task-per", "gpu", command=["x"])
    lint(script)
    assert options_of(script)["ntasks-per-node"] == "2"
    assert cluster(script).returncode == 0
    assert (tmp_path / "gpus").read_text() == "1\n"
    assert "--gpu-bind=none" in (tmp_path / "srun").read_text()


def test_one_task_needs_no_coordinator(dry, cluster, tmp_path):
    script = dry("slurm", "x", "--gpus-per-node", "0", command=["x"])
    assert "gpus-per-node" not in options_of(script)
    assert cluster(script).returncode == 0
    assert recorded(tmp_path) == ["-m", "launch.run", "--", "x"]


def test_two_tasks_meet(dry, stand_in, tmp_path):
    """The script and launch.run together, with a cluster of two tasks on this machine."""
    with socket.create_server(("localhost", 0)) as server:
        job = (server.getsockname()[1] - PORT) // 2 % 2048
    stand_in("scontrol", "echo localhost; echo localhost")
    start = 'while [ "${1#-}" != "$1" ]; do shift; done; export SLURM_NTASKS=2'
    stand_in("srun", f'{start}; SLURM_PROCID=0 "$@" & SLURM_PROCID=1 "$@"; status=$?; wait; exit $status')
    stand_in("squeue", "echo RUNNING")
    stand_in("python", f'exec {shlex.quote(sys.executable)} "$@"')
    command = ["bash", "-c", 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $1"', "x", "it's"]
    script = dry("slurm", "x", "--nodes", "2", "--timeout", "20", command=command)
    setting = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "n[1-2]", "PYTHONPATH": str(ROOT)}
    done = bash(script, tmp_path, **setting)
    assert done.returncode == 0, done.stderr
    assert {"0 of 2: it's", "1 of 2: it's"} == {line.split("] ")[-1] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (75, "RUNNING", "0", True),
        (143, "RUNNING", "49", True),
        (143, "RUNNING", "50", False),
        (143, "COMPLETING", "0", False),  # scancel, or preemption, which requeues by itself
        (1, "RUNNING", "0", False),
        (0, "RUNNING", "0", False),
    ],
)
def test_the_job_goes_back_into_the_queue_if_that_helps(dry, cluster, tmp_path, status, state, restarts, requeued):
    done = cluster(dry("slurm", "x", "--nodes", "4", command=["x"]), status, state, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 2050\n"


def test_the_script_is_submitted(stand_in, monkeypatch, tmp_path):
    stand_in("sbatch", f'echo "$#" >{tmp_path}/count; cat >{tmp_path}/submitted')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert slurm.main(["x", "--", "true"]) == 0
    assert (tmp_path / "count").read_text() == "0\n"
    assert options_of((tmp_path / "submitted").read_text())["job-name"] == "x"


# The image

DOCKERFILE = (ROOT / "launch/Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n", "\\\n", "\n".join(lines))
    logical = re.findall(r"(?:[^\n]*\\\n)*[^\n]+", joined)
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in logical]


def test_the_dockerfile_has_two_stages_and_no_root():
    names = [name for name, _ in instructions()]
    assert set(names) <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"}
    assert names.count("FROM") == 2 and names[0] == "ARG"
    assert instructions()[-3:-1] == [("ARG", f"RUN_AS={gke.USER}"), ("USER", "${RUN_AS}")]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN")
    assert f"useradd --create-home --uid {gke.USER}" in DOCKERFILE


def test_the_dockerfile_copies_what_exists_and_is_not_ignored():
    kept = {line[1:] for line in (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert all((ROOT / name).exists() for name in kept)
    copied = [text.split()[0] for name, text in instructions() if name == "COPY" and not text.startswith("--from")]
    assert copied == [".", "constraints.txt", "launch"] and set(copied[1:]) <= kept
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "configs"} <= kept


@pytest.mark.parametrize(
    ("accelerator", "extra"), [("cpu", "[gcs]"), ("gpu", "[gpu,gcs]"), ("tpu", "[tpu,gcs]"), ("tpus", None)]
)
def test_the_image_installs_the_wheel_with_the_pinned_versions(stand_in, tmp_path, accelerator, extra):
    script = [text for name, text in instructions() if name == "RUN"][-1]
    lint(script, "sh")
    (tmp_path / "tmp/wheels").mkdir(parents=True)
    (tmp_path / "tmp/wheels/a-1.whl").touch()
    stand_in("pip", RECORD)
    for name in ("rm", "useradd"):
        stand_in(name, "true")
    done = bash(script.replace("/tmp/", f"{tmp_path}/tmp/"), tmp_path, ACCELERATOR=accelerator)
    if extra is None:
        assert done.returncode == 1 and "ACCELERATOR is 'tpus': cpu, gpu and tpu are allowed" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    constraints, wheel = f"{tmp_path}/tmp/constraints.txt", f"{tmp_path}/tmp/wheels/a-1.whl{extra}"
    assert recorded(tmp_path) == ["install", "--no-cache-dir", "--constraint", constraints, wheel]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extra[1:-1].split(",")) <= set(extras)


# Examples


def examples() -> list[str]:
    """The commands in the launchers' docstrings and in the how-to."""
    texts = [module.__doc__ for module in LAUNCHERS.values()] + [(ROOT / "docs/pods.md").read_text()]
    text = re.sub(r"\\\n\s*", "", "\n".join(texts))
    found = re.findall(
        r"^ +(python -m launch\.(?:tpu_vm|gke|slurm) .*)|`(python -m launch\.[^`]*)`", text, re.MULTILINE
    )
    return [(line or quoted).replace("--image ...", "--image gcr.io/project/mergevq:gpu") for line, quoted in found]


@pytest.mark.parametrize("line", examples())
def test_the_examples_work(line, nothing_runs, capsys):
    _, _, module, *words = shlex.split(line)
    end = words.index("--") if "--" in words else len(words)
    with nothing_runs():
        assert LAUNCHERS[module.removeprefix("launch.")].main([*words[:end], "--dry-run", *words[end:]]) == 0
    assert capsys.readouterr().out


def test_all_launchers_have_examples():
    assert {line.split()[2].removeprefix("launch.") for line in examples()} == {*LAUNCHERS}
