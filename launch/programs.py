"""The programs that `launch.compile_ahead` compiles, from shapes alone, by the functions that a run calls."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mergevq_jax import cli as mergevq
from mergevq_jax.generator import inspect as generator
from mergevq_jax.teacher import inspect as teacher
from mergevq_jax.tokenizer import inspect as tokenizer
from runtime_jax import config as config_lib
from runtime_jax import sharding
from runtime_jax.mesh import make_mesh
from runtime_jax.training.program import Program
from tokenverse_jax.commands import inspect as tokenverse
from tokenverse_jax.commands.learn import LearnRunConfig


class Subject(NamedTuple):
    """A traced program on a mesh, with shapes and shardings of what lies on the devices all the time."""

    name: str
    mesh: Mesh
    traced: jax.stages.Traced
    held: Mapping[str, Any]  # such as parameters and state


class Request(NamedTuple):
    """What to compile of a config."""

    sample: bool = False  # the sampler instead of the train step
    keep: int | None = None  # K
    codes: bool = False  # a generator's step on codes, without its tokenizer
    batch_size: int | None = None  # of the sampler


STEP = Request()


def read(path: str, overrides: Sequence[str]) -> tuple[Any, str]:
    """The config of a training, and what it trains: "tokenizer", "generator", "teacher" or "concepts".

    Raises:
      ValueError: no such config, or impossible values.
    """
    if "words" not in (fields := config_lib.load(path, overrides, new_keys=True)):
        return mergevq.training(path, overrides)
    return config_lib.build(LearnRunConfig, fields, what="tokenverse learn"), "concepts"


def trace(config: Any, task: str, devices: Sequence[jax.Device], request: Request = STEP) -> Subject:
    """Traces what `request` asks for, on a mesh over these devices; compile it under `jax.set_mesh(subject.mesh)`.

    Raises:
      ValueError: devices or batch that the mesh does not fit, an impossible K, or a request that this config has not.
    """
    _check(task, request)
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        if request.sample:
            return _sampler(config, task, mesh, request)
        return _train_step(config, task, mesh, request)


def _check(task: str, request: Request) -> None:
    """Raises ValueError for what a program does not have."""
    if request.sample and task in ("tokenizer", "teacher"):
        raise ValueError(f"a {task} has no sampler; compile a generator's")
    if request.codes and (request.sample or task != "generator"):
        raise ValueError("--codes is for a generator's step")
    if request.keep is not None and task in ("concepts", "teacher"):
        raise ValueError("--keep is for tokenizers and generators")
    if request.batch_size is not None and not request.sample:
        raise ValueError("--batch-size is for --sample; that of a step is the config's (--config.data.batch_size=...)")


def _train_step(config: Any, task: str, mesh: Mesh, request: Request) -> Subject:
    if task == "concepts":
        program, batch, variant = tokenverse.abstract_step(config, mesh)
        sharding.check_batch("learn.batch_size", config.learn.batch_size, mesh)
        name = f"step at {config.size} px, batch {config.learn.batch_size}"
        name += ", with the isolation pair" if config.learn.isolation else ""
    elif task == "teacher":
        (program, batch), variant = teacher.abstract_step(config, mesh), None
        sharding.check_batch("data.batch_size", config.data.batch_size, mesh)
        name = f"step, {1 + len(config.data.views)} views, batch {config.data.batch_size}"
    else:
        abstract_step = tokenizer.abstract_step
        if task == "generator":
            abstract_step = functools.partial(generator.abstract_step, codes=request.codes)
        program, batch = abstract_step(config, mesh)
        variant = request.keep or max(config.merge_ratio.keeps)
        sharding.check_batch("data.batch_size", config.data.batch_size, mesh, config.accumulate)
        name = f"step, K = {variant}, batch {config.data.batch_size}"
    return Subject(name, mesh, program.trace(_split(batch, mesh), variant), _held(program))


def _sampler(config: Any, task: str, mesh: Mesh, request: Request) -> Subject:
    size = request.batch_size or mesh.shape["data"] * mesh.shape["fsdp"]
    if task == "concepts":
        params, traced = tokenverse.trace_generate(config, mesh, size)
        name = f"generate at {config.size} px, {config.sampling.num_steps} steps"
    else:
        keep = request.keep or config.preview_keep
        params, traced = generator.trace_sampling(config, mesh, size, keep)
        name = f"sample, K = {keep}"
    return Subject(f"{name}, batch {size}", mesh, traced, {"parameters": params})


def _split(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    where = sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in batch.items()}


def _held(program: Program) -> dict[str, Any]:
    state = program.abstract_state
    rest = {name: part for name, part in vars(state).items() if name != "params"}
    held = {"parameters": state.params, "state": rest}
    return held if program.frozen is None else {**held, "frozen": program.frozen}
