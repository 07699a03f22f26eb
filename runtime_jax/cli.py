"""Shared parts of the command lines: sub-commands, config overrides, one-line errors, how a run ended."""

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from runtime_jax import hosts
from runtime_jax.files import AnyPath, path_of
from runtime_jax.training.stop import StoppedError

# (arguments of a sub-command, overrides of its config) -> exit status, or None for success
Run = Callable[[argparse.Namespace, list[str]], int | None]
TRACEBACK = {"action": "store_true", "help": "show where an error came from"}


class Group:
    """Sub-commands, each with a function that runs it, and groups of them.

    `parsers` has the parser of every command by its words, such as "evaluate generation".
    """

    def __init__(self, parser: argparse.ArgumentParser, name: str, parsers: dict[str, argparse.ArgumentParser]):
        self.parsers = parsers
        self._name = name
        self._commands = parser.add_subparsers(dest="command", required=True)

    def group(self, name: str, help: str) -> "Group":
        """A sub-command that only has sub-commands of its own."""
        parser = self._commands.add_parser(name, help=help, description=help)
        parser.add_argument("--traceback", **TRACEBACK, default=argparse.SUPPRESS)
        return Group(parser, f"{self._name} {name}".lstrip(), self.parsers)

    def command(
        self, name: str, run: Run, help: str, *, epilog: str | None = None, several: bool = False
    ) -> argparse.ArgumentParser:
        """The parser of a new sub-command; with an argument --config it also takes overrides of config values.

        `several`: it can run as several processes, see `runtime_jax.hosts`.
        """
        form = argparse.RawDescriptionHelpFormatter
        parser = self._commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=form)
        words = f"{self._name} {name}".lstrip()
        parser.set_defaults(run=run, several=several, command=words)
        parser.add_argument("--traceback", **TRACEBACK, default=argparse.SUPPRESS)  # keeps one before the command
        self.parsers[words] = parser
        return parser


class CommandLine(Group):
    """A program of sub-commands."""

    def __init__(self, prog: str, description: str | None, *, advise: Callable[[Exception, str], str] | None = None):
        """`advise`: (error, `prog`) -> the text of the error's line."""
        self.prog = prog
        self._advise = advise or (lambda error, prog: str(error))
        self._parser = argparse.ArgumentParser(prog=prog, description=description)
        self._parser.add_argument("--traceback", **TRACEBACK)
        super().__init__(self._parser, "", {})

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs one command; an error that a user can mend becomes one line and exit status 1."""
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
        try:
            try:
                return self._run(argv)
            finally:
                sys.stdout.flush()  # here, while a closed pipe can still be handled
        except BrokenPipeError:
            if not (closed := [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]):
                raise  # another pipe, one of the program's own
            for stream in closed:  # Python flushes them again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return 128 + signal.SIGPIPE

    def _run(self, argv: Sequence[str] | None) -> int:
        args, rest = self._parser.parse_known_args(argv)
        command = f"{self.prog} {args.command}"
        try:
            several = _meet(args, command, argv)
            status = args.run(args, overrides_of(args, rest, command)) or 0
            if several:
                hosts.barrier("end")  # at exit JAX waits only five minutes for a process that is still writing
            return status
        except StoppedError as stopped:
            print(stopped)
            return stopped.status
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:
            raise
        except Exception as error:
            from runtime_jax.training.checkpoint import CheckpointError  # here: it takes a second

            if args.traceback or not isinstance(error, (ValueError, OSError, FloatingPointError, CheckpointError)):
                raise
            print(f"{command}: {self._advise(error, self.prog)}", file=sys.stderr)
            return 1


def _meet(args: argparse.Namespace, command: str, argv: Sequence[str] | None) -> bool:
    """Joins the other processes of the run, if there are any, and says whether; process 0 prints for all of them."""
    if (processes := hosts.find(os.environ)) is None:
        return False
    if not args.several:
        raise ValueError(f"this command runs as one process, but the environment describes {processes.count}")
    hosts.start(processes, [command, *(sys.argv[1:] if argv is None else argv)])
    if processes.index > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return True


def _is_closed_pipe(stream: TextIO) -> bool:
    """Whether the reader of the stream is gone, as after `| head`."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir of a run."""
    parser.add_argument("--config", required=True, help="NAME:ARGUMENT of a shipped config, or a path FILE.py:ARGUMENT")
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics, pictures and results go here")


def path(text: str) -> AnyPath:
    """The type of an argument that is a path, or the URL of a bucket."""
    try:
        return path_of(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def report_end(done: str, stopped_by: str | None, step: int) -> None:
    """Prints `done`; raises StoppedError if a signal stopped the run."""
    if stopped_by is not None:
        raise StoppedError(stopped_by, f" after step {step}; the same command goes on from there")
    print(done)


def overrides_of(args: argparse.Namespace, rest: Sequence[str], command: str) -> list[str]:
    """`--config.a.b=value` arguments as `a.b=value`; any other argument that argparse left is an error."""
    overrides, rest = [], list(rest)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--config.") or not getattr(args, "config", None):
            raise ValueError(f"unknown argument {item!r}; see {command} --help")
        if "=" not in item:
            if not rest:
                raise ValueError(f"{item}: a value is missing (--config.key=value)")
            item = f"{item}={rest.pop(0)}"
        overrides.append(item.removeprefix("--config."))
    return overrides
