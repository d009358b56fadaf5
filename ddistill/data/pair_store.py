"""A folder of teacher pairs: made shard by shard, taken up again where it stopped, read without loading all of it.

manifest.json says what made the pairs. Shard i holds the pairs from i · shard_size on, as one array of records in
`<i>-<digest>.npy`: a shard whose bytes do not give the digest of its name is not there. Files get their names when they
are whole.
"""

import functools
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from ddistill.data.arrays import ArraySource, Source
from ddistill.data.pairs import at_least_one, gathered, pair_maker
from ddistill.integrators import dpmpp_3m
from ddistill.net import Net
from ddistill.overrides import describe, differences
from ddistill.process import Process

KIND = "ddistill teacher pairs, format 1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PairStore:
    """A whole store of `count` pairs, opened by `open_pairs`; `made` is what the manifest says of their making."""

    folder: Path
    made: dict[str, Any]
    count: int
    shard_size: int
    shards: tuple[Path, ...]

    def __len__(self) -> int:
        """The number of pairs."""
        return self.count

    def source(self, batch_size: int, seed: int = 0) -> Source:
        """Shuffled batches of noise, x, perhaps cond and path; those an `ArraySource` of all the pairs would give.

        Only the rows of a batch are read.
        """
        numbers = ArraySource({"row": np.arange(self.count)}, batch_size, seed)

        @functools.lru_cache(maxsize=256)  # every open shard takes a file descriptor
        def shard(i: int) -> np.ndarray:
            return np.load(self.shards[i], mmap_mode="r")

        def batch(step: int) -> dict[str, np.ndarray]:
            rows = numbers(step)["row"]
            at, within = np.divmod(rows, self.shard_size)
            records = np.empty(len(rows), shard(0).dtype)
            for i in np.unique(at):
                here = at == i
                records[here] = shard(int(i))[within[here]]
            return _fields(records)

        return batch

    def arrays(self) -> dict[str, np.ndarray]:
        """All pairs in memory: noise [count, ...], x [count, ...], perhaps cond [count] and path."""
        return _fields(np.concatenate([np.load(shard) for shard in self.shards]))

    def check_fits(self, process: Process, shape: tuple[int, ...], num_classes: int, points: int = 0) -> None:
        """Raise ValueError unless the pairs are of this process, shape and classes, with path at so many intervals.

        points = 0 asks for no path.
        """
        wanted = {"process": describe(process), "shape": list(shape), "num_classes": num_classes}
        wanted |= {"points": points} if points else {}
        lines = differences({name: self.made[name] for name in wanted}, wanted)
        if lines:
            told = "; ".join(lines[:8]).replace(" before", " stored").replace(" now", " wanted")
            raise ValueError(f"the pairs in {self.folder} do not fit: {told}. Make others with `ddistill pairs`")


def write_pairs(
    folder: Path | str,
    teacher: Net,
    process: Process,
    key: Array,
    count: int,
    shape: tuple[int, ...],
    *,
    steps: int = 64,
    num_classes: int = 0,
    integrator: Callable = dpmpp_3m,
    points: int = 0,
    shard_size: int = 4096,
    batch_size: int = 4096,
    report: Callable[[int, int], None] = lambda done, of: None,
    part: tuple[int, int] | None = None,
) -> int:
    """Make the pairs of `teacher_pairs` in a folder; answers how many shards this call had to make.

    Shards that are there and whole stay, so that a call that was cut off goes on where it stopped, and one with a
    larger count adds to the store. part: (p, P) makes the shards p, p + P, …; by default those of this process among
    all, which then wait for each other and must share the folder. report: called with the pairs of this part that are
    done, and with their number.
    Raises ValueError where the folder holds other pairs or other things, OSError where it cannot be written.
    """
    at_least_one(count=count, shard_size=shard_size)
    folder, teacher = Path(folder), gathered(teacher)
    manifest = {
        "kind": KIND,
        "count": count,
        "shard_size": shard_size,
        "made": {
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "random": str(jax.random.key_impl(key)),
            "shape": list(shape),
            "num_classes": num_classes,
            "steps": steps,
            "points": points,
            "integrator": describe(integrator),
            "process": describe(process),
            "teacher": fingerprint(teacher),
        },
    }
    index, parts = part or (jax.process_index(), jax.process_count())
    try:
        _claim(folder, manifest)
        make = pair_maker(
            teacher, process, key, shape, steps=steps, num_classes=num_classes, integrator=integrator, points=points,
            batch_size=min(batch_size, shard_size, count),
        )  # fmt: skip
        mine = range(index, -(-count // shard_size), parts)
        done, total, made = 0, sum(_rows(i, count, shard_size) for i in mine), 0
        for i in mine:
            rows = _rows(i, count, shard_size)
            if _whole(folder, i, rows) is None:
                for old in (*folder.glob(f"{i:05d}-*"), *folder.glob(f".{i:05d}-*")):
                    old.unlink()
                _write(folder, i, make(i * shard_size, rows))
                made += 1
            done += rows
            report(done, total)
    except OSError as error:
        raise OSError(f"cannot write pairs to {folder}: {error.strerror or error}") from error
    if part is None and parts > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("teacher pairs")
    return made


def open_pairs(folder: Path | str) -> PairStore:
    """Open a store, checking every shard's digest.

    Raises FileNotFoundError where there is none, ValueError where it is another kind of folder or a shard is missing or
    damaged.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if manifest is None:
        what = "is not a folder of teacher pairs" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: give one that `ddistill pairs` wrote")
    count, size = manifest["count"], manifest["shard_size"]
    shards = [_whole(folder, i, _rows(i, count, size)) for i in range(-(-count // size))]
    missing = [i for i, shard in enumerate(shards) if shard is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards in {folder} are missing or damaged (numbers "
            f"{', '.join(map(str, missing[:8]))}{', …' * (len(missing) > 8)}): repeat the command that made the folder "
            "and it makes them"
        )
    return PairStore(folder, manifest["made"], count, size, tuple(shard for shard in shards if shard is not None))


def fingerprint(teacher: Net) -> str:
    """A digest of all arrays of a network, by name."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path((teacher.params, teacher.rest)):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _rows(i: int, count: int, shard_size: int) -> int:
    return min(shard_size, count - i * shard_size)


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the folder a store of these pairs, or raise if it is anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    # Listed before the manifest is read, which another process may be writing just now, ahead of its shards.
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    before = _manifest(folder)
    if before is None:
        if others:
            raise ValueError(
                f"{folder} is not empty and holds no teacher pairs but {', '.join(others[:5])}"
                f"{', …' * (len(others) > 5)}. Give a new or an empty folder"
            )
    else:
        lines = differences(before["made"], manifest["made"])
        lines += differences({"shard_size": before["shard_size"]}, {"shard_size": manifest["shard_size"]})
        if before["count"] > manifest["count"]:
            lines.append(f"count: {before['count']} before, {manifest['count']} now")
        if lines:
            raise ValueError(
                f"{folder} holds other pairs: {'; '.join(lines[:8])}. Write these to a new folder, or repeat the "
                "command that made this one to finish it (a larger count adds to it)"
            )
    if before != manifest:
        _put(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {name: manifest[name] for name in ("kind", "count", "shard_size", "made")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of teacher pairs (or a damaged one): take another folder") from error
    if found["kind"] != KIND:
        raise ValueError(f"{path} is of the kind {found['kind']!r}; {KIND!r} is what this version reads")
    return found


def _whole(folder: Path, i: int, rows: int) -> Path | None:
    """The file of shard i if its bytes are those it was written with and hold so many rows."""
    for path in sorted(folder.glob(f"{i:05d}-*.npy")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.name == _name(i, digest) and len(np.load(path, mmap_mode="r")) == rows:
            return path
    return None


def _write(folder: Path, i: int, arrays: dict[str, np.ndarray]) -> None:
    kinds = [(name, np.int32 if a.dtype.kind == "i" else np.float32, a.shape[1:]) for name, a in arrays.items()]
    records = np.empty(len(arrays["x"]), kinds)
    for name, array in arrays.items():
        records[name] = array
    buffer = io.BytesIO()
    np.save(buffer, records)
    content = buffer.getvalue()
    _put(folder / _name(i, hashlib.sha256(content).hexdigest()), content)


def _name(i: int, digest: str) -> str:
    return f"{i:05d}-{digest[:16]}.npy"


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _fields(records: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()}
