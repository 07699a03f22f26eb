"""Runs a command line that is killed, or slowed down, on the way: hooked.py HOW STEP MODULE ARGUMENT ..."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runtime_jax import hosts
from runtime_jax.training.program import Program


def before_step(act: Any) -> None:
    """Calls act(step) before each step."""
    step = Program.step

    def hooked(self: Program, state: Any, batch: Any, variant: Any) -> Any:
        act(int(state.step))
        return step(self, state, batch, variant)

    Program.step = hooked


def die() -> None:
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(step: int) -> None:
    """Makes the process die when the checkpoint of this step is all written and about to get its final name."""
    rename = os.rename

    def rename_or_die(source: Any, target: Any) -> None:
        if Path(target).name == str(step):
            die()
        rename(source, target)

    os.rename = rename_or_die


if __name__ == "__main__":
    how, when, module, *arguments = sys.argv[1:]
    processes = hosts.find(os.environ)
    index, last = (0, 0) if processes is None else (processes.index, processes.count - 1)
    if how == "in-step" and index == last:
        before_step(lambda step: die() if step == int(when) else None)
    elif how == "in-save" and index == 0:  # which completes a checkpoint
        die_while_saving(int(when))
    elif how == "slowly":
        before_step(lambda step: time.sleep(float(when)))
    sys.exit(importlib.import_module(module).main(arguments))
