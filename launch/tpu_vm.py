r"""Runs a command on all hosts of a TPU slice, or of several, by gcloud: create, install, run, logs, stop, delete.

    python -m launch.tpu_vm create pod --slice v5e:4x4 --zone us-west4-a --spot
    python -m launch.tpu_vm install pod --slice v5e:4x4 --zone us-west4-a
    python -m launch.tpu_vm run pod --slice v5e:4x4 --zone us-west4-a --restarts 10 -- \
        mergevq train --config mergevq_imagenet:gr-d64 --workdir gs://BUCKET/gr-d64
    python -m launch.tpu_vm logs pod --slice v5e:4x4 --zone us-west4-a --follow
    python -m launch.tpu_vm stop pod --slice v5e:4x4 --zone us-west4-a
    python -m launch.tpu_vm delete pod --slice v5e:4x4 --zone us-west4-a

`--dry-run` prints the gcloud calls and runs none. The run doesn't depend on the connection; `stop` lets it save first.
Each host works in ~/NAME, which holds the project as committed, its virtual environment, run.log and run.pid.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import common, slices
from launch.common import LaunchError, run_or_print
from runtime_jax.hosts import PORT

ROOT = Path(__file__).parents[1]
POLL = 30  # seconds between two looks at a queued resource
STATE = "--format=value(state.state)"
GIVEN_UP = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="launch.tpu_vm", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="action", required=True)
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("name", help="of the TPU")
    everywhere.add_argument("--slice", required=True, help="such as v5e:4x4 or v5litepod-16")
    everywhere.add_argument("--slices", type=int, default=1, help="number of such slices (default: 1)")
    everywhere.add_argument("--zone", required=True, help="such as us-west4-a")
    everywhere.add_argument("--project", help="Google Cloud project (default: gcloud's)")
    everywhere.add_argument(
        "--gcloud", action="append", default=[], metavar="FLAG", help="such as --gcloud=--internal-ip"
    )
    everywhere.add_argument("--dry-run", action="store_true", help="print the calls, run none")

    create = commands.add_parser("create", parents=[everywhere], help="request the slice and wait for it")
    create.add_argument("--now", action="store_true", help="fail if there is no capacity, instead of queueing")
    create.add_argument("--no-wait", action="store_true", help="return as soon as the request is queued")
    capacity = create.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper; Google may take it back")
    capacity.add_argument("--reserved", action="store_true", help="from the project's reservation")
    create.add_argument("--runtime-version", help="software of the VMs (default: Google's for this TPU)")
    create.add_argument("--service-account", help="whose rights the VMs have")

    install = commands.add_parser("install", parents=[everywhere], help="copy the project to all hosts and install it")
    install.add_argument("--ref", default="HEAD", help="commit to copy (default: HEAD)")
    install.add_argument("--python", default="3.12", help="Python version (default: 3.12)")

    run = commands.add_parser("run", parents=[everywhere], help="start -- COMMAND on all hosts")
    run.add_argument("--timeout", type=float, help="seconds until a silent host counts as lost")
    run.add_argument("--restarts", type=int, default=0, help="times to start again after a loss (default: 0)")

    logs = commands.add_parser("logs", parents=[everywhere], help="show or fetch run.log")
    logs.add_argument("--follow", action="store_true", help="of host 0, until you press Ctrl-C")
    logs.add_argument("--lines", type=int, default=50, help="of each host (default: 50)")
    logs.add_argument("--out", help="fetch the whole files into this folder")

    commands.add_parser("stop", parents=[everywhere], help="SIGTERM: the run saves and ends")
    delete = commands.add_parser("delete", parents=[everywhere], help="delete the slice and its disks")
    delete.add_argument("--now", action="store_true", help="it was created with --now")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    return common.main(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    common.check_name(args.name, 40)
    common.check_matches("--zone", args.zone, r"[a-z]+-[a-z]+\d+-[a-z]", "us-west4-a")
    common.check_positive(slices=args.slices)
    tpu = Tpu(args)
    if args.action != "run" and args.command:
        raise LaunchError(f"{args.action} takes no command after --")
    actions = {"create": _create, "install": _install, "run": _start, "logs": _logs, "stop": _stop, "delete": _delete}
    return actions[args.action](args, tpu)


class Tpu:
    """The slices of one name, and gcloud calls that reach their hosts."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.slice = slices.find(args.slice)
        self.hosts = self.slice.hosts() * args.slices
        self.where = [f"--zone={args.zone}"] + ([f"--project={args.project}"] if args.project else [])
        self._kind = "tpu-vm" if args.slices == 1 else "queued-resources"
        self._all = ["--worker=all"] + ([] if args.slices == 1 else ["--node=all"])

    def gcloud(self, *words: str, kind: str | None = None) -> list[str]:
        return ["gcloud", "compute", "tpus", kind or self._kind, *words, *self.where]

    def call(self, *words: str, kind: str | None = None) -> int:
        return run_or_print([*self.gcloud(*words, kind=kind), *self.args.gcloud], self.args.dry_run)

    def ssh(self, script: str, *flags: str) -> int:
        """Runs a script on all hosts, or on those that the flags say."""
        return self.call("ssh", self.args.name, *(flags or self._all), f"--command={script}")

    def scp(self, source: str, target: str) -> int:
        """Copies a file to all hosts."""
        return self.call("scp", source, f"{self.args.name}:{target}", *self._all)


def _create(args: argparse.Namespace, tpu: Tpu) -> int:
    if args.now and args.slices > 1:
        raise LaunchError("--now creates one slice; several need the queue")
    version = args.runtime_version or tpu.slice.generation.runtime
    flags = [f"--accelerator-type={tpu.slice.accelerator_type}"]
    flags += ["--spot"] * args.spot + ["--reserved"] * args.reserved
    flags += [f"--service-account={args.service_account}"] if args.service_account else []
    if args.now:
        return tpu.call("create", args.name, f"--version={version}", *flags, kind="tpu-vm")
    nodes = [f"--node-id={args.name}"] if args.slices == 1 else [f"--node-count={args.slices}"]
    queue = "queued-resources"
    if status := tpu.call("create", args.name, f"--runtime-version={version}", *nodes, *flags, kind=queue):
        return status
    if args.no_wait:
        return 0
    look = tpu.gcloud("describe", args.name, STATE, kind=queue)
    if args.dry_run:
        print(f"{shlex.join(look)}  # every {POLL} s, until it prints ACTIVE")
        return 0
    return _wait(look)


def _wait(look: Sequence[str]) -> int:
    """Until the queued resource is there; prints each change of its state."""
    before = None
    while True:
        done = subprocess.run(look, capture_output=True, text=True)
        if done.returncode:
            raise LaunchError(f"{shlex.join(look)}: {' '.join(done.stderr.split())}")
        if (state := done.stdout.strip()) != before:
            print(f"{time.strftime('%H:%M:%S')} {state}", flush=True)
        if state == "ACTIVE":
            return 0
        if state in GIVEN_UP:
            print(f"launch.tpu_vm: the request is {state}; delete it and create it again", file=sys.stderr)
            return 1
        before = state
        time.sleep(POLL)


def _install(args: argparse.Namespace, tpu: Tpu) -> int:
    common.check_matches("--python", args.python, r"3\.1[1-9]", "3.12")
    common.check_matches("--ref", args.ref, r"[A-Za-z0-9][\w./~^-]*", "HEAD")
    archive = f"{args.name}.tar.gz"
    git = ["git", "-C", str(ROOT)]
    pack = [*git, "archive", "--format=tar.gz", f"--output={Path.cwd() / archive}", args.ref]
    if not args.dry_run and subprocess.run([*git, "diff", "--quiet", args.ref]).returncode:
        print(f"launch.tpu_vm: files differ from {args.ref}; what is not committed is not copied", file=sys.stderr)
    steps = (
        lambda: run_or_print(pack, args.dry_run),
        lambda: tpu.scp(archive, ""),
        lambda: tpu.ssh(install_script(args.name, args.python)),
    )
    return next((status for step in steps if (status := step())), 0)


def install_script(name: str, python: str) -> str:
    """What `install` runs on each host. The VMs' own Python may be too old, so uv brings one."""
    return f"""\
set -eu
mkdir -p "$HOME/{name}"
tar -xzf "$HOME/{name}.tar.gz" -C "$HOME/{name}"
cd "$HOME/{name}"
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python {python} .venv
python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu,gcs]'
.venv/bin/python -m launch.run --dry-run -- true >/dev/null
echo "$(hostname): installed"
"""


def _start(args: argparse.Namespace, tpu: Tpu) -> int:
    common.check_command(args.command)
    common.check_positive(timeout=args.timeout)
    if tpu.hosts > 1:
        common.check_folders(args.command, mounts=None, why=f"each of the {tpu.hosts} hosts would have its own")
    options = [f"--restarts={args.restarts}"] if args.restarts else []
    options += [f"--timeout={args.timeout:g}"] if args.timeout else []
    return tpu.ssh(run_script(args.name, tpu.slice.hosts(), args.slices, options, args.command))


def run_script(name: str, hosts: int, number: int, options: Sequence[str], command: Sequence[str]) -> str:
    """What `run` runs on each host: `launch.run`, with the host's number and the coordinator from the TPU's metadata.

    Args:
      hosts: of one slice.
      number: of slices.
    """
    launch = "nohup .venv/bin/python -m launch.run"
    words = shlex.join([*options, "--", *command])
    several = hosts * number > 1
    find = _FIND_HOST.format(hosts=hosts) if several else ""
    find += _FIND_SLICE.format(hosts=hosts, number=number) if number > 1 else ""
    place = f'--hosts {hosts * number} --host "$host" --coordinator "$first:{PORT}" ' if several else ""
    return f"""\
set -eu
cd "$HOME/{name}"
if [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then
  echo "$(hostname): a run is going on, process $(cat run.pid)" >&2
  exit 1
fi
{find}export PATH="$PWD/.venv/bin:$PATH"
{launch} {place}{words} >>run.log 2>&1 </dev/null &
echo $! >run.pid
echo "$(hostname): started, process $(cat run.pid)"
"""


# worker-network-endpoints is a list of addresses, or of NAME:NUMBER:ADDRESS on older software
_FIND_HOST = """\
metadata() {{
  curl --fail --silent --show-error --retry 5 --header 'Metadata-Flavor: Google' \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
host=$(metadata agent-worker-number)
endpoints=$(metadata worker-network-endpoints)
first=${{endpoints%%,*}}
first=${{first##*:}}
found=$(echo "$endpoints" | tr ',' '\\n' | wc -l)
if [ "$found" -ne {hosts} ]; then
  echo "$(hostname): this slice has $found hosts, not {hosts}: is --slice right?" >&2
  exit 1
fi
"""
_FIND_SLICE = """\
environment=$(metadata tpu-env)
value() {{
  echo "$environment" | sed -n "s/^$1: *'\\(.*\\)'\\$/\\1/p"
}}
if [ "$(value MEGASCALE_NUM_SLICES)" != {number} ]; then
  echo "$(hostname): this TPU has '$(value MEGASCALE_NUM_SLICES)' slices, not {number}: is --slices right?" >&2
  exit 1
fi
host=$(($(value MEGASCALE_SLICE_ID) * {hosts} + host))
first=$(value MEGASCALE_COORDINATOR_ADDRESS)
first=${{first%%:*}}
"""


def _logs(args: argparse.Namespace, tpu: Tpu) -> int:
    common.check_positive(lines=args.lines)
    log = f'"$HOME/{args.name}/run.log"'
    if args.follow:
        first = ["--worker=0"] + ([] if args.slices == 1 else ["--node=0"])
        return tpu.ssh(f"tail -n {args.lines} -F {log}", *first)
    if args.out is None:
        return tpu.ssh(f"tail -n {args.lines} {log}")
    folders = [args.out] if args.slices == 1 else [f"{args.out}/slice-{node}" for node in range(args.slices)]
    status = 0
    for node, folder in enumerate(folders):
        status = status or run_or_print(["mkdir", "-p", folder], args.dry_run)
        of_node = [] if args.slices == 1 else [f"--node={node}"]
        status = status or tpu.ssh(f"cat {log}", "--worker=all", *of_node, f"--output-directory={folder}")
    return status


def _stop(args: argparse.Namespace, tpu: Tpu) -> int:
    return tpu.ssh(stop_script(args.name))


def stop_script(name: str) -> str:
    """What `stop` runs on each host: launch.run passes SIGTERM on, and ends when its processes have saved."""
    return f"""\
set -eu
cd "$HOME/{name}"
if ! kill -TERM "$(cat run.pid)" 2>/dev/null; then
  echo "$(hostname): no run"
  exit 0
fi
while kill -0 "$(cat run.pid)" 2>/dev/null; do
  sleep 1
done
echo "$(hostname): stopped"
"""


def _delete(args: argparse.Namespace, tpu: Tpu) -> int:
    quiet = ["--quiet"] * args.yes
    if args.now:
        return tpu.call("delete", args.name, *quiet, kind="tpu-vm")
    return tpu.call("delete", args.name, "--force", *quiet, kind="queued-resources")


if __name__ == "__main__":
    sys.exit(main())
