r"""Runs a command on a SLURM cluster: writes a batch script and submits it; `--dry-run` prints it.

    python -m launch.slurm gr-d64 --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu \
        --setup 'source ~/venv/bin/activate' -- \
        mergevq train --config mergevq_imagenet:gr-d64 --workdir /shared/gr-d64

Each node has one process with all of its GPUs; with `--task-per gpu`, each GPU has one. SLURM sends SIGTERM --grace
seconds before the time is over. The processes save, and the job goes back into the queue and resumes; so it does when a
process or a node is lost. `scancel` ends it for good.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import common
from launch.common import LaunchError, run_or_print
from runtime_jax.hosts import PORT

WAIT = 300  # seconds that srun gives the other tasks when one has ended: launch.run ends them before
PLAIN = r"[\w.,:/@%+=^~\[\]-]+"  # what an #SBATCH line takes without quotes


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="launch.slurm", description=__doc__, formatter_class=form)
    parser.add_argument("name", help="of the job")
    parser.add_argument("--nodes", type=int, default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8; 0: a run on CPUs")
    parser.add_argument(
        "--task-per", choices=("node", "gpu"), default="node", help="one process for each (default: node)"
    )
    parser.add_argument("--cpus-per-task", type=int, help="CPU cores of a process")
    parser.add_argument("--time", help="limit, such as 24:00:00 or 2-00:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="such as qos=high, mem=0")
    parser.add_argument("--grace", type=int, default=120, help="seconds from SIGTERM to the time limit (default: 120)")
    parser.add_argument("--requeues", type=int, default=50, help="times that the job may resume (default: 50)")
    parser.add_argument("--timeout", type=float, help="seconds until a silent host counts as lost")
    parser.add_argument("--log", default="%x-%j.out", help="file (default: NAME-JOB.out)")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="line of Bash that comes first")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    return common.main(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    text = script(args)
    if args.dry_run:
        print(f"{text}# submitted by: sbatch, with this as its input")
        return 0
    return run_or_print(["sbatch"], False, text=text)


def script(args: argparse.Namespace) -> str:
    """The batch script.

    Raises:
      LaunchError: an argument is wrong.
    """
    _check(args)
    tasks = args.gpus_per_node if args.task_per == "gpu" else 1
    options = {"job-name": args.name, "nodes": args.nodes, "ntasks-per-node": tasks}
    options |= {"gpus-per-node": args.gpus_per_node} if args.gpus_per_node else {}
    options |= {name: value for name in ("time", "partition", "account") if (value := getattr(args, name)) is not None}
    options |= {"cpus-per-task": args.cpus_per_task} if args.cpus_per_task else {}
    options |= {"signal": f"TERM@{args.grace}", "output": args.log, "open-mode": "append"}
    options |= dict(option.split("=", 1) for option in args.sbatch)
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    setup = "".join(f"{line}\n" for line in args.setup)
    return _SCRIPT.format(
        options="\n".join(lines),
        setup=setup,
        srun=_srun(args, tasks),
        port=PORT,
        requeues=args.requeues,
        status=_STATUS,
    )


def _check(args: argparse.Namespace) -> None:
    common.check_matches("name", args.name, r"[A-Za-z0-9][\w.-]*", "gr-d64")
    common.check_command(args.command)
    common.check_positive(nodes=args.nodes, cpus_per_task=args.cpus_per_task, grace=args.grace, timeout=args.timeout)
    if args.gpus_per_node < 0 or args.requeues < 0:
        raise LaunchError("--gpus-per-node and --requeues must not be negative")
    if args.task_per == "gpu" and args.gpus_per_node == 0:
        raise LaunchError("--task-per gpu needs --gpus-per-node of at least 1")
    if args.time is not None:
        common.check_matches("--time", args.time, r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", "24:00:00 or 2-00:00:00")
    for name in ("partition", "account", "log"):
        if (value := getattr(args, name)) is not None:
            common.check_matches(f"--{name}", value, PLAIN, "a name without spaces")
    for option in args.sbatch:
        common.check_matches("--sbatch", option, rf"[a-z][a-z-]*={PLAIN}", "qos=high")
    if any("\n" in line for line in args.setup):
        raise LaunchError("--setup takes one line; give it several times")
    if not (folder := Path(args.log).parent).is_dir():
        raise LaunchError(f"--log {args.log}: no folder {folder}, and SLURM does not make it")


def _srun(args: argparse.Namespace, tasks: int) -> str:
    """The call that starts `launch.run` in each task."""
    options = [f"--timeout={args.timeout:g}"] if args.timeout else []
    words = ["srun", "--kill-on-bad-exit=0", f"--wait={WAIT}"]
    words += (
        [f"--cpus-per-task={args.cpus_per_task}"] if args.cpus_per_task else []
    )  # srun does not take it from sbatch
    words += ["--gpu-bind=none"] if args.task_per == "gpu" else []  # else GPUs cannot reach each other's memory
    launch = "exec python -m launch.run"
    if args.nodes * tasks > 1:
        launch += ' --hosts "$SLURM_NTASKS" --host "$SLURM_PROCID" --coordinator "$COORDINATOR"'
    if args.task_per == "gpu":
        launch = f'export CUDA_VISIBLE_DEVICES="$SLURM_LOCALID"; {launch}'
    return shlex.join([*words, "bash", "-c", f'{launch} "$@"', "bash", *options, "--", *args.command])


_STATUS = " || ".join(f'[ "$status" -eq {status} ]' for status in common.RESUMED)
_SCRIPT = """\
#!/bin/bash
{options}
#SBATCH --requeue
{setup}set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export COORDINATOR="$first:$(({port} + 2 * (SLURM_JOB_ID % 2048)))" # two ports, so that jobs can share a node
{srun}
status=$?
# After scancel and preemption the job is no longer RUNNING, and SLURM has decided already whether it goes on.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && {{ {status}; }}; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
    echo "ended with status $status, resumes from the queue"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "ended with status $status after {requeues} requeues; submit it again to resume"
  fi
fi
exit "$status"
"""


if __name__ == "__main__":
    sys.exit(main())
