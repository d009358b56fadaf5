"""How good and how fast samplers are: rows of metrics of their images, against the real ones.

Sample i of a seed starts from the same noise and condition whichever sampler draws it and however many devices there
are.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ddistill import sharding
from ddistill.config import Data
from ddistill.data import Source
from ddistill.data.loading import released
from ddistill.evaluate.kernels import clip_score
from ddistill.evaluate.perceptual import Distance, perceptual_diversity
from ddistill.evaluate.real import Decode, Images, in_colour, to_bytes
from ddistill.evaluate.samplers import Sampler
from ddistill.evaluate.scores import METRICS, STANDARD, scores, wanted
from ddistill.evaluate.seen import Seen, Wanted, all_rows, look
from ddistill.evaluate.statistics import Statistics
from ddistill.hub.features import Features
from ddistill.process import Process

PyTree = Any
Row = dict[str, Any]

Conditions = Callable[[int], PyTree]
"""Number of a batch -> the conditions of this process's part of it, or None where there are none."""


@dataclass(frozen=True)
class Study:
    """What every sampler of a run is judged by.

    process: of the noise. shape: of a sample. conditions: of the batches of batch_size. decode: samples to brightness
    in [0, 1]. mesh: where batches lie. names: of metrics, in `scores.METRICS`. count: samples of each sampler. texts:
    embeddings [n, D] of prompts for clip_score, sample i having the prompt i mod n. lpips: a distance of images
    [B, H, W, 3] in [−1, 1]. num_classes: of labels.
    """

    process: Process
    shape: tuple[int, ...]
    conditions: Conditions
    decode: Decode
    mesh: Mesh
    networks: Mapping[str, Features]
    names: tuple[str, ...]
    real: Statistics
    count: int
    batch_size: int
    seed: int = 0
    texts: np.ndarray | None = None
    lpips: Distance | None = None
    num_classes: int = 0

    @property
    def wanted(self) -> Wanted:
        """The features that the metrics need."""
        return wanted(self.names)


@dataclass
class Spent:
    """Wall seconds: of the first call, with its compilation; of all others; of decoding. calls: of the network.

    broken: samples of this process that are not finite.
    """

    compiling: float = 0.0
    sampling: float = 0.0
    decoding: float = 0.0
    images: int = 0
    calls: int = 0
    broken: int = 0


def judge(sampler: Sampler, study: Study) -> Row:
    """A sampler's row: sampler, steps, nfe, samples, seed, its metrics, and the times it took.

    not_finite: how many samples have NaN or infinity somewhere, which is black or white in their images. wall_s: wall
    time of sampling all, on all devices, without compilation (compile_s: the first call with it) and without decoding
    (decode_s); images_per_s: of sampling alone. Every process must call it.
    """
    spent = Spent()
    part = -(-study.batch_size // jax.process_count())
    (seen,) = look(study.networks, draws(sampler, study, spent), study.wanted, batch_size=part)
    found = scores(study.names, seen, study.real.whole, study.seed)
    if "clip_score" in study.names and study.texts is not None:
        found["clip_score"] = clip_score(seen.rows["clip.embedding"], study.texts[seen.numbers % len(study.texts)])
    if "lpips" in study.names:
        found["lpips"] = variety(sampler, study)
    return {
        "sampler": sampler.name,
        "steps": sampler.steps,
        "nfe": spent.calls,
        "samples": seen.count,
        "seed": study.seed,
        "not_finite": int(all_rows(np.asarray([spent.broken])).sum()),
        **found,
        "images_per_s": spent.images / spent.sampling,
        "wall_s": spent.sampling,
        "compile_s": spent.compiling,
        "decode_s": spent.decoding,
    }


def floor(study: Study, other: Seen | None = None) -> Row | None:
    """The row of real images against real ones: half against half, or `other` against all; None where neither is known.

    What a perfect sampler would score, with fewer images where halves are compared.
    """
    if other is None:
        if study.real.halves is None:
            return None
        against, other = study.real.halves
        what = "real, half against half (floor)"
    else:
        against, what = study.real.whole, "the run's data (floor)"
    count = other.count or len(other.numbers)
    found = scores(study.names, other, against, study.seed)
    return {"sampler": what, "steps": None, "nfe": None, "samples": count, "seed": study.seed, **found}


def draws(sampler: Sampler, study: Study, spent: Spent) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers [n] and images [n, H, W, 3], uint8, of this process's samples, batch by batch; `spent` tells the time."""
    mesh, size = study.mesh, study.batch_size
    padded = -(-size // mesh.size) * mesh.size
    if padded != size and jax.process_count() > 1:
        raise ValueError(f"a batch of {size} does not split over {mesh.size} devices: take a multiple")
    root = jax.random.key(study.seed)
    k_noise, k_sampler = jax.random.split(root)
    noise = _noise(study.process, study.shape, mesh)
    for number, first in enumerate(range(0, study.count, size)):
        x = noise(k_noise, jnp.asarray(first + np.arange(padded), jnp.uint32))
        cond = sharding.put_batch(mesh, jax.tree.map(partial(_filled, size=padded), study.conditions(number)))
        key = jax.random.fold_in(k_sampler, number)
        jax.block_until_ready((x, cond))
        if number == 0:
            begin = time.perf_counter()
            jax.block_until_ready(sampler.draw(x, cond, key))
            spent.compiling = time.perf_counter() - begin
        begin = time.perf_counter()
        solution = jax.block_until_ready(sampler.draw(x, cond, key))
        spent.sampling += time.perf_counter() - begin
        spent.images += size
        spent.calls = int(solution.nfe)
        mine = _of_process(min(size, study.count - first))
        samples = _on_host(solution.x)[mine]
        if not len(samples):
            continue
        begin = time.perf_counter()
        spent.broken += int(np.sum(~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1)))
        images = in_colour(to_bytes(np.nan_to_num(study.decode(samples))))
        spent.decoding += time.perf_counter() - begin
        yield first + np.arange(mine.start, mine.stop), images


CONDITIONS, EACH = 100, 10
"""LPIPS is of up to so many conditions, and of so many images of each."""


def variety(sampler: Sampler, study: Study) -> float:
    """Mean LPIPS distance between images of one condition, of more samples with a seed of their own.

    Ten images each of up to 100 classes evenly, or of a batch's conditions in turn.
    """
    if study.lpips is None:
        raise ValueError("lpips needs its network: load_lpips gives one")
    batch = jax.tree.map(lambda leaf: all_rows(np.asarray(leaf)), study.conditions(0))
    some = min(study.num_classes, CONDITIONS) or (1 if batch is None else CONDITIONS)
    groups = CONDITIONS if some == 1 else some  # without conditions all images are of one
    labels = np.arange(groups) * study.num_classes // groups

    def conditions(number: int) -> PyTree:
        rows = _of_process(study.batch_size)
        group = (number * study.batch_size + np.arange(rows.start, rows.stop)) // EACH % groups
        if study.num_classes:
            return labels[group].astype(np.int32)
        return jax.tree.map(lambda leaf: leaf[group % len(leaf)], batch)

    other = replace(study, conditions=conditions, count=groups * EACH, seed=study.seed + 1)
    parts = list(draws(sampler, other, Spent()))
    empty = np.zeros((0, *parts[0][1].shape[1:]), np.uint8) if parts else np.zeros((0, 1, 1, 3), np.uint8)
    numbers = all_rows(np.concatenate([np.zeros(0, np.int64), *(n for n, _ in parts)]))
    images = all_rows(np.concatenate([empty, *(x for _, x in parts)]))
    order = np.argsort(numbers)
    of = numbers[order] // EACH if some > 1 else np.zeros(len(numbers), int)
    return perceptual_diversity(study.lpips, images[order], of, seed=study.seed)


def real_variety(images: Images, lpips: Distance, seed: int = 0) -> float | None:
    """The same of real images, drawn by the seed, of their labels; None where they have none.

    Raises ValueError where no label has two images.
    """
    if images.labels is None:
        return None
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(images.labels, return_counts=True)
    kinds = kinds[counts > 1]
    if not len(kinds):
        raise ValueError(f"{images.source} has no label with two images, whose distance lpips could be")
    chosen = kinds[np.arange(min(len(kinds), CONDITIONS)) * len(kinds) // min(len(kinds), CONDITIONS)]
    numbers = [rng.permutation(np.flatnonzero(images.labels == kind))[:EACH] for kind in chosen]
    parts = list(images.batches(64, sorted(int(i) for i in np.concatenate(numbers))))
    x = np.concatenate([in_colour(batch) for _, batch in parts])
    return perceptual_diversity(lpips, x, images.labels[np.concatenate([n for n, _ in parts])], seed=seed)


def labels_in_turn(num_classes: int, batch_size: int) -> Conditions:
    """The labels 0, 1, 2, … in turn, each class equally often; None without classes."""
    if not num_classes:
        return lambda number: None
    part = _of_process(batch_size)
    rows = np.arange(part.start, part.stop)
    return lambda number: ((number * batch_size + rows) % num_classes).astype(np.int32)


class OfData:
    """The conditions of a source's batches; `close` lets the threads end that read ahead."""

    def __init__(self, source: Source):
        self._source = source

    def __call__(self, number: int) -> PyTree:
        """Those of a batch."""
        return self._source(number)["cond"]

    def close(self) -> None:
        """Close the source, if it can be."""
        with released(self._source):
            pass


def conditions_of(data: Data, batch_size: int, seed: int) -> Conditions:
    """Labels in turn, or where conditions are none, such as prompts, those of the data, shuffled by the seed."""
    if data.null is None:
        return labels_in_turn(data.num_classes, batch_size)
    return OfData(data.source(batch_size, seed, 0.0))


def notes_of(row: Row, real: Statistics) -> tuple[str, ...]:
    """What is to be said beside a row's numbers."""
    notes = []
    count, there = row["samples"], real.whole.count
    if count < STANDARD:
        notes.append(f"{count:,} samples, fewer than the standard {STANDARD:,}: FID and its like are larger for fewer")
    if 0 < there < STANDARD:
        notes.append(f"{there:,} real images, fewer than the standard {STANDARD:,}")
    if row.get("not_finite"):
        notes.append(f"{row['not_finite']:,} samples of {row['sampler']} have values that are not finite")
    for name, value in row.items():
        if name.endswith("_clipped"):
            notes.append(
                f"{METRICS[name.removesuffix('_clipped')].title}: negative eigenvalues, {value:.1e} of the "
                "covariances' traces, were set to 0"
            )
    return tuple(notes)


def _of_process(count: int) -> slice:
    """The rows of a batch that this process looks at."""
    here, of = jax.process_index(), jax.process_count()
    return slice(count * here // of, count * (here + 1) // of)


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows repeated at the end to a whole batch of this process."""
    rows = np.asarray(rows)
    missing = size // jax.process_count() - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing > 0 else rows


def _on_host(x: Array) -> np.ndarray:
    """A whole array that may lie on the devices of several processes."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(x, tiled=True))


def _noise(process: Process, shape: tuple[int, ...], mesh: Mesh) -> Callable[[Array, Array], Array]:
    def one(key: Array, i: Array) -> Array:
        return process.prior(jax.random.fold_in(key, i), (1, *shape))[0]

    return jax.jit(jax.vmap(one, (None, 0)), out_shardings=sharding.batch_sharding(mesh))
