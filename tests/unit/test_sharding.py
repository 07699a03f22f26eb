"""Meshes, constraints that constrain, rules by suffix, and equal values on every mesh."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import toy_run
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from runtime_jax.sharding import (
    MESH_AXES,
    Axis,
    MeshConfig,
    batch_part,
    constrain,
    make_mesh,
    own_rows,
    param_shardings,
    replicated,
    shard_batch,
)

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def mesh_of(*sizes: int):
    return make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))))


def test_mesh_fills_the_devices():
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=1), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), r"mesh \(data=2, fsdp=2, tensor=1\) needs 4 devices, but there are 8"),
        ((-1, 3, 1), r"mesh \(data=-1, fsdp=3, tensor=1\) needs a multiple of 3 devices, but there are 8"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "sizes are positive"),
    ],
)
def test_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(*sizes)


def test_constrain_constrains_inside_jit():
    mesh = mesh_of(2, 2, 2)
    x = jnp.ones((8, 3, 4))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: constrain(x * 2, Axis.BATCH, None, Axis.MLP)).lower(x).compile()
    want = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    assert compiled.output_shardings.is_equivalent_to(want, 3)
    plain = jax.jit(lambda x: x * 2).lower(x).compile().output_shardings
    assert not plain.is_equivalent_to(want, 3), "the constraint, not chance, made the layout"


def test_constrain_splits_what_divides():
    with jax.set_mesh(mesh_of(2, 2, 2)):
        out = jax.jit(lambda x: constrain(x, Axis.BATCH, Axis.MLP))(jnp.ones((6, 3)))
    assert out.sharding.spec == PartitionSpec("data")


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.ones((4, 4))
    assert constrain(x, Axis.BATCH, None) is x


def test_constrain_refuses():
    x = jnp.ones((4, 4))
    with pytest.raises(ValueError, match=r"constrain: 1 axes .* for an array of shape \(4, 4\)"):
        constrain(x, Axis.BATCH)
    with pytest.raises(ValueError, match="would split two dimensions over the same mesh axis"):
        constrain(x, Axis.MLP, Axis.HEADS)


@pytest.fixture
def no_type_hook():
    """What a user has: the types are not checked, so the function itself must."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_unknown_axis_raises(no_type_hook):
    with pytest.raises(ValueError, match=r"unknown logical axis 'mlp'; known: Axis\.BATCH, .*, or None"):
        constrain(jnp.ones((4, 4)), None, "mlp")
    tree = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(ValueError, match="kernel: rule 'kernel': unknown logical axis 'mlp'"):
        param_shardings(tree, (("kernel", (None, "mlp")),), mesh_of(2, 2, 2))


def test_rules_place_copies_of_the_parameters_alike():
    mesh = mesh_of(2, 2, 2)
    shardings = param_shardings(jax.eval_shape(toy_run.init), toy_run.RULES, mesh)
    kernel = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    adam = shardings.opt_state[0]
    for tree in (shardings.params, shardings.ema, adam.mu, adam.nu):
        assert tree["first"]["kernel"].is_equivalent_to(kernel, 2)
        assert tree["first"]["bias"].is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor")), 1)
    assert shardings.step == adam.count == replicated(mesh)


def test_dimension_that_does_not_divide_is_replicated():
    tree = {"kernel": jax.ShapeDtypeStruct((6, 5), jnp.float32)}
    sharding = param_shardings(tree, (("kernel", (Axis.EMBED, Axis.MLP)),), mesh_of(2, 2, 2))["kernel"]
    assert sharding.spec == PartitionSpec("fsdp", None)


def test_bad_rules_are_all_listed():
    leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    tree = {"a": {"kernel": leaf}, "b": {"kernel": leaf, "skernel": leaf}}
    with pytest.raises(ValueError) as info:
        param_shardings(tree, (("b/kernel", (Axis.EMBED,)),), mesh_of(2, 2, 2))
    assert str(info.value).splitlines()[1:] == [
        "  a/kernel: no sharding rule matches (shape (4, 4))",
        "  b/kernel: rule 'b/kernel' names 1 axes, the shape is (4, 4)",
        "  b/skernel: no sharding rule matches (shape (4, 4))",
    ]


def test_batch_is_split_and_must_divide():
    mesh = mesh_of(2, 2, 2)
    batch = shard_batch({"image": np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)}, mesh)
    assert batch["image"].sharding.shard_shape((8, 3)) == (2, 3)
    with pytest.raises(ValueError, match=r"batch\['x'\]: 6 examples do not divide over data x fsdp = 4 parts"):
        shard_batch({"x": np.zeros((6, 1))}, mesh)
    with pytest.raises(ValueError, match="6 examples do not divide"):
        next(own_rows([{"x": np.zeros((6, 1))}], mesh))


class Device:
    """A device of a process that is not there."""

    def __init__(self, number, process):
        self.id, self.process_index, self.platform = number, process, "cpu"


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(
    ("sizes", "parts"),  # of 4 devices, and parts of a batch on 1, 2 and 4 processes
    [
        ((4, 1, 1), (1, 2, 4)),
        ((2, 2, 1), (1, 2, 4)),
        ((2, 1, 2), (1, 2, 2)),
        ((1, 2, 2), (1, 2, 2)),
        ((1, 1, 4), (1, 1, 1)),
    ],
)
def test_parts_are_the_whole_batch_and_common_to_processes_that_share_weights(sizes, parts, processes, monkeypatch):
    devices = [Device(number, number * processes // 4) for number in range(4)]
    mesh, batch = Mesh(np.asarray(devices, object).reshape(sizes), MESH_AXES), {"example": np.arange(24, 32)}
    read: dict[int, list[int]] = {}
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        batch_part.cache_clear()
        index, count = batch_part(mesh)
        assert count == parts[(1, 2, 4).index(processes)]
        (rows,) = own_rows([batch], mesh)
        assert read.setdefault(index, rows["example"].tolist()) == rows["example"].tolist()
    batch_part.cache_clear()
    assert np.concatenate([read[index] for index in sorted(read)]).tolist() == batch["example"].tolist()


def test_processes_whose_rows_overlap_are_refused():
    devices = [Device(number, process) for number, process in enumerate((0, 0, 0, 1))]
    batch_part.cache_clear()
    with pytest.raises(ValueError, match="batches do not split evenly over 2 processes"):
        batch_part(Mesh(np.asarray(devices, object).reshape(2, 1, 2), MESH_AXES))


@pytest.fixture(scope="module")
def one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return steps_on(mesh)


def steps_on(mesh):
    """Loss and parameters after three steps."""
    state = toy_run.init()
    state = jax.device_put(state, param_shardings(state, toy_run.RULES, mesh))
    losses, update = [], jax.jit(toy_run.update, donate_argnums=0)
    with jax.set_mesh(mesh):
        for batch, _ in zip(toy_run.batches(0), range(3), strict=False):
            state, metrics = update(state, shard_batch(batch, mesh))
            losses.append(metrics["loss"][0])
    return jax.tree.map(np.asarray, (losses, state))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_equal_one_device(sizes, one_device):
    got = steps_on(mesh_of(*sizes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, one_device)
