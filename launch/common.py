"""Shared parts of the launchers: the command after `--`, checks before anything runs, dry runs."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

RESUMED = (75, 143)  # exit statuses of launch.run after which the same command goes on: a lost process, SIGTERM
FOLDERS = ("--workdir", "--out")  # arguments of a command that name what it writes


class LaunchError(ValueError):
    """Something that the user can mend; nothing has been started."""


def main(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Runs a launcher; returns its exit status. A LaunchError becomes one line and status 2.

    Args:
      run: gets the arguments, and in `command` what follows `--`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser.parse_args(own)
    args.command = command
    try:
        return run(args)
    except LaunchError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def check_command(command: Sequence[str]) -> None:
    if not command or not command[0].strip():
        raise LaunchError("no command: give it after --, such as -- mergevq train --config ... --workdir ...")


def check_name(name: str, longest: int) -> None:
    """The rule of Google Cloud and Kubernetes."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > longest:
        rule = f"lower-case letters, digits and hyphens, a letter first, at most {longest} characters"
        raise LaunchError(f"name {name!r}: {rule}")


def check_matches(what: str, value: str, pattern: str, example: str) -> None:
    if not re.fullmatch(pattern, value):
        raise LaunchError(f"{what} {value!r}: expected something like {example}")


def check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise LaunchError(f"--{name.replace('_', '-')} {value:g}: must be at least 1")


def check_folders(command: Sequence[str], *, mounts: Sequence[str] | None, why: str) -> None:
    """Refuses a command that writes to a folder which is not kept.

    Args:
      mounts: folders that are kept; None: every absolute path may be one.
      why: what happens to other folders.
    """
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name not in FOLDERS:
            continue
        folder = value if equals else following
        if folder.startswith("gs://"):
            continue
        if "://" in folder:
            raise LaunchError(f"{name} {folder}: allowed are gs:// and paths of a file system")
        kept = folder.startswith("/") and (mounts is None or any(_is_in(folder, mount) for mount in mounts))
        if not kept:
            places = ["an absolute path of a shared file system"] if mounts is None else mounts
            raise LaunchError(f"{name} {folder}: {why}; use {' or '.join(places) or 'a folder of a --pvc'}, or gs://")


def _is_in(folder: str, mount: str) -> bool:
    return folder == mount or folder.startswith(mount.rstrip("/") + "/")


def run_or_print(command: Sequence[str], dry_run: bool, *, text: str | None = None) -> int:
    """Runs a program with `text` as its input, or prints how it would be called; the exit status."""
    if dry_run:
        print(shlex.join(command))
        return 0
    try:
        return subprocess.run(command, input=text, text=True).returncode
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed on this machine (--dry-run does without)") from None
