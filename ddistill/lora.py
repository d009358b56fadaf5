"""Low-rank adapters, and updates of weights as data: merged, added, carried from one teacher to another.

A kernel W [..., out], seen as a matrix [in, out], is trained as W + (α/r) A B with A [in, r], B [r, out] and W frozen
(Hu et al. 2021, sec. 4.1). Kernels of a stack of blocks [blocks, ..., out] (`networks.layers.Stack`) are as many
matrices, with factors [blocks, in, r] and [blocks, r, out]. What training did to a network, τ = θ' − θ, is a `Delta`;
deltas add up, θ + Σ λ_i τ_i (Luo et al. 2023, "LCM-LoRA", eq. 8), also on networks other than the one they were
trained on.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.net import Apply, Net, PyTree
from ddistill.sharding import in_stack


@dataclass(frozen=True)
class LoRA:
    """Which parameters an adapter trains, and at which rank r.

    layers: shell patterns of the paths of parameters of two or more axes ("blocks.*.kernel"), the one that counts the
    blocks of a stack aside; others that they match, such as biases, stay frozen. A rank above a matrix's own is lowered
    to it. alpha: the update is alpha/rank · A B; by default alpha = rank. whole: patterns of parameters of any shape
    that are trained whole, by an update that starts at zero.
    """

    rank: int = 16
    layers: tuple[str, ...] = ("*.kernel",)
    alpha: float | None = None
    whole: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1")
        for name, patterns in (("layers", self.layers), ("whole", self.whole)):
            if isinstance(patterns, str):
                raise ValueError(f"{name} = {patterns!r} must be a sequence of patterns: write ({patterns!r},)")

    @property
    def scale(self) -> float:
        """The factor α/r of A B."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """An update of a kernel [..., out], as a matrix [in, out] the product of down [in, r] and up [r, out].

    In a stack both have one axis more in front, the block.
    """

    down: Array
    up: Array


Delta = Mapping[str, Array | LowRank]
"""An update of parameters, by path ("blocks.0.expand.kernel"): an array of the parameter's shape or its factors."""


def adapt(net: Net, lora: LoRA, key: Array) -> Net:
    """The same network, bit for bit, with an adapter as its params; net's own params are frozen in rest["base"].

    params: {"<path>.down": A ~ N(0, 1/r), "<path>.up": B = 0, "<path>.whole": 0}, of at least float32. With this A and
    Adam, whose steps have a fixed size η in each entry, A B moves as far as W would, η √(in · out), so that one
    learning rate serves every rank and training whole. Raises ValueError for a pattern that matches no parameter it
    could train, listing what there is.
    """
    base = _by_path(net.params)
    wide = {path: w for path, w in base.items() if _is_matrix(path, w)}
    whole = _matching(lora.whole, base, "whole")
    layers = [path for path in _matching(lora.layers, wide, "layers") if path not in whole]
    if not whole and not layers:
        raise ValueError("a LoRA without layers and without whole trains nothing: give patterns of parameter paths")
    params: dict[str, Array] = {f"{path}.whole": jnp.zeros(base[path].shape, _wide(base[path])) for path in whole}
    for path, k in zip(layers, jax.random.split(key, len(layers)), strict=True):
        *blocks, rows, out = _matrix_shape(path, wide[path])
        rank = min(lora.rank, rows, out)
        params[f"{path}.down"] = jax.random.normal(k, (*blocks, rows, rank), _wide(wide[path])) * rank**-0.5
        params[f"{path}.up"] = jnp.zeros((*blocks, rank, out), _wide(wide[path]))
    return Net(params, {"base": net.params, "rest": net.rest}, _Adapted(net.apply, lora.scale))


def is_adapted(net: Net) -> bool:
    """Whether a network is one with an adapter, whose own params are in rest["base"]."""
    return isinstance(net.apply, _Adapted)


def merge(net: Net) -> Net:
    """An adapted network as a plain one, of its base's structure and code; one without an adapter as it is."""
    if not isinstance(net.apply, _Adapted):
        return net
    return Net(_merged(net.rest["base"], net.params, net.apply.scale), net.rest["rest"], net.apply.apply)


def delta(net: Net) -> dict[str, Array | LowRank]:
    """What an adapter adds to its base, α/r included. Raises ValueError for a network without one."""
    if not isinstance(net.apply, _Adapted):
        raise ValueError("delta takes a network made by adapt; for one trained whole use difference(student, teacher)")
    return {path: _update(net.params, path, net.apply.scale) for path in _adapted_paths(net.params)}


def difference(student: Net, teacher: Net) -> dict[str, Array | LowRank]:
    """The student's delta τ = θ_student − θ_teacher, of all parameters; an adapted network counts as merged.

    Raises ValueError unless the two have parameters of the same paths and shapes.
    """
    ours, theirs = _by_path(merge(student).params), _by_path(merge(teacher).params)
    _check(_shapes(ours), _shapes(theirs), "student", "teacher", both=True)
    return {path: ours[path] - theirs[path] for path in ours}


def add(net: Net, *terms: tuple[float, Delta]) -> Net:
    """θ + λ_1 τ_1 + λ_2 τ_2 + … for terms (λ_i, τ_i), on any network whose parameters have these paths and shapes.

    Raises ValueError where they do not, listing what differs.
    """
    net = merge(net)
    base = _by_path(net.params)
    sums: dict[str, Array] = {}
    for weight, update in terms:
        have = {path: _delta_shape(path, value, base.get(path)) for path, value in update.items()}
        _check(have, _shapes(base), "delta", "network")
        for path, value in update.items():
            sums[path] = sums.get(path, 0.0) + weight * _full(value, base[path].shape)

    def one(path, w):
        change = sums.get(_name(path))
        return w if change is None else (w + change).astype(w.dtype)

    return net.replace(params=jax.tree.map_with_path(one, net.params))


def truncate(update: Delta, rank: int) -> dict[str, Array | LowRank]:
    """The nearest delta (in the Frobenius norm) whose matrices have at most this rank; vectors are kept whole."""
    if rank < 1:
        raise ValueError(f"rank = {rank} must be at least 1")

    def one(path, value):
        full = value.down @ value.up if isinstance(value, LowRank) else value
        if not _is_matrix(path, full):
            return full
        u, s, v = jnp.linalg.svd(full.reshape(_matrix_shape(path, full)).astype(_wide(full)), full_matrices=False)
        return LowRank(u[..., :rank] * s[..., None, :rank], v[..., :rank, :])

    return {path: one(path, value) for path, value in update.items()}


def low_rank(student: Net, teacher: Net, rank: int) -> tuple[dict[str, Array | LowRank], float]:
    """What a student learned as the nearest delta of at most this rank, without what is 0, and the share it leaves out.

    That is ‖τ − τ_r‖/‖τ‖: the rounding of floats where an adapter of this rank was trained. Raises as `difference`.
    """
    changes: dict[str, Any] = difference(student, teacher)
    learned = {path: change for path, change in changes.items() if np.any(change)}
    near = truncate(learned, rank)
    left = sum(float(jnp.sum((change - _full(near[p], change.shape)) ** 2)) for p, change in learned.items())
    whole = sum(float(jnp.sum(change**2)) for change in learned.values())
    return near, (left / whole) ** 0.5 if whole else 0.0


def save(path: Path | str, update: Delta) -> None:
    """Write a delta to an .npz file, factors as factors, in at least float32."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in update.items():
        parts = {"down": value.down, "up": value.up} if isinstance(value, LowRank) else {"whole": value}
        arrays |= {f"{name}.{part}": np.asarray(a, _wide(a)) for part, a in parts.items()}
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: Path | str) -> dict[str, Array | LowRank]:
    """Read a delta. Raises FileNotFoundError for no file, ValueError for one that `save` did not write."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no delta at {path}: give an .npz file that ddistill.lora.save wrote")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file: give one that ddistill.lora.save wrote")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: jnp.asarray(file[name]) for name in file.files}
    strange = [name for name in arrays if name.rpartition(".")[2] not in ("down", "up", "whole")]
    halves = [f"{p}.{end}" for p in _adapted_paths(arrays) for end in ("down", "up") if f"{p}.whole" not in arrays]
    missing = [name for name in halves if name not in arrays]
    if strange or missing:
        raise ValueError(
            f"{path} is no delta: "
            + "; ".join(
                [f"{name!r} ends in neither .down, .up nor .whole" for name in strange[:5]]
                + [f"{name!r} is missing" for name in missing[:5]]
            )
        )
    for name in _adapted_paths(arrays):
        if f"{name}.whole" in arrays:
            continue
        a, b = (arrays[f"{name}.{end}"].shape for end in ("down", "up"))
        axes = 2 + in_stack(name)
        if len(a) != axes or len(b) != axes or a[-1] != b[-2] or a[:-2] != b[:-2]:
            raise ValueError(f"{path}: {name}.down {list(a)} and {name}.up {list(b)} are not the factors of a matrix")
    return {name: _update(arrays, name, 1.0) for name in _adapted_paths(arrays)}


@dataclass(frozen=True)
class _Adapted:
    apply: Apply
    scale: float
    transparent = True

    def __call__(self, params, rest, x, t, cond, *, s, key):
        return self.apply(_merged(rest["base"], params, self.scale), rest["rest"], x, t, cond, s=s, key=key)


def _merged(base: PyTree, params: Mapping[str, Array], scale: float) -> PyTree:
    paths = set(_adapted_paths(params))

    def one(path, w):
        name = _name(path)
        return (w + _full(_update(params, name, scale), w.shape)).astype(w.dtype) if name in paths else w

    return jax.tree.map_with_path(one, base)


def _update(params: Mapping[str, Array], path: str, scale: float) -> Array | LowRank:
    if f"{path}.whole" in params:
        return params[f"{path}.whole"]
    return LowRank(params[f"{path}.down"], scale * params[f"{path}.up"])


def _full(value: Array | LowRank, shape: tuple[int, ...]) -> Array:
    if isinstance(value, LowRank):
        # A small product whose error the network would otherwise carry: TPUs multiply in bfloat16 unless told.
        return jnp.matmul(value.down, value.up, precision="highest").reshape(shape)
    return value


def _adapted_paths(params: Mapping[str, Array]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in params})


def _matching(patterns: tuple[str, ...], among: Mapping[str, Array], what: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in among):
            kind = "parameter" if what == "whole" else "parameter of two or more axes"
            raise ValueError(
                f"{what}: the pattern {pattern!r} matches no {kind} of this network, which has {_some(sorted(among))}"
            )
    return sorted(path for path in among if any(fnmatchcase(path, pattern) for pattern in patterns))


def _check(ours: Mapping, theirs: Mapping, us: str, them: str, both: bool = False) -> None:
    wrong = [
        f"{path} is {_words(shape)} in the {us} and {_words(theirs.get(path))} in the {them}"
        for path, shape in ours.items()
        if shape != theirs.get(path)
    ]
    wrong += [f"{path} is missing in the {us}" for path in theirs if both and path not in ours]
    if wrong:
        raise ValueError(f"{us} and {them} do not match: {_some(wrong, '; ')}")


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _some(items: list[str], separator: str = ", ", most: int = 12) -> str:
    return separator.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _delta_shape(path: str, value: Array | LowRank, target: Array | None) -> tuple[int, ...]:
    """The shape that an update is for; factors know no more than the matrix, so they take its target's if they can."""
    if not isinstance(value, LowRank):
        return np.shape(value)
    matrix = (*value.down.shape[:-1], value.up.shape[-1])
    if target is None or not _is_matrix(path, target) or _matrix_shape(path, target) != matrix:
        return matrix
    return np.shape(target)


def _shapes(params: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(w) for path, w in params.items()}


def _is_matrix(path: str, w: Array) -> bool:
    return jnp.ndim(w) >= 2 + in_stack(path)


def _matrix_shape(path: str, w: Array) -> tuple[int, ...]:
    """A parameter's shape as a matrix [in, out], in a stack as [blocks, in, out]."""
    blocks, shape = np.shape(w)[: in_stack(path)], np.shape(w)[in_stack(path) :]
    return *blocks, int(np.prod(shape[:-1])), shape[-1]


def _wide(w: Array):
    return jnp.promote_types(jnp.result_type(w), jnp.float32)


def _by_path(params: PyTree) -> dict[str, Array]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
