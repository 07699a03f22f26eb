"""Meshes, constraints that constrain, rules by suffix, and equal values on every mesh."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import toy_run
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from runtime_jax import config
from runtime_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from runtime_jax.sharding import (
    IF_LARGE,
    Axis,
    batch_part,
    check_batch,
    constrain,
    own_rows,
    param_shardings,
    replicated,
    shard_batch,
    undivided,
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


@pytest.fixture
def no_type_hook():
    """What a user has: the types are not checked, so the function itself must, and chips may be stand-ins."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@dataclass(frozen=True)
class Chip:
    """A TPU that is not there."""

    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0


def slices_of_chips(count):
    """Slices of 2 x 4 chips, in an order that is not theirs."""
    chips = [Chip(index, (x, y, 0)) for y in range(4) for x in range(2) for index in range(count)]
    return chips[::-1]


@pytest.mark.parametrize("given", [{}, {"slices": 2}], ids=str)
def test_each_slice_holds_whole_replicas(given, no_type_hook):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, **given), slices_of_chips(2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh.devices] == [{0}, {0}, {1}, {1}]
    assert len(set(mesh.devices.flat)) == 16


def test_sizes_that_split_a_side_of_the_torus(no_type_hook):
    """jax.make_mesh has no layout for a pair along a side of 4."""
    mesh = make_mesh(MeshConfig(fsdp=4), [Chip(0, (x, y, 0)) for x, y in itertools.product(range(4), repeat=2)])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 1}
    mesh = make_mesh(MeshConfig(fsdp=2), slices_of_chips(1)[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"slices": 4}, "slices=4, but the devices belong to 2"),
        ({"fsdp": 16}, r"\(data=-1, fsdp=16, tensor=1\) makes data=1, but 2 slices of 8 devices need a multiple of 2"),
        ({"slices": 0}, "slices=0 must be at least 1, or -1"),
    ],
)
def test_slices_that_do_not_fit(sizes, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes), slices_of_chips(2))


def test_slices_of_different_sizes(no_type_hook):
    with pytest.raises(ValueError, match="15 devices cannot be 2 slices of one size"):
        make_mesh(MeshConfig(), slices_of_chips(2)[1:])


def test_other_devices_stand_for_slices():
    assert dict(make_mesh(MeshConfig(fsdp=2, slices=4)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="makes data=2, but 4 slices of 2 devices need a multiple of 4"):
        make_mesh(MeshConfig(fsdp=4, slices=4))


def test_configs_of_before_have_no_slices():
    saved = {"data": -1, "fsdp": 2, "tensor": 1}
    assert config.build(MeshConfig, saved) == MeshConfig(fsdp=2) and config.to_dict(MeshConfig(fsdp=2)) == saved


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


def test_only_large_leaves_are_split():
    tree = {"large": jax.ShapeDtypeStruct((3, 3, 256, 256), jnp.bfloat16), "small": jax.ShapeDtypeStruct((3, 8), "f4")}
    placed = param_shardings(tree, ((".*", IF_LARGE),), mesh_of(2, 2, 2))
    assert placed["large"].spec == PartitionSpec(None, None, None, "fsdp")
    assert placed["small"].spec == PartitionSpec()


def test_large_leaves_that_do_not_divide_are_named():
    mesh, rules = mesh_of(1, 4, 2), (("kernel|mu", (Axis.EMBED, Axis.MLP)), (".*", ()))
    wide = jax.ShapeDtypeStruct((1000, 2001), jnp.float32)
    tree = {
        "divided": {"kernel": jax.ShapeDtypeStruct((1000, 2000), jnp.float32)},
        "odd": {"kernel": wide, "mu": wide},
        "replicated": wide,
        "small": {"kernel": jax.ShapeDtypeStruct((10, 21), jnp.float32)},
        "tall": {"kernel": jax.ShapeDtypeStruct((1002, 2000), jnp.float32)},
    }
    assert undivided(tree, rules, mesh) == [
        "mesh.tensor=2 does not divide 2001 and leaves whole: odd/kernel (dimension 1), odd/mu (dimension 1); "
        "tensor=3 would divide it",
        "mesh.fsdp=4 does not divide 1002 and leaves whole: tall/kernel (dimension 0); "
        "fsdp=2, fsdp=3, fsdp=6 would divide it",
    ]
    assert undivided(tree, rules, mesh_of(8, 1, 1)) == []


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
    with pytest.raises(
        ValueError, match=r"len\(batch\['x'\]\)=6 is not a multiple of data=2 x fsdp=2 x accumulate=1: 4"
    ):
        shard_batch({"x": np.zeros((6, 1))}, mesh)
    with pytest.raises(ValueError, match=r"len\(batch\['x'\]\)=6 is not a multiple"):
        next(own_rows([{"x": np.zeros((6, 1))}], mesh))
    check_batch("data.batch_size", 24, mesh, accumulate=3)
    with pytest.raises(ValueError, match=r"data\.batch_size=16 is not a multiple of .* x accumulate=3: 12"):
        check_batch("data.batch_size", 16, mesh, accumulate=3)


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
