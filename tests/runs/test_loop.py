"""The train loop: resume is bit-equal however a run ends, metrics and times, non-finite stop, clear errors."""

import contextlib
import copy
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run
from run_tools import logged

from runtime_jax.config import ConfigError, Duration, build
from runtime_jax.training import loop
from runtime_jax.training.checkpoint import Checkpointer
from runtime_jax.training.logging import MetricWriter
from runtime_jax.training.program import Program
from runtime_jax.workdir import WorkdirError


def program_with(step) -> Program:
    """The toy's program with another method `step`."""
    program = copy.copy(toy_run.program())
    program.step = step
    return program


def assert_same_run(got: Path, want: Path) -> None:
    assert logged(got) == logged(want)
    with np.load(got / "final.npz") as a, np.load(want / "final.npz") as b:
        assert a.files == b.files
        for key in b.files:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    assert toy_run.train(workdir, 20)[1:] == (20, None)
    return workdir


def killed(workdir: Path, how: str, when: int) -> None:
    """A run in a process of its own that dies by SIGKILL."""
    env = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    command = [sys.executable, toy_run.__file__, str(workdir), how, str(when)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("how", "when", "left"), [("in-step", 16, {"6"}), ("in-save", 12, {"6", "12.orbax-checkpoint-tmp"})]
)
def test_killed_run_goes_on_bit_equal(tmp_path, whole, capsys, caplog, how, when, left):
    killed(tmp_path, how, when)
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left <= found or (how == "in-step" and "12.orbax-checkpoint-tmp" in found)
    toy_run.train(tmp_path, 20)
    assert "origin: own checkpoint" in capsys.readouterr().out
    if how == "in-save":
        assert f"passing over half-written checkpoint {tmp_path}/checkpoints/12.orbax-checkpoint-tmp" in caplog.text
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 13), (signal.SIGINT, 6), (signal.SIGTERM, 0)])
def test_signal_saves_and_stops_and_the_run_goes_on_bit_equal(tmp_path, whole, capsys, number, at):
    before = signal.getsignal(number)
    result = toy_run.train(tmp_path, 20, toy_run.signalled(number, at))
    assert result[1:] == (at + 1, number.name)
    assert signal.getsignal(number) is before
    assert (
        f"{number.name}: stopped after step {at + 1}, saved {tmp_path}/checkpoints/{at + 1}" in capsys.readouterr().out
    )
    toy_run.train(tmp_path, 20)
    assert_same_run(tmp_path, whole)


def test_an_evaluation_made_again_has_one_line(tmp_path):
    intervals = {"log_every": 7, "eval_every": 7, "checkpoint_every": 0}
    toy_run.train(tmp_path / "whole", 10, **intervals)
    run = tmp_path / "run"
    toy_run.train(run, 10, toy_run.signalled(signal.SIGTERM, 6), **intervals)  # stops before its evaluation
    with pytest.raises(ValueError):  # evaluates, and dies before it saves again
        toy_run.train(run, 10, lambda start: itertools.islice(toy_run.batches(start), 1), **intervals)
    assert [record.keys() - {"step"} for record in logged(run)] == [{"loss", "nonfinite"}, {"eval/norm"}]
    toy_run.train(run, 10, **intervals)
    assert logged(run) == logged(tmp_path / "whole")


class Batches(Iterator):
    """The toy's batches, with one file skipped at step 3 and two at step 8."""

    def __init__(self, start: int, signal_at: int | None = None):
        self.step, self.skipped, self.closed = start, {}, False
        self._batches = toy_run.signalled(signal.SIGTERM, signal_at)(start)

    def __next__(self) -> dict[str, np.ndarray]:
        for name in {3: ["a"], 8: ["a", "b"]}.get(self.step, ()):
            self.skipped[name] = self.skipped.get(name, 0) + 1
        self.step += 1
        return next(self._batches)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("end", ["last step", "signal", "error"])
def test_batches_are_closed_however_the_run_ends(tmp_path, end):
    opened = []

    def stream(start: int) -> Batches:
        opened.append(Batches(start, 2 if end == "signal" else None))
        return opened[-1]

    def failing(state, batch, variant):
        raise RuntimeError("no")

    options = {"program": program_with(failing)} if end == "error" else {}
    with pytest.raises(RuntimeError) if end == "error" else contextlib.nullcontext():
        toy_run.train(tmp_path, 4, stream, **options)
    assert [batches.closed for batches in opened] == [True]


def test_skipped_files_are_counted_over_restarts(tmp_path, capsys):
    toy_run.train(tmp_path / "whole", 15, Batches)
    assert [record.get("data/skipped") for record in logged(tmp_path / "whole") if "loss" in record] == [1.0, 2.0, None]
    said = capsys.readouterr().out
    assert re.search(r"step 10/15 .* unreadable images 2 ", said) and not re.search(r"step 15/15 .* unread", said)
    toy_run.train(tmp_path / "run", 15, lambda start: Batches(start, 3))
    toy_run.train(tmp_path / "run", 15, Batches)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_finished_run_has_nothing_to_do(tmp_path, whole, capsys):
    before = (whole / "metrics.jsonl").read_text()
    assert toy_run.train(whole, 20)[1:] == (20, None)
    assert "nothing to do: the state has seen 20 of 20 steps" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_text() == before


def test_batches_that_end(tmp_path):
    with pytest.raises(ValueError, match="the iterator ended before the last step"):
        toy_run.train(tmp_path, 20, lambda start: itertools.islice(toy_run.batches(start), 9))


def test_longer_run_goes_on(tmp_path, whole):
    toy_run.train(tmp_path, 10)
    assert toy_run.train(tmp_path, 20).step == 20
    with np.load(tmp_path / "final.npz") as a, np.load(whole / "final.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in b.files)


def test_what_a_run_leaves_and_says(tmp_path, capsys):
    def preview(state, step):
        return {"grid": np.full((4, 6, 3), step, np.uint8)}

    toy_run.train(tmp_path, 12, preview=preview, preview_every=8, peak_flops=1e9)
    assert [(r["step"], "loss" in r) for r in logged(tmp_path)] == [
        (5, True),
        (7, False),
        (10, True),
        (12, True),
        (12, False),
    ]
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"grid_00000008.png", "grid_00000012.png"}
    assert list((tmp_path / "tensorboard").iterdir())
    said = capsys.readouterr().out
    pattern = r"step 10/12  loss \S+  \S+ s/step  \S+ images/s/chip  MFU \S+%  data-wait \S+%  ETA 0:00:00\n"
    assert re.search(pattern, said), said
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.steps() == [6, 12] and checkpointer.config(12) == {"steps": 12}


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    toy_run.train(tmp_path, 6)
    assert "6/6" in sys.stderr.getvalue() and "loss" in sys.stderr.getvalue()


def nan_at(*bad: int):
    def stream(start: int) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(toy_run.batches(start), start):
            yield {**batch, "x": np.full_like(batch["x"], np.nan)} if step in bad else batch

    return stream


def test_nan_stops_after_so_many_in_a_row(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 12: .* in 3 updates in a row, all skipped; .* of step 6"):
        toy_run.train(tmp_path, 20, nan_at(3, 4, 6, 9, 10, 11), max_nonfinite=3)
    assert [record["nonfinite"] for record in logged(tmp_path) if "nonfinite" in record] == [2.0, 2.0, 2.0]


def test_count_in_a_row_goes_on_after_a_restart(tmp_path):
    bad = nan_at(*range(8, 20))

    def stream(start: int) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(bad(start), start):
            if step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    assert toy_run.train(tmp_path, 20, stream, max_nonfinite=4).step == 10
    with pytest.raises(FloatingPointError, match=r"step 12: .* in 4 updates in a row"):
        toy_run.train(tmp_path, 20, bad, max_nonfinite=4)


def test_skipped_update_changes_nothing_but_the_step():
    state = toy_run.init()
    new, _ = toy_run.update(state, next(nan_at(0)(0)))
    assert int(new.step) == 1
    jax.tree.map(np.testing.assert_array_equal, new.replace(step=state.step), state)


def test_first_step_of_each_variant_is_not_timed(tmp_path):
    seen = set()

    def slow_at_first(state, batch, variant):
        if variant not in seen:
            time.sleep(1.0)
            seen.add(variant)
        return toy_run.program().step(state, batch, None)

    program = program_with(slow_at_first)
    toy_run.train(tmp_path, 10, program=program, variant=lambda step: step // 5, checkpoint_every=0, log_every=4)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["time/step"] < 0.2 for record in records if "loss" in record] == [True, True, True]


def test_waiting_for_data_is_told(tmp_path):
    def slow(start: int) -> Iterator[dict[str, np.ndarray]]:
        for batch in toy_run.batches(start):
            time.sleep(0.05)
            yield batch

    toy_run.train(tmp_path, 10, slow, checkpoint_every=0, eval_every=0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["time/data_wait"] > 0.5 and records[1]["time/step"] > 0.035


@pytest.mark.parametrize(("bad", "message"), [("file", "cannot be written"), ("full", "disk full: a run needs")])
def test_bad_workdir_is_told_before_anything_runs(tmp_path, bad, message):
    (tmp_path / "file").write_text("")

    def never(*args):
        pytest.fail("the workdir was not looked at first")

    with pytest.raises(WorkdirError, match=message):
        loop.Loop(
            config=loop.LoopConfig(duration=Duration(steps=2), min_free_bytes=2**62 if bad == "full" else 0),
            workdir=tmp_path / bad,
            resolved_config={},
            total_steps=2,
            program=program_with(never),
            batches=never,
        ).run(None, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, "config: log_every, keep_checkpoints and max_nonfinite are at least 1"),
        ({"eval_every": -1}, "config: checkpoint_every, eval_every, preview_every and min_free_bytes are not negative"),
        ({"duration": {}}, "config.duration: give exactly one of steps, examples, epochs; got none"),
    ],
)
def test_bad_loop_config(changes, message):
    with pytest.raises(ConfigError) as info:
        build(loop.LoopConfig, {"duration": {"steps": 1}, **changes})
    assert str(info.value) == message


def test_writer_drops_later_and_cut_lines(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": float("nan") if step == 2 else float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    MetricWriter(tmp_path, 2).close()
    assert logged(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
