"""A two-layer regression for the tests of checkpoints and loop; a program of its own, so that it can be killed."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hooked import kill_while_saving

from runtime_jax import hosts
from runtime_jax.config import Duration
from runtime_jax.files import path_of, replacing
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.prng import Stream, host_rng, stream_key
from runtime_jax.sharding import Axis, constrain, replicated
from runtime_jax.training import loop
from runtime_jax.training.initial_state import initial_state
from runtime_jax.training.program import Program

RULES = ((".*/kernel", (Axis.EMBED, Axis.MLP)), (".*/bias", (Axis.MLP,)))
BATCH = 16
TX = optax.adamw(1e-2)


@flax.struct.dataclass
class State:
    """Train state of the toy."""

    step: Any
    params: Any
    opt_state: Any
    ema: Any


def init(width: int = 8) -> State:
    """A new state; `width` changes the architecture."""
    keys = jax.random.split(stream_key(0, Stream.PARAMS))
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (4, width)), "bias": jnp.zeros(width)},
        "second": {"kernel": jax.random.normal(keys[1], (width, 2)), "bias": jnp.zeros(2)},
    }
    return State(jnp.int32(0), params, TX.init(params), jax.tree.map(jnp.copy, params))


def loss_fn(params: Any, batch: Any) -> Any:
    """Mean squared error, both layers' outputs constrained."""
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    hidden = constrain(hidden, Axis.BATCH, Axis.MLP)
    out = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    # Without this one the CPU partitioner returns wrong gradients on a 2x2x2 mesh, and no error.
    out = constrain(out, Axis.BATCH, None)
    return jnp.mean((out - batch["y"]) ** 2)


def update(state: State, batch: Any) -> tuple[State, dict]:
    """One update; skipped and counted where the loss is not finite."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    good = jnp.isfinite(loss)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = State(state.step, params, opt_state, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params))
    new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state).replace(step=state.step + 1)
    metrics = {"loss": (jnp.where(good, loss, 0.0), good), "nonfinite": (1 - good.astype(int), jnp.int32(1))}
    return new, metrics


@functools.cache
def program() -> Program:
    """The toy's program on all devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    return Program(init, lambda state, frozen, batch, variant: update(state, batch), RULES, mesh)


def batches(start: int, nan_from: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Batch s as a function of s; NaN from one step on, if wanted."""
    while True:
        rng = host_rng(0, Stream.DATA, start)
        x = rng.normal(size=(BATCH, 4)).astype(np.float32)
        if nan_from is not None and start >= nan_from:
            x[:] = np.nan
        yield {"x": x, "y": np.sin(x[:, :2])}
        start += 1


def train(workdir: Path, steps: int, stream: Callable[[int], Iterator] = batches, **options: Any) -> loop.Result:
    """A whole run on all devices: initial state, loop, and the final state as `final.npz`.

    `options` are fields of LoopConfig and Loop.
    """
    intervals = {"log_every": 5, "checkpoint_every": 6, "eval_every": 7, "min_free_bytes": 0}
    intervals |= {field.name: options.pop(field.name) for field in fields(loop.LoopConfig) if field.name in options}
    with jax.set_mesh(program().mesh):
        state, step, origin = initial_state(
            workdir, program().abstract_state, config={"steps": steps}, init=program().init
        )
        print("origin:", origin, flush=True)
        arguments = {
            "config": loop.LoopConfig(duration=Duration(steps=steps), **intervals),
            "workdir": workdir,
            "resolved_config": {"steps": steps},
            "total_steps": steps,
            "program": program(),
            "batches": stream,
            "evaluate": lambda state, step: {"norm": optax.tree.norm(state.params)},
        }
        result = loop.Loop(**arguments | options).run(state, step)
        whole = jax.jit(lambda state: state, out_shardings=replicated(program().mesh))(result.state)
    if jax.process_index() == 0:
        leaves = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(whole)}
        with replacing(workdir / "final.npz") as new:
            np.savez(new, **leaves)
    return result


def share(stream: Callable[[int], Iterator]) -> Callable[[int], Iterator]:
    """This process's rows of each batch."""
    rows = BATCH // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return lambda start: ({name: value[mine] for name, value in batch.items()} for batch in stream(start))


def signalled(number: signal.Signals, at: int) -> Callable[[int], Iterator]:
    """Batches that send a signal to this process when that of step `at` is asked for."""

    def stream(start: int) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(batches(start), start):
            if step == at:
                os.kill(os.getpid(), number)
            yield batch

    return stream


def slowed(seconds: float) -> Callable[[int], Iterator]:
    """Batches that take their time."""

    def stream(start: int) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches(start):
            time.sleep(seconds)
            yield batch

    return stream


if __name__ == "__main__":
    folder, how, when = sys.argv[1:]
    processes = hosts.find(os.environ)
    if processes is not None:
        hosts.start(processes, sys.argv[1:], timeout=60.0)
    if how == "in-save-once":
        how = "whole" if (path_of(folder) / "checkpoints").exists() else "in-save"
    if processes is not None and processes.index > 0 and how == "in-save":  # process 0 completes a checkpoint
        how = "whole"
    if how == "in-save":
        kill_while_saving(int(when))
    stream = signalled(signal.SIGKILL, int(when)) if how == "in-step" else batches
    if how == "slowly":
        stream = slowed(float(when))
    ended = train(path_of(folder), 20, share(stream))
    sys.exit(0 if ended.stopped_by is None else 128 + signal.Signals[ended.stopped_by])
