"""Parameters made whole where they are used, and batches kept split: what a network needs to know of the mesh.

Under fully sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020) a parameter is in parts until the layer that it
belongs to runs, is gathered there, and forgotten; the backward pass gathers it again, and leaves the gradient in parts.
Left to itself XLA may gather whole stacks of blocks, or move activations in place of weights.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.custom_derivatives import linear_call
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ddistill.sharding import Rule, batch_parts, batch_sharding, in_stack

PyTree = Any
_AGAIN = frozenset({"linear_call", "sharding_constraint", "reshape", "transpose"})
"""What the backward pass does again: to gather, and what only shows the gathered parameter in another shape."""


@dataclass(frozen=True)
class Place:
    """A mesh, and the rule by which parameters lie on it; static and hashable."""

    mesh: Mesh | AbstractMesh
    rule: Rule = Rule()  # noqa: RUF009

    @property
    def devices(self) -> Mesh:
        """The mesh as one of devices. Raises ValueError where it is only the shape of one."""
        if not isinstance(self.mesh, Mesh):
            raise ValueError(f"{self.mesh} is the shape of a mesh, and has no devices")
        return self.mesh

    @property
    def splits(self) -> bool:
        """Whether any parameter may be in parts."""
        return any(self.mesh.shape.get(axis, 1) > 1 for axis in ("fsdp", "tensor"))

    def batch(self, tree: PyTree) -> PyTree:
        """Arrays [B, ...] pinned to lie as batches do, where the devices divide them."""
        parts = batch_parts(self.mesh)

        def pin(leaf):
            if jnp.ndim(leaf) == 0 or leaf.shape[0] % parts:
                return leaf
            return jax.lax.with_sharding_constraint(leaf, batch_sharding(self.mesh))

        return jax.tree.map(pin, tree)

    def stacks(self, named: dict[str, Any]) -> dict[str, Any]:
        """Parameters by path, those in stacks of blocks pinned to lie as the rule says while their blocks are run."""

        def pin(path, leaf):
            if not in_stack(path) or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            spec = PartitionSpec(None, *self.rule.spec(self.mesh, path, leaf.shape))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return {path: pin(path, leaf) for path, leaf in named.items()}

    def gather_at_use(self, module: nnx.Module) -> nnx.Module:
        """The module whose parameters, in parts as they are, gather themselves when they are read.

        Those of a stack do so in each block, when it is run. Reading is `[...]`, or a jax function of the parameter;
        methods, as in `.reshape(...)`, are those of the array in parts.
        """
        nodes = dict(nnx.iter_graph(module))
        for path, node in nodes.items():
            if not isinstance(node, nnx.Variable) or not hasattr(node.get_raw_value(), "dtype"):
                continue
            name, value = ".".join(map(str, path)), node.get_raw_value()
            spec = self.rule.spec(self.mesh, name, value.shape)
            if any(axes is not None for axes in spec) and jnp.issubdtype(value.dtype, jnp.floating):
                dtype = _dtype_of_use(nodes.get(path[:-1]), str(path[-1]), value.dtype)
                node.set_metadata(on_get_value=_Gather(self.mesh, spec, dtype))
        return module


@dataclass(frozen=True)
class _Gather:
    mesh: Mesh | AbstractMesh
    spec: PartitionSpec
    dtype: Any

    def __call__(self, variable: nnx.Variable, value: Array) -> Array:
        """What is read of a variable: a block's array whole, and a stack of them as it is."""
        return gathered(value, self.mesh, self.spec, self.dtype) if jnp.ndim(value) == len(self.spec) else value


def gathered(x: Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec, dtype: Any = None) -> Array:
    """An array that lies as spec says, whole on every device but for what "tensor" alone splits, and cast to dtype.

    It is cast before it is gathered. The cotangent is pinned to the spec: each device asks for its part of the sum over
    all, which is then a reduce-scatter.
    """
    kept = PartitionSpec(*(axes if axes == "tensor" else None for axes in spec))
    stored, whole = NamedSharding(mesh, spec), NamedSharding(mesh, kept)
    pin = jax.lax.with_sharding_constraint

    def forth(_, x):
        return pin(pin(pin(x, stored).astype(dtype or x.dtype), stored), whole)

    def back(_, cotangent):
        return pin(cotangent, stored).astype(x.dtype)

    return linear_call(forth, back, (), x)


def again(primitive: Any, *_: Any, **__: Any) -> bool:
    """The policy of `jax.checkpoint` that keeps all for the backward pass but gathered parameters."""
    return primitive.name not in _AGAIN


def _dtype_of_use(layer: Any, name: str, dtype: Any) -> Any:
    """The dtype in which a layer uses a parameter: its own, of kernels that it casts to it before anything else."""
    casts = getattr(layer, "casts_kernel", isinstance(layer, nnx.Linear | nnx.Conv))
    wanted = getattr(layer, "dtype", None)
    return dtype if name != "kernel" or not casts or wanted is None else wanted


def rematerialises(module: nnx.Module) -> bool:
    """Whether blocks of a module keep nothing for the backward pass, parameters that they gathered neither."""
    return any(getattr(part, "remat", False) for _, part in nnx.iter_modules(module))


def placed(code: Any, place: Place | None) -> Any:
    """Static code in which every `net.Definition` has this place: a frozen dataclass of dataclasses."""
    if not dataclasses.is_dataclass(code) or isinstance(code, type):
        return code
    if hasattr(code, "place"):
        return dataclasses.replace(code, place=place)
    inner = {f.name: getattr(code, f.name) for f in dataclasses.fields(code) if f.init}
    new = {name: placed(value, place) for name, value in inner.items()}
    changed = {name: value for name, value in new.items() if value is not inner[name]}
    return dataclasses.replace(code, **changed) if changed else code
