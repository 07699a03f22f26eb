"""Logical axis names for arrays, and the rules that place parameters and batches on a mesh.

Models only call `constrain`, which does nothing when no mesh is set.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from runtime_jax.mesh import MESH_AXES
from runtime_jax.messages import cut


class Axis(Enum):
    """Logical names of array dimensions."""

    BATCH = "batch"
    EMBED = "embed"
    MLP = "mlp"
    HEADS = "heads"
    VOCAB = "vocab"


# Which mesh axes split a logical axis.
_SPLIT_OVER: dict[Axis, tuple[str, ...]] = {
    Axis.BATCH: ("data", "fsdp"),
    Axis.EMBED: ("fsdp",),
    Axis.MLP: ("tensor",),
    Axis.HEADS: ("tensor",),
    Axis.VOCAB: ("tensor",),
}

# A rule: regular expression of the leaf's path within the parameters, and one logical axis (or None) for each of its
# dimensions. Two tuples fit a leaf of any rank: () replicates it, and IF_LARGE splits its last dimension over fsdp if
# it has more than LARGE numbers; a smaller one is not worth gathering.
Rule = tuple[str, tuple[Axis | EllipsisType | None, ...]]
IF_LARGE = (..., Axis.EMBED)
LARGE = 2**18  # numbers: 1 MiB in float32
EVERYWHERE: tuple[Rule, ...] = ((".*", ()),)  # small networks: a whole copy on every device


def partition_spec(shape: Sequence[int], axes: Sequence[Axis | None], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Spec of an array; where the mesh axes do not divide a dimension, fewer of them or none split it."""
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and not isinstance(axis, Axis):
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(str(a) for a in Axis)}, or None")
        names = () if axis is None else _SPLIT_OVER[axis]
        while names and size % math.prod(mesh_shape[name] for name in names):
            names = names[:-1]
        if used & set(names):
            raise ValueError(f"axes {tuple(axes)} would split two dimensions over the same mesh axis {names}")
        used |= set(names)
        entries.append(names or None)
    return PartitionSpec(*entries)


def platform() -> str:
    """The platform that a program is traced for ("cpu", "gpu", "tpu"): the mesh's, or the default without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: Shaped[Array, "..."], *axes: Axis | None) -> Shaped[Array, "..."]:
    """Fixes how `x` is laid out on the mesh set by `jax.set_mesh`; without one, `x` itself.

    `axes` has one logical axis per dimension, None for one that is not split.

    Raises:
        ValueError: unknown axis, or not one per dimension; without a mesh too, so that tests find it.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} axes {axes} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(x.shape, axes, dict.fromkeys(MESH_AXES, 1) if mesh.empty else mesh.shape)
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)


def gathered(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """A parameter that fsdp splits, whole on every device where it is used; `x` itself without fsdp."""
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape["fsdp"] > 1
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if split else x


def _leaf_spec(path: str, shape: Sequence[int], rules: Sequence[Rule], mesh: Mesh) -> PartitionSpec:
    """Spec of one leaf. The pattern must match the path or a suffix of it that starts after a '/'."""
    if math.prod(shape) == 1:
        return PartitionSpec()
    pattern, axes = _rule(path, shape, rules)
    try:
        return partition_spec(shape, axes, mesh.shape) if axes else PartitionSpec()
    except ValueError as error:
        raise ValueError(f"{path}: rule {pattern!r}: {error}") from None


def _rule(path: str, shape: Sequence[int], rules: Sequence[Rule]) -> tuple[str, tuple[Axis | None, ...]]:
    """The pattern that decides, and an axis or None for each dimension, or () for a leaf that is replicated."""
    for pattern, axes in rules:
        if re.search(rf"(?:^|/)(?:{pattern})$", path):
            if axes == IF_LARGE:
                axes = (*(None,) * (len(shape) - 1), Axis.EMBED) if math.prod(shape) > LARGE else ()
            if axes and len(axes) != len(shape):
                raise ValueError(f"{path}: rule {pattern!r} names {len(axes)} axes, the shape is {tuple(shape)}")
            return pattern, axes
    raise ValueError(f"{path}: no sharding rule matches (shape {tuple(shape)})")


def param_shardings(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Sharding of every leaf of a tree of parameters, or of a train state that embeds copies of them.

    The first rule whose pattern matches the '/'-joined path, or a suffix of it that starts after a '/', decides. So a
    rule written for `blocks/0/kernel` also places `opt_state/0/mu/blocks/0/kernel` and `ema/blocks/0/kernel`. Leaves of
    one element need no rule and are replicated. A dimension that the mesh axis does not divide is replicated.

    Raises:
        ValueError: lists every leaf that no rule matches or whose rank differs from its rule's.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    shardings, problems = [], []
    for key_path, leaf in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        try:
            shardings.append(NamedSharding(mesh, _leaf_spec(path, leaf.shape, rules, mesh)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("cannot shard:\n  " + cut(problems, "\n  "))
    return treedef.unflatten(shardings)


def sharded_shapes(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Shapes of a tree of arrays or shapes, with the shardings of `param_shardings`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        param_shardings(tree, rules, mesh),
    )


def shard_bytes(leaf: Any) -> int:
    """Bytes of a sharded array, or of its shape, on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def undivided(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> list[str]:
    """Lines that name leaves whose rule would split them over a mesh axis, but the axis does not divide a dimension.

    Leaves count that have more than LARGE numbers on each device; the lines also say what would divide.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        spec = _leaf_spec(path, leaf.shape, rules, mesh)
        if math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) <= LARGE:
            continue
        for dimension, (size, axis) in enumerate(zip(leaf.shape, _rule(path, leaf.shape, rules)[1], strict=False)):
            for name in () if axis is None else _SPLIT_OVER[axis]:
                if size % mesh.shape[name]:
                    found.setdefault((name, size), []).append(f"{path} (dimension {dimension})")
    lines = []
    for (name, size), leaves in found.items():
        would = cut(f"{name}={n}" for n in range(2, mesh.devices.size + 1) if size % n == 0)
        lines.append(
            f"mesh.{name}={mesh.shape[name]} does not divide {size} and leaves whole: {cut(leaves, most=2)}"
            + (f"; {would} would divide it" if would else "")
        )
    return lines


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, whole on every process, as global device arrays; `shardings` is a tree like `tree`."""

    def put(value: Any, sharding: NamedSharding) -> Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Host arrays as global device arrays, whole on every device."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [B, ...]."""
    return NamedSharding(mesh, PartitionSpec(_SPLIT_OVER[Axis.BATCH]))


def replicated_shapes(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays that `replicate` would make."""
    where = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def check_batch(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Checks that a global batch divides over the batch axes and into `accumulate` parts.

    Raises:
        ValueError: it does not; the message has the batch's `name`.
    """
    parts = math.prod(mesh.shape[axis] for axis in _SPLIT_OVER[Axis.BATCH]) * accumulate
    if size % parts:
        factors = {axis: mesh.shape[axis] for axis in _SPLIT_OVER[Axis.BATCH]} | {"accumulate": accumulate}
        shown = " x ".join(f"{factor}={n}" for factor, n in factors.items())
        raise ValueError(f"{name}={size} is not a multiple of {shown}: {parts}")


class Part(NamedTuple):
    """A process's part of every batch."""

    index: int
    count: int  # of parts


@functools.lru_cache
def batch_part(mesh: Mesh) -> Part:
    """Which part of a batch this process feeds: processes that share weights over `tensor` feed the same rows.

    Raises:
        ValueError: the rows of two processes overlap, or differ in number.
    """
    rows: dict[int, list[int]] = {}
    splits = math.prod(mesh.shape[axis] for axis in _SPLIT_OVER[Axis.BATCH])
    for device, (row,) in batch_sharding(mesh).devices_indices_map((splits,)).items():
        rows.setdefault(device.process_index, []).append(row.start or 0)
    parts = {process: tuple(sorted(set(own))) for process, own in rows.items()}
    distinct = sorted(set(parts.values()))
    if len({len(part) for part in distinct}) > 1 or sum(map(len, distinct)) != splits:
        raise ValueError(f"mesh {dict(mesh.shape)}: batches do not split evenly over {len(rows)} processes")
    return Part(distinct.index(parts[jax.process_index()]), len(distinct))


def own_rows(
    batches: Iterable[Mapping[str, Shaped[np.ndarray, "B ..."]]], mesh: Mesh
) -> Iterator[dict[str, Shaped[np.ndarray, "rows ..."]]]:
    """This process's rows of batches that every process makes as a whole.

    Raises:
        ValueError: the batch axes do not divide a batch.
    """
    index, count = batch_part(mesh)
    for batch in batches:
        for name, value in batch.items():
            check_batch(f"len(batch[{name!r}])", len(value), mesh)
        yield {name: np.split(value, count)[index] for name, value in batch.items()}


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global device arrays [B, ...], split over the batch axes, from this process's part of the rows (`batch_part`).

    Raises:
        ValueError: the batch axes do not divide the global batch.
    """
    sharding = batch_sharding(mesh)
    for name, value in batch.items():
        check_batch(f"len(batch[{name!r}])", len(value) * batch_part(mesh).count, mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def to_host(tree: Any) -> Any:
    """Device arrays, also those that lie on several processes, as host arrays, whole on every process.

    All processes call it together.
    """

    def whole(leaf: Any) -> Any:
        apart = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if apart else leaf

    return jax.device_get(jax.tree.map(whole, tree))
