"""Checkpoints of a run (Orbax: asynchronous, atomic, the newest n kept).

Layout: `workdir/checkpoints/<step>/` holds three items or does not exist: `state` (the train state), `loop` (what the
train loop carries between steps) and `config` (the resolved config).

On a disk a checkpoint gets its name when it is complete. A bucket cannot rename: there the last object that is written,
`commit_success.txt`, marks a complete checkpoint.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from runtime_jax.files import AnyPath, is_dir, is_remote, remove_tree, size_of
from runtime_jax.messages import cut
from runtime_jax.workdir import WorkdirError, absolute, check_free

_LOG = logging.getLogger(__name__)
_TEMPORARY = ".orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"
# TensorStore's codes for files that are missing, cut short or overwritten; no memory or no permission has others.
_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing or cut short."""


class Checkpointer(contextlib.AbstractContextManager):
    """Reads and writes the checkpoints of one run.

    What a killed run left half-written is passed over with a warning and, unless `read_only`, set aside.
    All processes must call the same methods; process 0 writes what is not split over processes.

    Raises:
        FileNotFoundError: `read_only`, and there is no directory of checkpoints.
        CheckpointError: a URL other than gs://.
        BucketError: the permission to delete old checkpoints is missing.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        self.directory = absolute(workdir) / "checkpoints"
        if is_remote(self.directory) and not str(self.directory).startswith("gs://"):
            raise CheckpointError(f"{self.directory}: checkpoints can be on a disk or under gs://")
        if is_remote(self.directory) and not read_only:
            from runtime_jax.files import buckets

            buckets.check_checkpoints(self.directory)
        if read_only and not is_dir(self.directory):
            raise FileNotFoundError(f"{self.directory}: no such directory")
        self._pass_over_unfinished(read_only)
        options = ocp.CheckpointManagerOptions(
            create=not read_only, read_only=read_only, max_to_keep=None if read_only else keep
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "loop": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _pass_over_unfinished(self, read_only: bool) -> None:
        """Warns of directories that a killed save left behind; unless read_only, makes room for a save at that step."""
        for path in sorted(self.directory.glob("*")):
            if _TEMPORARY in path.name or (path.name.isdecimal() and not _is_committed(path)):
                _LOG.warning("passing over half-written checkpoint %s", path)
                if not read_only and jax.process_index() == 0:
                    remove_tree(path)
            elif path.name.isdecimal() and not _is_complete(path):
                if read_only:
                    _LOG.warning("passing over half-written checkpoint %s", path)
                else:
                    set_aside(path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint directory")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        paths = self.directory.glob("*")
        return sorted(int(path.name) for path in paths if path.name.isdecimal() and _is_complete(path))

    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> AnyPath:
        """Directory of one checkpoint."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, config: Mapping[str, Any], loop: Mapping[str, Any] | None = None) -> None:
        """Starts to write a checkpoint; returns when the state, copied to the host, may be donated.

        Args:
            step: number of train steps that the state has seen.
            config: resolved config, JSON-able.
            loop: what the train loop carries between steps, JSON-able.

        Raises:
            WorkdirError: the disk has too little room.
            CheckpointError: this save could not start, or the previous one failed.
        """
        self.wait()
        if jax.process_index() == 0:
            check_free(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)), f"checkpoint {step}")
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            loop=ocp.args.JsonSave(dict(loop or {})),
            config=ocp.args.JsonSave(dict(config)),
        )
        with _explained(self.path(step)):
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
            WorkdirError: the disk is full.
            CheckpointError: the save failed otherwise.
        """
        with _explained(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and stops the writing threads."""
        self.wait()
        self._manager.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def config(self, step: int) -> dict[str, Any]:
        """The resolved config that was saved with a checkpoint."""
        return self._json(step, "config")

    def loop(self, step: int) -> dict[str, Any]:
        """What the train loop saved with a checkpoint."""
        return self._json(step, "loop")

    def _json(self, step: int, item: str) -> dict[str, Any]:
        try:
            args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
            return self._manager.restore(step, args=args)[item]
        except ValueError as error:
            raise DamagedCheckpointError(f"{self.path(step) / item}: unreadable: {error}") from error

    def restore(self, abstract_state: Any, step: int) -> Any:
        """Reads the state of a step, bit-equal.

        Args:
            abstract_state: tree of arrays or jax.ShapeDtypeStruct, whose shardings the state gets.
            step: one of `steps()`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is of another architecture; lists the leaves that differ. Nothing was read.
            DamagedCheckpointError: files are missing or cut short.
        """
        if step not in self.steps():
            raise FileNotFoundError(f"{self.directory}: no checkpoint of step {step}")
        try:
            saved = self._manager.item_metadata(step)["state"].tree
        except ValueError as error:
            raise DamagedCheckpointError(f"{self.path(step)}: unreadable: {error}") from error
        differences = _differences(_leaves(saved), _leaves(abstract_state))
        if differences:
            raise ValueError(
                f"{self.path(step)} is a checkpoint of another architecture; {len(differences)} leaves differ:\n  "
                + cut(differences, "\n  ")
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            return self._manager.restore(step, args=args)["state"]
        except (ValueError, OSError) as error:
            unreadable = isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError)
            if unreadable or any(code in str(error) for code in _DAMAGE):
                raise DamagedCheckpointError(f"{self.path(step)}: unreadable: {error}") from error
            raise


@contextlib.contextmanager
def _explained(where: AnyPath) -> Iterator[None]:
    """Turns errors of writing into a WorkdirError if the disk is full, else into a CheckpointError."""
    try:
        yield
    except Exception as error:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        full = any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain)
        if full or "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise WorkdirError(f"{where}: disk full while a checkpoint was written: {error}") from error
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where}: a checkpoint could not be written: {what}") from error


def _is_committed(path: AnyPath) -> bool:
    """Whether the save of a step's directory ended; on a disk, its name says so."""
    return not is_remote(path) or size_of(path / _COMMITTED) > 0


def _is_complete(path: AnyPath) -> bool:
    """Whether a step's directory has the marks of a finished save."""
    marks = ("_CHECKPOINT_METADATA", "state/_METADATA", "loop/metadata", "config/metadata")
    return _is_committed(path) and all(size_of(path / mark) for mark in marks)


def set_aside(path: AnyPath) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again and nothing is lost."""
    aside = path.with_name(f"{path.name}.damaged")
    _LOG.warning("passing over half-written checkpoint %s (set aside as %s)", path, aside.name)
    if jax.process_index() != 0:
        return
    if is_remote(path):
        from runtime_jax.files import buckets

        buckets.move(path, aside)
        return
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _leaves(tree: Any) -> dict[str, str]:
    """Dtype and shape, such as "float32[4, 8]", by '/'-joined path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """One line for each leaf that is missing, extra or of another shape or dtype; parameters come first."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys(), key=lambda path: (not path.startswith("params/"), path)):
        if path not in saved:
            lines.append(f"{path}: {wanted[path]} is missing in the checkpoint")
        elif path not in wanted:
            lines.append(f"{path}: {saved[path]} in the checkpoint is not in the model")
        elif saved[path] != wanted[path]:
            lines.append(f"{path}: {saved[path]} in the checkpoint, {wanted[path]} in the model")
    return lines
