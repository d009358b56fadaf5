"""The device mesh, and how states and batches lie on it.

A mesh has three axes. Batches are split over "data" and "fsdp"; parameters, and all that is shaped like them, are split
over "fsdp" and gathered where they are used (`ddistill.gathering`); "tensor" splits the matrices of a transformer's
blocks for good, and what is computed with them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXES = ("data", "fsdp", "tensor")
STACK = "stack"
"""The part of a path below which parameters have a leading axis, the number of the block."""

COLUMNS = (
    "to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|q_proj|k_proj|v_proj|q|k|v"
    r"|net\.0\.proj|proj_mlp|fc1|wi|wi_0|wi_1|conv_inverted"
)
"""Layers of a block whose outputs are split over "tensor": of attention, head by head, and of the feed-forward map."""

ROWS = r"to_out\.0|to_add_out|out_proj|o|net\.2|proj_out|fc2|wo|conv_point"
"""Layers of a block whose inputs are split over "tensor", and whose outputs are summed over it."""

Axes = str | tuple[str, ...] | None
"""What one dimension of an array is split over: a mesh axis, several, or none."""


@dataclass(frozen=True)
class Rule:
    """How arrays are split; one short rule, and exceptions to it. Hashable.

    The longest dimension that "fsdp" divides into whole tiles of a TPU, rows before columns, is split over it, and over
    "tensor" where that divides it too; of matrices in the blocks of a transformer (`COLUMNS`, `ROWS`) "tensor" takes
    the outputs or the inputs, and "fsdp" the other. The axis that counts the blocks of a stack is never split: one
    block of it would be on one device alone. Arrays of fewer than `smallest` elements, of a stack those of one block,
    are on every device.

    exceptions: pairs of a shell pattern of the end of a path ("attn1.to_q.kernel", "*.kernel") and the axes of each
    dimension, of a stack those of one block; the first that matches an array of so many dimensions holds. Use `rule_of`
    to make them from a mapping.
    """

    exceptions: tuple[tuple[str, tuple[Axes, ...]], ...] = ()
    smallest: int = 2**16

    def spec(self, mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """What each dimension of the array at a path is split over, of a stack those of one block.

        Raises ValueError where an exception's axis does not divide its dimension.
        """
        shape = shape[1:] if in_stack(path) else shape
        for pattern, axes in self.exceptions:
            if len(axes) == len(shape) and _matches(path, pattern):
                return _exception(mesh, path, shape, pattern, axes)
        spec: list[Axes] = [None] * len(shape)
        fsdp, tensor = _size(mesh, "fsdp"), _size(mesh, "tensor")
        if fsdp * tensor == 1 or math.prod(shape) < self.smallest:
            return PartitionSpec(*spec)
        split = _tensor_dimension(path, shape) if tensor > 1 else None
        if split is not None and shape[split] % tensor == 0:
            spec[split] = "tensor"
        else:
            split = None
        choices: list[tuple[int, Axes]] = [(fsdp, "fsdp")]
        if tensor > 1 and split is None:
            choices = [(fsdp * tensor, ("fsdp", "tensor")), *choices]
        for size, over in choices:
            free = [i for i, n in enumerate(shape) if i != split and n % size == 0]
            if free and size > 1:
                spec[max(free, key=lambda i: _worth(shape, i, size))] = over
                break
        return PartitionSpec(*spec)

    def check(self, mesh: Mesh | AbstractMesh, tree: PyTree) -> None:
        """Raise ValueError for an exception that matches no array of the tree, or whose axes do not divide one."""
        leaves = {name_of(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
        for pattern, axes in self.exceptions:
            found = {path: shape[in_stack(path) :] for path, shape in leaves.items() if _matches(path, pattern)}
            if not any(len(shape) == len(axes) for shape in found.values()):
                there = [f"{path} {list(shape)}" for path, shape in (found or leaves).items() if len(shape) > 1]
                raise ValueError(
                    f"layout: {pattern!r} matches no parameter of {len(axes)} dimensions"
                    f"{', those that count blocks aside' if found else ''}; there are {', '.join(there[:8])}"
                    f"{f' and {len(there) - 8} more' * (len(there) > 8)}"
                )
        for path, shape in leaves.items():
            self.spec(mesh, path, shape)


def rule_of(layout: Mapping[str, Sequence[Axes]]) -> Rule:
    """The rule with exceptions, from path patterns to the axes of each dimension: {"*.kernel": (None, "fsdp")}.

    Raises ValueError for axes that a mesh does not have, and for one that is named twice.
    """
    for pattern, axes in layout.items():
        if isinstance(axes, str):
            raise ValueError(f"layout: {pattern!r}: {axes!r} must be a sequence, one entry for each dimension")
        named = [name for entry in axes for name in _names(entry)]
        if set(named) - set(AXES) or len(set(named)) < len(named):
            raise ValueError(f"layout: {pattern!r}: the axes of {tuple(axes)} must be of {AXES}, each at most once")
    return Rule(tuple((pattern, tuple(_hashable(entry) for entry in axes)) for pattern, axes in layout.items()))


def _hashable(axes: Axes) -> Axes:
    return axes if axes is None or isinstance(axes, str) else tuple(axes)


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(f".{path}", f"*.{pattern}")


def _exception(mesh, path: str, shape: tuple[int, ...], pattern: str, axes: tuple[Axes, ...]) -> PartitionSpec:
    for i, (size, entry) in enumerate(zip(shape, axes, strict=True)):
        parts = math.prod(_size(mesh, name) for name in _names(entry))
        if size % parts:
            raise ValueError(
                f"layout: {pattern!r} splits dimension {i} of {path}, {size} long, over {entry}, {parts} devices, "
                "which does not divide it: split another dimension, or leave it to the rule"
            )
    return PartitionSpec(*axes)


def _worth(shape: tuple[int, ...], i: int, parts: int) -> tuple[bool, bool, int]:
    """What makes a dimension the one to split: parts of whole tiles, rows rather than columns, and its length.

    TPUs keep arrays in tiles of 8 rows and 128 columns; parts of tiles are padded, and sums of them reduced whole.
    """
    last = i == len(shape) - 1
    return shape[i] // parts % (128 if last else 8) == 0, not last, shape[i]


def _tensor_dimension(path: str, shape: tuple[int, ...]) -> int | None:
    """Which dimension of a block's kernel tensor parallelism splits: the last, the last but one, or none."""
    if not in_stack(path) or not path.endswith(".kernel") or len(shape) < 2:
        return None
    for layers, dimension in ((COLUMNS, len(shape) - 1), (ROWS, len(shape) - 2)):
        if re.search(rf"\.(?:{layers})\.kernel$", path):
            return dimension
    return None


def in_stack(path: str) -> bool:
    """Whether the array at a path has a leading axis, the number of the block."""
    return STACK in path.split(".")


def name_of(path: tuple) -> str:
    """A path of a pytree in words: "params.student.blocks.stack.expand.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    return mesh.shape.get(axis, 1)


def make_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh ("data", "fsdp", "tensor") over all devices of all processes; see `mesh_over`."""
    return mesh_over(jax.devices(), fsdp, tensor)


def mesh_over(devices: Sequence[Any], fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh ("data", "fsdp", "tensor") over devices, process after process.

    fsdp · tensor devices share one copy of the parameters; `tensor` of them work on the same samples. A batch's rows
    lie along the mesh, so that those which a process reads, the p-th of P parts, are those of its own devices: what
    `jax.make_mesh` does to devices of a TPU slice, for the sake of their wires, would mix the processes. Raises
    ValueError unless fsdp · tensor divides the number of devices, and `tensor` that of each process.
    """
    sizes = _sizes(len(devices), fsdp, tensor)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    there = Counter(device.process_index for device in ordered)
    if len(there) > 1 and any(count % tensor for count in there.values()):
        raise ValueError(
            f"tensor = {tensor} devices work on the same samples and must be of one process, which has "
            f"{min(there.values())}: take a divisor of that"
        )
    # Auto: under Explicit axes, jax's default, sharded convolutions do not type-check.
    return Mesh(np.asarray(ordered, object).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(devices: int, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """`make_mesh` of devices that need not be there, for shapes. Raises ValueError as it does."""
    return AbstractMesh(_sizes(devices, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(devices: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    if fsdp < 1 or tensor < 1 or devices % (fsdp * tensor):
        together = f"fsdp = {fsdp}" if tensor == 1 else f"fsdp · tensor = {fsdp} · {tensor}"
        raise ValueError(f"{together} must divide the number of devices, {devices}")
    return devices // (fsdp * tensor), fsdp, tensor


def local_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices of this process, or those given, each with a copy of the parameters."""
    local = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(local), 1, 1), AXES, devices=local, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A sharding that puts a whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A sharding that splits the first axis over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return _size(mesh, "data") * _size(mesh, "fsdp")


def state_shardings(mesh: Mesh | AbstractMesh, tree: PyTree, rule: Rule = Rule()) -> PyTree:
    """Shardings of parameters and everything shaped like them, by the rule, which sees the path of each leaf.

    tree may hold arrays or jax.ShapeDtypeStruct. Moments and averages of a parameter lie as it does, since their paths
    end in its own. Raises as `Rule.spec`.
    """

    def one(path, leaf):
        name, shape = name_of(path), np.shape(leaf)
        spec = rule.spec(mesh, name, shape)
        if all(axes is None for axes in spec):
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(None, *spec) if in_stack(name) else spec)

    return jax.tree.map_with_path(one, tree)


def spread(mesh: Mesh | AbstractMesh, tree: PyTree, rule: Rule = Rule()) -> PyTree:
    """Arrays put where the rule has them; those that lie so already stay."""
    return jax.device_put(tree, state_shardings(mesh, tree, rule))


def created(mesh: Mesh, build: Callable[..., PyTree], *args: PyTree, rule: Rule = Rule()) -> PyTree:
    """build(*args), computed by one program where each device makes its own parts, by the rule.

    Nothing is anywhere whole. What build answers of args as it is stays the array that it was.
    """
    program, flat, answer = creation(mesh, build, *args, rule=rule)
    return answer(program(*flat))


def creation(
    mesh: Mesh, build: Callable[..., PyTree], *args: PyTree, rule: Rule = Rule()
) -> tuple[Any, list[Any], Callable[[list[Any]], PyTree]]:  # fmt: skip
    """The program of `created`, jitted, its arguments, and from its outputs to the answer."""
    closed, shapes = jax.make_jaxpr(build, return_shape=True)(*args)
    flat, structure = jax.tree.leaves(args), jax.tree.structure(shapes)
    given = {id(variable): leaf for variable, leaf in zip(closed.jaxpr.invars, flat, strict=True)}
    passed = [given.get(id(variable)) for variable in closed.jaxpr.outvars]
    made = [i for i, leaf in enumerate(passed) if leaf is None]
    places = jax.tree.leaves(state_shardings(mesh, shapes, rule))
    compute = jaxpr_as_fun(closed)

    def parts(*flat):
        leaves = compute(*flat)
        return [leaves[i] for i in made]

    def answer(computed: list[Any]) -> PyTree:
        new = iter(computed)
        return jax.tree.unflatten(structure, [next(new) if leaf is None else leaf for leaf in passed])

    return jax.jit(parts, out_shardings=[places[i] for i in made]), flat, answer


def put_batch(mesh: Mesh, batch: PyTree, *, stacked: bool = False) -> PyTree:
    """Lay a host batch out over the devices along its first axis, or stacked ones along the second.

    With several processes each gives its own part; arrays that lie so already stay. Raises ValueError where the devices
    do not divide the batch.
    """
    sharding, axis = batch_sharding(mesh), int(stacked)
    if stacked:
        sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
    here = max(1, batch_parts(mesh) // jax.process_count())

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
