"""The device mesh and how states and batches lie on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def make_mesh(fsdp: int = 1) -> Mesh:
    """A mesh ("data", "fsdp") over all devices of all processes, `fsdp` of which share one copy of the parameters.

    Raises ValueError unless fsdp divides the number of devices.
    """
    # Auto: under Explicit axes, jax's default, sharded convolutions do not type-check.
    sizes = _sizes(jax.device_count(), fsdp)
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def abstract_mesh(devices: int, fsdp: int = 1) -> AbstractMesh:
    """`make_mesh` of devices that need not be there, for shapes. Raises ValueError unless fsdp divides their number."""
    return AbstractMesh(_sizes(devices, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _sizes(devices: int, fsdp: int) -> tuple[int, int]:
    if fsdp < 1 or devices % fsdp:
        raise ValueError(f"fsdp = {fsdp} must divide the number of devices, {devices}")
    return devices // fsdp, fsdp


def local_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "fsdp") over the devices of this process, or those given, each with a copy of the parameters."""
    local = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(local), 1), ("data", "fsdp"), devices=local, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A sharding that puts a whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A sharding that splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh | AbstractMesh, tree: PyTree, smallest: int = 2**16) -> PyTree:
    """Shardings of parameters and everything shaped like them: the largest axis that fsdp divides is split over it.

    Arrays of fewer than `smallest` elements are replicated; tree may hold arrays or jax.ShapeDtypeStruct.
    """
    size = mesh.shape["fsdp"]

    def one(leaf):
        shape = np.shape(leaf)
        axes = [i for i in range(len(shape)) if shape[i] % size == 0]
        if size == 1 or not axes or np.prod(shape) < smallest:
            return replicated(mesh)
        spec: list[str | None] = [None] * len(shape)
        spec[max(axes, key=lambda i: shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, tree)


def put_batch(mesh: Mesh, batch: PyTree, *, stacked: bool = False) -> PyTree:
    """Lay a host batch out over the devices along its first axis, or stacked ones along the second.

    With several processes each gives its own part; arrays that lie so already stay. Raises ValueError where the devices
    do not divide the batch.
    """
    sharding, axis = batch_sharding(mesh), int(stacked)
    if stacked:
        sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
    here = mesh.size // jax.process_count()

    def put(array):
        if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        if np.shape(array)[axis] % here:
            raise ValueError(
                f"a batch of {np.shape(array)[axis]} does not split over {here} devices: take a multiple of {here}"
            )
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(put, batch)
