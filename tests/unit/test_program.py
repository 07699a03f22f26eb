"""What is checked of a program before anything is compiled."""

import jax
import jax.numpy as jnp
import pytest
import toy_run

from runtime_jax.config import Duration
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.sharding import Axis
from runtime_jax.training import program as program_module
from runtime_jax.training.fit import fit
from runtime_jax.training.loop import LoopConfig
from runtime_jax.training.program import Program

RULES = (("kernel", (Axis.EMBED, Axis.MLP)), (".*", ()))


def program_of(sizes: dict[str, int], rows: int = 1024) -> Program:
    """4 KiB a row of kernel, and 2 KiB of bias; frozen: 6 KiB."""

    def init_state():
        return {"kernel": jnp.zeros((rows, 1024)), "bias": jnp.zeros(512)}

    mesh = make_mesh(MeshConfig(**sizes))
    frozen = {"embedding": jax.device_put(jnp.zeros((3, 512)), jax.NamedSharding(mesh, jax.P()))}
    return Program(init_state, lambda state, frozen, batch, variant: (state, {}), RULES, mesh, frozen)


@pytest.mark.parametrize(("sizes", "parts"), [({}, 1), ({"fsdp": 4}, 4), ({"fsdp": 4, "tensor": 2}, 8)], ids=str)
def test_the_memory_of_a_device_is_counted_to_the_byte(sizes, parts):
    program = program_of(sizes)
    need = 2**22 // parts + 2**11 + 3 * 2**11
    program.check_memory(need)
    with pytest.raises(ValueError, match=r"on each device, which has 0\.00: .* largest: state/kernel \(0\.00\)"):
        program.check_memory(need - 1)


def test_what_helps_is_named():
    message = (
        r"state and frozen parameters take 1\.00 GiB on each device, which has 0\.50: split them with a larger "
        r"mesh\.fsdp or mesh\.tensor \(now data=4, fsdp=2, tensor=1\), or take more devices; "
        r"the largest: state/kernel \(1\.00\)"
    )
    with pytest.raises(ValueError, match=message):
        program_of({"fsdp": 2}, rows=2**19).check_memory(2**29)


def test_a_run_is_refused_before_it_makes_a_state(tmp_path, monkeypatch):
    monkeypatch.setattr(program_module, "device_bytes", lambda mesh: 100)

    def unreachable(*args):
        raise AssertionError("the run went on")

    with pytest.raises(ValueError, match="state and frozen parameters take"):
        fit(
            toy_run.program(),
            workdir=tmp_path,
            config=LoopConfig(duration=Duration(steps=1)),
            resolved_config={},
            total_steps=1,
            batch_size=16,
            batches=unreachable,
            dtype="float32",
            init=unreachable,
        )


def test_a_run_says_what_the_mesh_does_not_divide(tmp_path, capsys):
    program = program_of({"fsdp": 4}, rows=1026)
    found = "mesh.fsdp=4 does not divide 1026 and leaves whole: kernel (dimension 0)"
    line = f"{found}; fsdp=2, fsdp=3, fsdp=6 would divide it"
    assert program.undivided == [line]
    with jax.set_mesh(program.mesh):
        fit(
            program,
            workdir=tmp_path,
            config=LoopConfig(duration=Duration(steps=0)),
            resolved_config={},
            total_steps=0,
            batch_size=16,
            batches=lambda step: iter(()),
            dtype="float32",
        )
    assert line in capsys.readouterr().out.splitlines()


def test_all_leaves_without_a_rule_are_listed():
    with pytest.raises(ValueError, match=r"cannot shard:\n  bias: no sharding rule matches.*\n  kernel: no sharding"):
        Program(
            lambda: {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}, lambda *_: None, (), make_mesh(MeshConfig())
        )


def test_cpus_do_not_tell_their_memory():
    program = program_of({})
    assert program_module.device_bytes(program.mesh) is None
    program.check_memory()
