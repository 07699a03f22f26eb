"""Cost of gradient accumulation: train steps of the tiny tokenizer and of tiny-mergear in parts, on the same images.

XLA_FLAGS=--xla_backend_optimization_level=1 python benchmarks/accumulate.py

On a CPU the parts are unrolled in the program. The rows "as a loop" time the program of accelerators on this device.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mergevq_jax.generator import run as generator_run
from mergevq_jax.generator.model import GeneratorInfo, TokenizerRef
from mergevq_jax.tokenizer import run as tokenizer_run
from mergevq_jax.tokenizer import train as stage1
from mergevq_jax.tokenizer.model import load_tokenizer
from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.cost import table
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.training import accumulate
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.program import Program
from runtime_jax.training.update import Optimizer

KEEP, STEPS = 144, 4000


def tokenizer_program(parts: int, mesh: jax.sharding.Mesh) -> tuple[Program, int]:
    """The train step of configs/mergevq_tiny.py, and its batch size."""
    fields = config_lib.load("configs/mergevq_tiny.py", [f"accumulate={parts}"], new_keys=True)
    config = config_lib.build(tokenizer_run.TrainConfig, fields)
    optimizers = stage1.Optimizers(_optimizer(config.optimizer), _optimizer(config.discriminator_optimizer))
    step_config, frozen = tokenizer_run.load_frozen(config)
    return tokenizer_run.make_program(step_config, optimizers, mesh, frozen), config.data.batch_size


def _optimizer(config: OptimizerConfig) -> Optimizer:
    return Optimizer.make(config, total_steps=STEPS, batch_size=1)


def generator_program(parts: int, mesh: jax.sharding.Mesh) -> tuple[Program, int]:
    """The train step of configs/mergear_tiny.py:merge on images, and its batch size."""
    fields = config_lib.load("configs/mergear_tiny.py:merge", [f"accumulate={parts}"], new_keys=True)
    config = config_lib.build(generator_run.TrainConfig, fields)
    optimizer = _optimizer(config.optimizer)
    tokenizer = load_tokenizer(config.tokenizer)
    info = GeneratorInfo(
        kind=config.kind,
        window=config.window,
        classes=(),
        tokenizer=TokenizerRef(name=config.tokenizer, fingerprint=tokenizer.code_fingerprint()),
        architecture=config.model,
    )
    return generator_run.Run(config, tokenizer, info, optimizer, mesh).program, config.data.batch_size


class Timed:
    """A train step that records the time of each run."""

    def __init__(self, program: Program, batch: Mapping[str, Any]):
        self._program, self._batch, self._state = program, batch, program.init()
        self.compile_seconds = self._step()
        self.seconds: list[float] = []

    def _step(self) -> float:
        begin = time.perf_counter()
        self._state, metrics = self._program.step(self._state, self._batch, KEEP)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin

    def run(self) -> None:
        self.seconds.append(self._step())


class Case(NamedTuple):
    parts: int
    as_loop: bool = False

    def __str__(self) -> str:
        return "1" if self.parts == 1 else f"{self.parts}{', as a loop' if self.as_loop else ''}"


def measure(
    name: str, make: Callable[[int, jax.sharding.Mesh], tuple[Program, int]], cases: list[Case], repeats: int
) -> list[tuple[str, ...]]:
    """One row per case. The cases run in turn, so that other load on the machine affects all of them."""
    mesh, timed, own = make_mesh(MeshConfig()), {}, accumulate.platform
    with jax.set_mesh(mesh):
        for case in cases:
            program, size = make(case.parts, mesh)
            rng = np.random.default_rng(0)
            batch = {
                "image": rng.integers(0, 256, (size, 64, 64, 3), np.uint8),
                "label": np.zeros(size, np.int32),
                "example": np.arange(size, dtype=np.int64),
            }
            accumulate.platform = (lambda: "accelerator") if case.as_loop else own
            timed[case] = Timed(program, sharding.shard_batch(batch, mesh))
            accumulate.platform = own
        for _ in range(repeats):
            for one in timed.values():
                one.run()
    best = min(timed[cases[0]].seconds)
    return [
        (
            name,
            str(case),
            f"{min(one.seconds):.3f}",
            f"{np.median(one.seconds):.3f}",
            f"{min(one.seconds) / best:.2f}",
            f"{one.compile_seconds:.0f}",
        )
        for case, one in timed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    cases = [Case(1), *map(Case, args.parts), Case(4, as_loop=True)]
    rows = measure("tokenizer", tokenizer_program, cases, args.repeats)
    rows += measure("MergeAR", generator_program, cases, args.repeats)
    head = ("step", "parts", "s", "median", "of one part", "compile, s")
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
