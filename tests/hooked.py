"""Runs command lines in one process that is killed, or slowed down, on the way.

    hooked.py HOW COMMAND:WHEN "MODULE ARGUMENT ..." "MODULE ARGUMENT ..." ...

HOW is one of
  whole    nothing happens;
  in-step  the last process is killed before step WHEN of the training with number COMMAND;
  in-part  a process is killed when its part WHEN of an evaluation is about to get its final name;
  in-save  process 0 is killed when its checkpoint of step WHEN is about to get its final name;
  slowly   every step, or encoded batch, of that command takes WHEN seconds longer.
"""

import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath

from runtime_jax import hosts


def kill() -> None:
    """Ends this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(step: int, now: Callable[[], bool] = lambda: True) -> None:
    """Kills the process when the checkpoint of this step is all written and about to get its final name or mark."""
    rename, finalize = os.rename, CommitFileTemporaryPath.finalize

    def rename_or_die(source: Any, target: Any) -> None:
        if Path(target).name == str(step) and now():
            kill()
        rename(source, target)

    async def finalize_or_die(temporary: CommitFileTemporaryPath) -> None:  # in a bucket
        if temporary.get_final().name == str(step) and now():
            kill()
        await finalize(temporary)

    os.rename, CommitFileTemporaryPath.finalize = rename_or_die, finalize_or_die


def kill_in_part(number: int, now: Callable[[], bool]) -> None:
    """Kills the process when this part of an evaluation is all written and about to get its final name."""
    replace = os.replace

    def replace_or_die(source: Any, target: Any) -> None:
        if Path(target).name == f"{number:06d}.npz" and now():
            kill()
        replace(source, target)

    os.replace = replace_or_die


def before(owner: type, name: str, act: Callable[..., None]) -> None:
    """Calls `act` with the same arguments before each call of a method."""
    method = getattr(owner, name)

    def hooked(*args: Any, **options: Any) -> Any:
        act(*args)
        return method(*args, **options)

    setattr(owner, name, hooked)


def main(how: str, at: str, *lines: str) -> int:
    """Runs the command lines until one fails; returns its status."""
    from mergevq_jax.tokenizer.model import Tokenizer
    from runtime_jax.training.program import Program

    processes, done = hosts.find(os.environ), []
    command, when = at.split(":")
    index, last = (0, 0) if processes is None else (processes.index, processes.count - 1)

    def now() -> bool:
        return len(done) == int(command)

    def step(program: Program, state: Any, *_: Any) -> None:
        if now() and how == "slowly":
            time.sleep(float(when))
        elif now() and how == "in-step" and index == last and int(state.step) == int(when):
            kill()

    before(Program, "step", step)
    before(Tokenizer, "encode", lambda *_: time.sleep(float(when) if now() and how == "slowly" else 0))
    if how == "in-save" and index == 0:  # which completes a checkpoint
        kill_while_saving(int(when), now)
    if how == "in-part":
        kill_in_part(int(when), now)
    for line in lines:
        module, *arguments = shlex.split(line)
        if status := importlib.import_module(module).main(arguments):
            return status
        hosts.start = lambda *_: None  # once for all
        done.append(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
