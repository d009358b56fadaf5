"""Parameters as the tensors of a PyTorch checkpoint, and back: names and layouts, one to one.

A path is the tensor's name, with the last part kernel (of a linear map or a convolution), scale (of a norm) or
embedding for weight. Kernels are transposed: [out, in] to [in, out], [out, in, h, w] to [h, w, in, out]. Below
`sharding.STACK` a parameter is the tensors of all blocks, "blocks.stack.norm.scale"[i] being
"blocks.i.norm.weight", and a number before it is that of the first: "blocks.13.stack.norm.scale"[i] is
"blocks.{13 + i}.norm.weight".
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddistill.sharding import STACK

WEIGHTS = ("kernel", "scale", "embedding")
"""Last parts of a path that PyTorch calls weight."""

OURS = ("target.", "guidance.")
"""Parameters of students alone, which no checkpoint of a teacher has."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: its name and shape there, and the block of a stack that it belongs to."""

    name: str
    shape: tuple[int, ...]
    block: int | None = None


def tensors_of(path: str, shape: tuple[int, ...]) -> list[Tensor]:
    """The tensors that make up a parameter: one, or one for each block of a stack."""
    *parts, leaf = path.split(".")
    last = "weight" if leaf in WEIGHTS else leaf
    if STACK not in parts:
        return [Tensor(".".join([*parts, last]), _foreign(leaf, shape))]
    at = parts.index(STACK)
    before, after = parts[:at], parts[at + 1 :]
    first = int(before.pop()) if before and before[-1].isdigit() else 0
    return [
        Tensor(".".join([*before, str(first + i), *after, last]), _foreign(leaf, shape[1:]), i) for i in range(shape[0])
    ]


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor in the layout of the parameter at path (of one block's, in a stack)."""
    if _leaf(path) != "kernel":
        return tensor
    return np.ascontiguousarray(np.moveaxis(tensor, (0, 1), (-1, -2)))


def to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """A parameter (of one block's, in a stack) in PyTorch's layout, contiguous as safetensors needs it."""
    if _leaf(path) != "kernel":
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))


def params_from(tensors: Mapping[str, np.ndarray], params: Mapping[str, Any], ours: Iterable[str] = OURS) -> dict:
    """Parameters of the paths and shapes of `params`, read from a checkpoint's tensors, in the dtypes of `params`.

    Those whose path begins with one of `ours` are kept as they are if the checkpoint lacks them. Raises ValueError that
    lists every tensor that is missing, not expected, or of another shape.
    """
    wanted = {path: tensors_of(path, np.shape(p)) for path, p in params.items()}
    optional = {p for p, ts in wanted.items() if p.startswith(tuple(ours)) and not any(t.name in tensors for t in ts)}
    wanted = {path: ts for path, ts in wanted.items() if path not in optional}
    check({t.name: t.shape for ts in wanted.values() for t in ts}, {n: np.shape(a) for n, a in tensors.items()})
    out = {path: params[path] for path in optional}
    for path, parts in wanted.items():
        arrays = [to_ours(path, np.asarray(tensors[t.name])) for t in parts]
        array = arrays[0] if parts[0].block is None else np.stack(arrays)
        out[path] = array.astype(params[path].dtype)
    return out


def tensors_from(params: Mapping[str, Any], ours: Iterable[str] = OURS) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint, name by name; parameters whose path begins with one of `ours` are left out."""
    for path, array in params.items():
        if path.startswith(tuple(ours)):
            continue
        host = np.asarray(array)
        for tensor in tensors_of(path, host.shape):
            yield tensor.name, to_theirs(path, host if tensor.block is None else host[tensor.block])


def check(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless names and shapes agree, listing all that do not."""
    missing = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in given]
    extra = [f"not expected: {name} {list(shape)}" for name, shape in given.items() if name not in expected]
    other = [
        f"another shape: {name} is {list(given[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if missing or extra or other:
        raise ValueError("tensors do not fit the network:\n  " + "\n  ".join([*missing, *extra, *other]))


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _foreign(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if leaf != "kernel" else (shape[-1], shape[-2], *shape[:-2])
