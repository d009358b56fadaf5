"""Batches from arrays in memory, shuffled without replacement, each a pure function of the step."""

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

Source = Callable[[int], dict[str, Any]]
"""From the number of a step to its batch: arrays, or trees of them, whose first axes are the rows."""

# Streams of randomness that share one seed and must not share their numbers.
_SHUFFLE, _DROPOUT = 0, 1


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Batches of named arrays, shuffled without replacement; a batch that crosses an epoch goes on in the next one.

    `arrays`: each [N, ...]. Floats become float32, integer `cond` becomes int32; arrays that already have these types
    are shared, not copied. `batch_size` may exceed N. `num_classes` declares `cond` to be labels [N] in
    [0, num_classes). `shape` is the shape that one item of `x` must have, such as (8, 8, 1). `part`: (p, P) gives part
    p of P of each batch, equal numbers of rows in order, for P processes that share it; other rows are not read.

    Raises ValueError for no arrays, empty arrays or unequal leading lengths, NaN or Inf, `x` not of floats, labels that
    are not integers or out of range, a wrong shape, `batch_size` below 1 or one that P does not divide, a negative
    seed.
    """

    arrays: Mapping[str, np.ndarray]
    batch_size: int
    seed: int = 0
    num_classes: int | None = field(default=None, kw_only=True)
    shape: tuple[int, ...] | None = field(default=None, kw_only=True)
    part: tuple[int, int] = field(default=(0, 1), kw_only=True)

    def __post_init__(self):
        part_size(self.batch_size, self.part)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or larger.")
        if not self.arrays:
            raise ValueError('No arrays given; expected at least one, such as {"x": images}.')
        arrays = {name: _numbers(name, array) for name, array in self.arrays.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Arrays have unequal leading lengths {lengths}; give one row per item in each.")
        if 0 in lengths.values():
            raise ValueError(f"Arrays are empty (lengths {lengths}); at least one item is needed.")
        if self.shape is not None:
            _check_shape(arrays, tuple(self.shape))
        if self.num_classes is not None:
            _check_labels(arrays, self.num_classes)
        object.__setattr__(self, "arrays", arrays)

    def __len__(self) -> int:
        """N, the number of items."""
        return len(next(iter(self.arrays.values())))

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Batch of step 0, 1, 2, ...: each array [batch_size / P, ...], fresh memory. Raises ValueError below 0."""
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0.")
        size, rows = len(self), part_size(self.batch_size, self.part)
        positions = step * self.batch_size + self.part[0] * rows + np.arange(rows, dtype=np.int64)
        epochs = range(int(positions[0]) // size, int(positions[-1]) // size + 1)
        order = np.concatenate([_permutation(self.seed, epoch, size) for epoch in epochs])
        chosen = order[positions - epochs[0] * size]
        return {name: array[chosen] for name, array in self.arrays.items()}


def label_dropout(source: Source, p: float, null: PyTree, *, seed: int = 0, part: tuple[int, int] = (0, 1)) -> Source:
    """Replace each condition of `cond` by `null` with probability p: the training of classifier-free guidance.

    p in [0, 1]; `source` gives `cond` of integer labels [B], or of the tree of `null` with a leading axis B. Which rows
    fall depends on (seed, step) alone; part: (p, P) says that the source gives part p of P of each batch. Raises
    ValueError for p outside [0, 1] and for batches without such a `cond`. Ho & Salimans 2022, algorithm 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"Probability of dropping a label is {p}; it must lie between 0 and 1.")
    index, parts = part

    def dropped(step: int) -> dict[str, np.ndarray]:
        batch = source(step)
        cond = batch.get("cond")
        _check_cond(cond, null)
        rows = len(jax.tree.leaves(cond)[0])
        draws = _generator(seed, _DROPOUT, operator.index(step)).random(rows * parts)
        drop = draws[index * rows : (index + 1) * rows] < p

        def one(c, n):
            return np.where(drop.reshape(-1, *[1] * (c.ndim - 1)), n, c).astype(c.dtype)

        return {**batch, "cond": jax.tree.map(one, cond, null)}

    return dropped


def part_size(batch_size: int, part: tuple[int, int]) -> int:
    """The rows of a batch that each of the processes in part = (p, P) holds. Raises ValueError unless P divides it."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if batch_size % part[1]:
        raise ValueError(f"a batch of {batch_size} does not split over {part[1]} processes: take a multiple")
    return batch_size // part[1]


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = _generator(seed, _SHUFFLE, epoch).permutation(size)
    order.flags.writeable = False  # it is shared by every caller of the cache
    return order


def _numbers(name: str, array) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim == 0:
        raise ValueError(f"Array {name!r} is a single number; its first axis must count the items.")
    if jnp.issubdtype(array.dtype, jnp.floating):  # jnp's test also knows bfloat16
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
        bad = ~np.isfinite(array)
        if bad.any():
            first = tuple(int(i) for i in np.unravel_index(np.argmax(bad), array.shape))
            raise ValueError(
                f"Array {name!r} holds {bad.sum()} values that are NaN or Inf in float32, the first at index {first}; "
                "remove or mend these items."
            )
        return array
    if name == "x":
        raise ValueError(
            f"Array 'x' has dtype {array.dtype}; expected floats: scale the data first, for images to [-1, 1]."
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"Array {name!r} has dtype {array.dtype}; expected floats or integers.")
    return array.astype(np.int32, copy=False) if name == "cond" and _fits_int32(array) else array


def _fits_int32(array: np.ndarray) -> bool:
    info = np.iinfo(np.int32)
    return not array.size or (info.min <= int(array.min()) and int(array.max()) <= info.max)


def _check_cond(cond: PyTree, null: PyTree) -> None:
    leaves, nulls = jax.tree.leaves(cond), jax.tree.leaves(null)
    labels = jax.tree_util.all_leaves([null]) and np.ndim(null) == 0
    alike = [path for path, _ in jax.tree.leaves_with_path(cond)] == [
        path for path, _ in jax.tree.leaves_with_path(null)
    ]
    fits = alike and all(np.shape(c)[1:] == np.shape(n) for c, n in zip(leaves, nulls, strict=True))
    if not fits or (labels and not np.issubdtype(leaves[0].dtype, np.integer)):
        given = ", ".join(f"{c.dtype} of shape {c.shape}" for c in leaves) or "none"
        wanted = "integer labels `cond` [B]" if labels else f"`cond` whose rows have shapes {[*map(np.shape, nulls)]}"
        raise ValueError(f"label_dropout needs batches with {wanted}; given: {given}.")


def _check_shape(arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
    if "x" not in arrays:
        raise ValueError(f"A shape {shape} was given for 'x', and there is no array 'x' among {sorted(arrays)}.")
    if arrays["x"].shape[1:] != shape:
        raise ValueError(f"Items of 'x' have shape {arrays['x'].shape[1:]}; expected {shape}.")


def _check_labels(arrays: Mapping[str, np.ndarray], num_classes: int) -> None:
    if "cond" not in arrays:
        raise ValueError(f"num_classes={num_classes} needs labels: give an array 'cond' [N] (had {sorted(arrays)}).")
    cond = arrays["cond"]
    if cond.ndim != 1 or not np.issubdtype(cond.dtype, np.integer):
        raise ValueError(f"Labels 'cond' are {cond.dtype} of shape {cond.shape}; expected integers of shape [N].")
    bad = (cond < 0) | (cond >= num_classes)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"Label {int(cond[first])} at index {first} of 'cond' is out of range ({bad.sum()} such labels); "
            f"num_classes={num_classes} accepts 0 to {num_classes - 1}."
        )
