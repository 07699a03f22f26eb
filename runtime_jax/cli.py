"""What command lines share: sub-commands, config overrides, errors in one line, how a run ended."""

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

# Of one sub-command: its arguments and the overrides of its config; the exit status, or None for success.
Run = Callable[[argparse.Namespace, list[str]], int | None]


class CommandLine:
    """A program of sub-commands, each with a function that runs it."""

    def __init__(self, prog: str, description: str | None, *, advise: Callable[[Exception, str], str] | None = None):
        """`advise`: what else is said of an error (its second argument: `prog`), "" for nothing."""
        self.prog = prog
        self._advise = advise or (lambda error, prog: "")
        self._parser = argparse.ArgumentParser(prog=prog, description=description)
        self._parser.add_argument("--traceback", action="store_true", help="show where an error came from")
        self._commands = self._parser.add_subparsers(dest="command", required=True)

    def command(self, name: str, run: Run, help: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
        """The parser of a new sub-command; one with an argument --config also takes overrides of its values."""
        form = argparse.RawDescriptionHelpFormatter
        parser = self._commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=form)
        parser.set_defaults(run=run)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs one command; errors that a user can mend are one line and exit status 1."""
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
        try:
            try:
                return self._run(argv)
            finally:
                sys.stdout.flush()  # what it holds back, while a closed pipe can still be dealt with
        except BrokenPipeError:
            if not (closed := [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]):
                raise  # a pipe of the program's own
            for stream in closed:  # Python flushes them once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return 128 + signal.SIGPIPE

    def _run(self, argv: Sequence[str] | None) -> int:
        args, rest = self._parser.parse_known_args(argv)
        command = f"{self.prog} {args.command}"
        try:
            return args.run(args, _overrides(args, rest, command)) or 0
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:
            raise
        except Exception as error:
            from runtime_jax.training.checkpoint import CheckpointError  # here, for it takes a second

            if args.traceback or not isinstance(error, (ValueError, OSError, FloatingPointError, CheckpointError)):
                raise
            print(f"{command}: {error}{self._advise(error, self.prog)}", file=sys.stderr)
            return 1


def _is_closed_pipe(stream: TextIO) -> bool:
    """Whether nobody reads any more what is written there, as behind `| head`."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --workdir of a run."""
    parser.add_argument("--config", required=True, help="configs/FILE.py or configs/FILE.py:ARGUMENT")
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics, pictures and results go here")


def report_end(done: str, stopped_by: str | None, step: int) -> int:
    """Says how a run ended: `done`, or which signal stopped it; returns the exit status."""
    if stopped_by is None:
        print(done)
        return 0
    print(f"stopped by {stopped_by} after step {step}; the same command goes on from there")
    return 128 + signal.Signals[stopped_by]


def _overrides(args: argparse.Namespace, rest: Sequence[str], command: str) -> list[str]:
    """`--config.a.b=value` arguments as `a.b=value`; anything else that argparse left is an error."""
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
