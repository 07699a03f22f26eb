r"""Runs a command on GKE: writes a JobSet for TPU slices or GPU nodes and applies it; `--dry-run` prints it.

    python -m launch.gke gr-d64 --image europe-docker.pkg.dev/project/images/mergevq:tpu --slice v6e:4x4 --slices 2 \
        --pvc bucket:/data -- mergevq train --config mergevq_imagenet:gr-d64 --workdir /data/gr-d64
    python -m launch.gke gr-d64 --image ... --gpu nvidia-h100-80gb --nodes 2 --gpus-per-node 8 --pvc data:/data -- \
        mergevq train --config mergevq_imagenet:gr-d64 --workdir /data/gr-d64

The cluster needs JobSet 0.7 or later. A lost process (exit status 75), SIGTERM (143) and a node that is taken away
restart all pods without counting; other failures count towards --restarts. The printed XPK command does the same on a
cluster made by XPK, except that it counts every restart.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from launch import common, slices
from launch.common import LaunchError, run_or_print
from runtime_jax.hosts import PORT

JOB = "slice-job"  # as XPK calls it, so that the coordinator has the same address there
CONTAINER = "run"
USER = 1000  # of launch/Dockerfile
# GPUs of GKE's label, as XPK calls nodes of eight of them
XPK_GPUS = {
    "nvidia-h100-80gb": "h100-80gb-8",
    "nvidia-h100-mega-80gb": "h100-mega-80gb-8",
    "nvidia-h200-141gb": "h200-141gb-8",
    "nvidia-b200": "b200-8",
}


class Pods(NamedTuple):
    """What is asked of the nodes."""

    jobs: int  # slices; 1 for GPUs
    per_job: int
    resource: str  # google.com/tpu or nvidia.com/gpu
    count: int  # of the resource, in a pod
    selector: dict[str, str]
    xpk: list[str] | None  # XPK's flags for the same nodes, if it knows them


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="launch.gke", description=__doc__, formatter_class=form)
    parser.add_argument("name", help="of the JobSet")
    parser.add_argument("--image", required=True, help="built from launch/Dockerfile")
    nodes = parser.add_mutually_exclusive_group(required=True)
    nodes.add_argument("--slice", help="TPU slice, such as v5e:4x4 or v5litepod-16")
    nodes.add_argument("--gpu", help="value of cloud.google.com/gke-accelerator, such as nvidia-h100-80gb")
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices (default: 1)")
    parser.add_argument("--chips-per-host", type=int, help="8 for a v5e or v6e node that has the whole slice")
    parser.add_argument("--nodes", type=int, default=1, help="number of GPU nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8; one process uses all of them")
    capacity = parser.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="on Spot nodes")
    capacity.add_argument("--reservation", help="on nodes of this reservation")
    parser.add_argument("--restarts", type=int, default=3, help="after failures that count (default: 3)")
    parser.add_argument("--grace", type=int, default=150, help="seconds from SIGTERM to SIGKILL (default: 150)")
    parser.add_argument("--timeout", type=float, help="seconds until a silent host counts as lost")
    parser.add_argument("--pvc", action="append", default=[], metavar="CLAIM:FOLDER", help="volume claim to mount")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable")
    parser.add_argument("--service-account", help="Kubernetes account with rights for a mounted bucket")
    parser.add_argument("--namespace", help="default: kubectl's")
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--host-network", action="store_true", help="faster between slices; not on Autopilot")
    parser.add_argument("--unprivileged", action="store_true", help="TPU pods as an ordinary user")
    parser.add_argument("--cluster", default="CLUSTER", help="name in the printed XPK command")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, apply nothing")
    return common.main(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    manifest, xpk = jobset(args), _xpk(args)
    text = to_yaml(manifest)
    kubectl = ["kubectl", "apply", "--filename=-"]
    if args.dry_run:
        print(f"# {shlex.join(kubectl)}, with this as its input:\n{text}# {xpk}")
        return 0
    status = run_or_print(kubectl, False, text=text)
    print(xpk)
    if status == 0:
        where = f" --namespace={args.namespace}" if args.namespace else ""
        print(f"follow it:  kubectl logs --follow{where} --selector=jobset.sigs.k8s.io/jobset-name={args.name}")
        print(f"stop it:    kubectl delete jobset{where} {args.name}")
    return status


def jobset(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest.

    Raises:
      LaunchError: an argument is wrong.
    """
    _check(args)
    pods = _pods(args)
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if args.slice else {}
    labels = {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}
    interrupted = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(common.RESUMED)},
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "parallelism": pods.per_job,
        "completions": pods.per_job,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": interrupted},
        "template": {"spec": _pod(args, pods)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name}
        | ({"namespace": args.namespace} if args.namespace else {})
        | ({"labels": labels} if labels else {})
        | ({"annotations": annotations} if annotations else {}),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": args.restarts,
                "rules": [
                    {
                        "name": "interrupted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": JOB, "replicas": pods.jobs, "template": {"spec": job}}],
        },
    }


def _check(args: argparse.Namespace) -> None:
    common.check_name(args.name, 39)  # names of pods add to it, up to 63 characters
    common.check_command(args.command)
    common.check_matches("--image", args.image, r"[\w][\w.:/@-]*", "gcr.io/project/mergevq:tpu")
    common.check_positive(
        slices=args.slices, nodes=args.nodes, gpus_per_node=args.gpus_per_node, grace=args.grace, timeout=args.timeout
    )
    if args.restarts < 0:
        raise LaunchError(f"--restarts {args.restarts}: must not be negative")
    for name in ("gpu", "reservation", "service_account", "namespace", "queue"):
        if (value := getattr(args, name)) is not None:
            common.check_matches(f"--{name.replace('_', '-')}", value, r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "a-name")
    for claim in args.pvc:
        common.check_matches("--pvc", claim, r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?:/[^:]+", "claim:/data")
    for variable in args.env:
        common.check_matches("--env", variable, r"(?s)[A-Za-z_]\w*=.*", "NAME=VALUE")
    if args.gpu and (args.slices > 1 or args.chips_per_host):
        raise LaunchError("--slices and --chips-per-host are for TPUs; GPUs have --nodes and --gpus-per-node")
    if args.slice and args.nodes > 1:
        raise LaunchError("--nodes is for GPUs; a TPU slice has its own number of hosts")
    folders = [claim.partition(":")[2] for claim in args.pvc]
    common.check_folders(args.command, mounts=folders, why="lost with the pod")


def _pods(args: argparse.Namespace) -> Pods:
    if args.gpu:
        xpk = [f"--device-type={XPK_GPUS[args.gpu]}", f"--num-nodes={args.nodes}"] if args.gpu in XPK_GPUS else None
        gpus = args.gpus_per_node
        selector = {"cloud.google.com/gke-accelerator": args.gpu}
        return Pods(1, args.nodes, "nvidia.com/gpu", gpus, selector, xpk if gpus == 8 else None)
    tpu = slices.find(args.slice)
    chips = args.chips_per_host or min(4, tpu.chips)
    hosts = tpu.hosts(chips)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.generation.gke,
        "cloud.google.com/gke-tpu-topology": tpu.topology,
    }
    xpk = [f"--tpu-type={tpu.accelerator_type}", f"--num-slices={args.slices}"] if chips <= 4 else None
    return Pods(args.slices, hosts, "google.com/tpu", chips, selector, xpk)


def _pod(args: argparse.Namespace, pods: Pods) -> dict[str, Any]:
    capacity, tolerations = {}, [{"key": pods.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if args.spot:
        capacity = {"cloud.google.com/gke-spot": "true"}
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        tolerations.append(spot)
    if args.reservation:
        capacity = {"cloud.google.com/reservation-name": args.reservation}
    claims = [claim.split(":", 1) for claim in args.pvc]
    volumes = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]  # of the data's worker processes
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for number, (claim, folder) in enumerate(claims):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": folder})
    pairs = [variable.split("=", 1) for variable in args.env]
    amount = {pods.resource: pods.count}
    container = {
        "name": CONTAINER,
        "image": args.image,
        # Kubernetes replaces $(NAME), and $$ by $, before Bash sees the script
        "command": ["bash", "-c", "\n".join(script(args, pods)).replace("$", "$$")],
        "env": [{"name": name, "value": value.replace("$", "$$")} for name, value in pairs],
        "ports": [{"containerPort": port} for port in (*((8471, 8080) if args.slice else ()), PORT, PORT + 1)],
        "resources": {"requests": amount, "limits": dict(amount)},
        "volumeMounts": mounts,
    }
    if args.slice and not args.unprivileged:  # for TPU devices, which are root's, and pinned memory
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": args.grace,
        "nodeSelector": pods.selector | capacity,
        "tolerations": tolerations,
        "securityContext": {"fsGroup": USER},
        "containers": [container],
        "volumes": volumes,
    }
    if args.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if args.service_account:
        spec["serviceAccountName"] = args.service_account
    return spec


def script(args: argparse.Namespace, pods: Pods) -> list[str]:
    """Lines of Bash that each pod runs: `launch.run`, with the host's number from what GKE sets.

    The coordinator is the first pod of the first slice.
    """
    options = [f"--timeout={args.timeout:g}"] if args.timeout else []
    command = shlex.join([*options, "--", *args.command])
    if pods.jobs * pods.per_job == 1:
        return [f"exec python -m launch.run {command}"]
    if args.gpu:
        host = "host=$JOB_COMPLETION_INDEX"
    elif pods.jobs == 1:
        host = "host=$TPU_WORKER_ID"
    else:
        host = f"host=$((MEGASCALE_SLICE_ID * {pods.per_job} + TPU_WORKER_ID))"
    first = f"{args.name}-{JOB}-0-0.{args.name}:{PORT}"
    place = f'--hosts {pods.jobs * pods.per_job} --host "$host" --coordinator {first}'
    return ["set -eu", host, f"exec python -m launch.run {place} {command}"]


def _xpk(args: argparse.Namespace) -> str:
    """The XPK command for the same run, or why there is none."""
    pods = _pods(args)
    line = "; ".join(script(args, pods))
    if pods.xpk is None:
        return "XPK has no such nodes"
    if "\n" in "".join([line, *args.env]):
        return "XPK takes no values of several lines"
    words = [f"--workload={args.name}", f"--cluster={args.cluster}", *pods.xpk, f"--docker-image={args.image}"]
    words += [f"--max-restarts={max(args.restarts, 10)}"]
    words += [f"--restart-on-exit-codes={','.join(map(str, common.RESUMED))}"]
    words += [f"--termination-grace-period-seconds={args.grace}", *(f"--env={variable}" for variable in args.env)]
    return "with XPK: " + shlex.join(["xpk", "workload", "create", *words, f"--command={line}"])


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(manifest: dict[str, Any]) -> str:
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)


if __name__ == "__main__":
    sys.exit(main())
