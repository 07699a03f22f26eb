"""A whole training run: initial state, then the loop."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runtime_jax import hosts
from runtime_jax.cost import peak_flops
from runtime_jax.training import loop
from runtime_jax.training.initial_state import initial_state
from runtime_jax.training.program import Program


def fit(
    program: Program,
    *,
    workdir: Path,
    config: loop.LoopConfig,
    resolved_config: Mapping[str, Any],
    config_class: type | None = None,
    total_steps: int,
    batch_size: int,
    batches: Callable[[int], Iterator[loop.Batch]],
    dtype: str,
    variant: Callable[[int], Hashable] = lambda step: None,
    preview: Callable[[Any, int], Mapping[str, np.ndarray] | None] | None = None,
    evaluate: Callable[[Any, int], Mapping[str, float] | None] | None = None,
    init: Callable[[], Any] | None = None,
    init_from: Callable[[Any], Any] | None = None,
    resume_from: str | Path | None = None,
    must_match: Sequence[str] = (),
    may_differ: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> loop.Result:
    """Starts or resumes a training in `workdir`; call it under `jax.set_mesh(program.mesh)`.

    Args:
      workdir: of `only_writer`.
      config, resolved_config, total_steps, batches, variant, preview, evaluate: as in `loop.Loop`.
      batch_size: examples of a step, over all hosts.
      dtype: of the matmuls, for the MFU.
      init: makes a new state; None: `program.init`.
      config_class, init_from, resume_from, must_match, may_differ: as in `initial_state`.
      notes: lines to print before the first step.

    Raises:
      as `Program.check_memory`, `initial_state` and `loop.Loop.run`.
    """
    hosts.check_same("the config", resolved_config)
    program.check_memory()
    found = initial_state(
        workdir,
        program.abstract_state,
        config=resolved_config,
        config_class=config_class,
        init=init or program.init,
        init_from=init_from,
        resume_from=resume_from,
        must_match=must_match,
        may_differ=may_differ,
    )
    if jax.process_index() == 0:
        start = f"{workdir}: {total_steps} steps of {batch_size} images, from step {found.step} ({found.origin})"
        compiling = ["compiling the train step"] * (found.step < total_steps)  # silent for minutes on a CPU
        print("\n".join([start, *notes, *program.undivided, *compiling]), flush=True)
    return loop.Loop(
        config=config,
        workdir=workdir,
        resolved_config=resolved_config,
        total_steps=total_steps,
        program=program,
        batches=batches,
        preview=preview,
        evaluate=evaluate,
        variant=variant,
        peak_flops=peak_flops(program.mesh.devices.flat[0].device_kind, dtype),
    ).run(found.state, found.step)
