"""Where a run's state comes from: its own checkpoints, another run's, weights, or nothing."""

import fnmatch
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from runtime_jax.config import config_changes, with_new_names
from runtime_jax.files import AnyPath
from runtime_jax.messages import cut
from runtime_jax.training.checkpoint import Checkpointer, DamagedCheckpointError, set_aside
from runtime_jax.workdir import absolute, output_folder

_LOG = logging.getLogger(__name__)


class InitialState(NamedTuple):
    """A run's state, the number of train steps it has seen, and where it comes from."""

    state: Any
    step: int
    origin: str


def initial_state(
    workdir: str | os.PathLike,
    abstract_state: Any,
    *,
    config: Mapping[str, Any],
    config_class: type | None = None,
    init: Callable[[], Any],
    init_from: Callable[[Any], Any] | None = None,
    resume_from: str | os.PathLike | None = None,
    must_match: Sequence[str] = (),
    may_differ: Sequence[str] = (),
) -> InitialState:
    """The state that a run starts from, by the first of these that exists:

    1. the newest readable checkpoint in `workdir`: a run started again goes on, whatever else is asked for;
    2. `resume_from`: a workdir, its `checkpoints` folder or one step's folder of another run, with its step;
    3. `init_from(init())`: weights put into a new state by the caller, step 0;
    4. `init()`: from scratch, step 0.

    Args:
        workdir: directory of this run.
        abstract_state: tree of jax.ShapeDtypeStruct with shardings: what the state is and where it belongs.
        config: resolved config of this run, compared with the checkpoint's.
        config_class: dataclass of that config, where fields have been renamed.
        init: makes a new state.
        init_from: gives that state other weights.
        resume_from: see 2.
        must_match: prefixes of dotted config keys (such as "model") which may not differ from the checkpoint's; a "*"
            stands for anything (as in "data.sources.*.split", that of every source).
        may_differ: exceptions from `must_match`, written in the same way.

    Raises:
        ValueError: the checkpoint is of another architecture, or differs in a `must_match` key.
        FileNotFoundError: `resume_from` holds no checkpoint.
        DamagedCheckpointError: no checkpoint of the workdir can be read, or `resume_from` cannot.
        WorkdirError: the workdir cannot be written.
    """
    path = output_folder(workdir)

    def barred(key: str) -> bool:
        return _is_under(key, must_match) and not _is_under(key, may_differ)

    def restored(checkpointer: Checkpointer, step: int) -> Any:
        saved = checkpointer.config(step)
        saved = saved if config_class is None else with_new_names(config_class, saved)
        _check_config(f"config of {checkpointer.path(step)}", config_changes(saved, config), barred)
        checkpointer.loop(step)  # if it is damaged, this is the time to find out
        return checkpointer.restore(abstract_state, step)

    with Checkpointer(path) as own:
        if own.steps():
            return _newest_readable(own, functools.partial(restored, own))
    if resume_from is not None:
        source, step = _locate(resume_from)
        with Checkpointer(source, read_only=True) as other:
            step = other.latest() if step is None else step
            if step not in other.steps():
                raise FileNotFoundError(f"resume_from {resume_from}: no complete checkpoint there")
            return InitialState(restored(other, step), step, f"resumed from {other.path(step)}")
    if init_from is not None:
        return InitialState(init_from(init()), 0, "init_from weights")
    return InitialState(init(), 0, "scratch")


def _newest_readable(own: Checkpointer, restore: Callable[[int], Any]) -> InitialState:
    """The newest checkpoint that can be read; damaged ones above it are set aside, so that their steps can be saved."""
    damaged: list[DamagedCheckpointError] = []
    for step in reversed(own.steps()):
        try:
            state = restore(step)
        except DamagedCheckpointError as error:
            _LOG.warning("passing over damaged checkpoint %s", error)
            damaged.append(error)
            continue
        for passed in own.steps():
            if passed > step:
                set_aside(own.path(passed))
        return InitialState(state, step, f"own checkpoint {own.path(step)}")
    # To start from scratch here would bury a run that can perhaps be saved.
    raise DamagedCheckpointError(f"{own.directory}: none of {len(damaged)} checkpoints can be read: {damaged[0]}")


def _check_config(where: str, changes: Mapping[str, str], barred: Callable[[str], bool]) -> None:
    forbidden = [line for key, line in changes.items() if barred(key)]
    if forbidden:
        raise ValueError(f"{where} differs from this run's in keys that must not change:\n  " + cut(forbidden, "\n  "))
    if changes:
        _LOG.warning("%s differs from this run's:\n  %s", where, cut(changes.values(), "\n  "))


def _is_under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether one of the prefixes is the key or a part of the config that the key is in."""
    return any(fnmatch.fnmatchcase(f"{key}.", f"{prefix}.*") for prefix in prefixes)


def _locate(path: str | os.PathLike) -> tuple[AnyPath, int | None]:
    """The workdir, and the step if one is named, of `workdir`, `workdir/checkpoints` or `workdir/checkpoints/300`."""
    path = absolute(path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parents[1], int(path.name)
    if path.name == "checkpoints":
        return path.parent, None
    return path, None
