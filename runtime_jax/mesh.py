"""The one device mesh of three axes.

`data` has replicas, `fsdp` splits batch and parameters, `tensor` splits heads and hidden widths. Of several TPU slices,
each holds whole replicas: only `data` crosses the network between them. The program that runs (train loop, command
line) makes the mesh and enters it once with `jax.set_mesh`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from runtime_jax.config import added

MESH_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes over all devices; one of them may be -1: as many as fill the devices.

    `slices` follows from TPU devices: another number than theirs is an error, as is a `data` that it does not divide.
    Other devices are one slice, unless a number is given; then they stand for that many.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = added(-1)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) over the given devices, by default all of them, laid out for their links.

    Raises:
        ValueError: the sizes are not positive (or one -1), their product is not the number of devices, or slices do not
            hold whole replicas.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, name) for name in MESH_AXES]
    shown = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh ({shown}): sizes are positive, and at most one is -1 (as many as fill the devices)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        need = f"a multiple of {known}" if -1 in sizes else str(known)
        raise ValueError(f"mesh ({shown}) needs {need} devices, but there are {len(devices)}")
    slices = _count_slices(config.slices, devices)
    if sizes[0] % slices:
        size = len(devices) // slices
        raise ValueError(
            f"mesh ({shown}) makes data={sizes[0]}, but {slices} slices of {size} devices need a multiple of {slices}: "
            f"fsdp and tensor stay within a slice, and their product divides {size}"
        )
    # The default axis type of current JAX is Explicit, which the constraints below and Linen's reject.
    return Mesh(_grid(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _count_slices(given: int, devices: Sequence[jax.Device]) -> int:
    """Number of slices that the devices belong to or, where no TPUs are, stand for."""
    if given < 1 and given != -1:
        raise ValueError(f"mesh: slices={given} must be at least 1, or -1: as many as there are")
    found = _tpu_slices(devices)
    if devices[0].platform == "tpu" and given not in (-1, found):
        raise ValueError(
            f"mesh: slices={given}, but the devices belong to {found}; leave slices out, or start on {given}"
        )
    if len(devices) % max(given, found):
        raise ValueError(f"mesh: {len(devices)} devices cannot be {max(given, found)} slices of one size")
    return max(given, found)


def _tpu_slices(devices: Sequence[jax.Device]) -> int:
    # GPUs have a slice_index too, that of their node, which fsdp may cross.
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def _grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours along `tensor` and `fsdp` nearest to each other."""
    if (slices := _tpu_slices(devices)) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
