"""A folder of records: made shard by shard, taken up again where it stopped, read without loading all of it.

manifest.json says what made the records. Shard i holds those made from the items i · shard_size on, as one array in
`<i>-<digest>.npy`: a shard whose bytes do not give the digest of its name is not there. Files get their names when they
are whole.
"""

import functools
import hashlib
import io
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddistill import hosts, storage
from ddistill.overrides import differences

MANIFEST = "manifest.json"

Make = Callable[[int, int], Mapping[str, np.ndarray]]
"""(first, count) -> the records of the items first, …, first + count − 1: named arrays of equal leading length."""


@dataclass(frozen=True)
class Kind:
    """What the records of a folder are: the manifest's name for it, and the words of errors.

    gaps: whether items may have no record. Records are then checked by their digest alone, not by their number.
    """

    name: str
    what: str
    noun: str
    command: str
    gaps: bool = False


@dataclass(frozen=True)
class Records:
    """A whole folder, opened by `open_records`; `made` is what the manifest says of their making.

    count: the items that records were to be made of. ends: [shards], the number of records up to the end of each.
    """

    folder: Path
    made: dict[str, Any]
    count: int
    shard_size: int
    shards: tuple[Path, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        """The number of records."""
        return self.ends[-1]

    def rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The records of these numbers [n], read from disk: each array [n, ...], fresh memory."""
        at = np.searchsorted(self.ends, rows, side="right")
        within = rows - np.concatenate([[0], self.ends])[at]
        records = np.empty(len(rows), self._shard(int(at[0])).dtype)  # a shard of gaps alone has other fields
        for i in np.unique(at):
            here = at == i
            records[here] = self._shard(int(i))[within[here]]
        return fields(records)

    def arrays(self) -> dict[str, np.ndarray]:
        """All records in memory: each array [len, ...]."""
        whole = [np.load(shard) for shard in self.shards]
        return fields(np.concatenate([records for records in whole if len(records)]))

    def missing(self) -> np.ndarray:
        """The numbers [n] of the items without a record; needs the field `index`."""
        gaps = []
        for i, length in enumerate(np.diff([0, *self.ends])):
            first, rows = i * self.shard_size, expected(i, self.count, self.shard_size)
            if length < rows:
                gaps.append(np.setdiff1d(np.arange(first, first + rows), np.load(self.shards[i])["index"]))
        return np.concatenate(gaps) if gaps else np.zeros(0, np.int64)

    def single(self, name: str) -> dict[str, np.ndarray] | None:
        """The record that `put_single` wrote, without a leading axis; None if there is none."""
        path = _found(self.folder, name)
        return None if path is None else {k: v[0] for k, v in fields(np.load(path)).items()}

    def _shard(self, i: int) -> np.ndarray:
        return _mapped(self.shards[i])


def write_records(
    folder: Path,
    kind: Kind,
    made: Mapping[str, Any],
    count: int,
    shard_size: int,
    make: Make,
    *,
    report: Callable[[int, int], None] = lambda done, of: None,
    part: tuple[int, int] | None = None,
    together: bool = False,
) -> int:
    """Make the records of `count` items; answers how many shards this call had to make.

    Shards that are there and whole stay, so that a call that was cut off goes on where it stopped, and one with a
    larger count adds to the folder. made: JSON that tells apart what must not be mixed. part: (p, P) makes the shards
    p, p + P, …; by default those of this process among all, which then wait for each other and must share the folder.
    together: each shard is made by all processes at once, and written by the one whose part it is of.
    report: called with the items of this part that are done, and with their number.
    Raises ValueError where the folder holds other records or other things, and for one in a bucket, of which shards
    cannot be mapped; OSError where it cannot be written.
    """
    if storage.remote(folder):
        raise ValueError(
            f"{kind.noun} are mapped from a disk, and {folder} is a bucket: write them to a folder that all processes "
            "share, and copy it"
        )
    index, parts = part or (jax.process_index(), jax.process_count())
    try:
        _claim(folder, kind, {"kind": kind.name, "count": count, "shard_size": shard_size, "made": dict(made)})
        mine = range(index, -(-count // shard_size), parts)
        done, total, new = 0, sum(expected(i, count, shard_size) for i in mine), 0
        for i in range(-(-count // shard_size)) if together else mine:
            rows = expected(i, count, shard_size)
            missing = i in mine and _whole(folder, kind, i, rows) is None
            if hosts.in_any(missing) if together else missing:
                records = make(i * shard_size, rows)
                write = functools.partial(put_single, folder, _stem(i), records) if missing else (lambda: None)
                hosts.checked_by_all(write) if together else write()
                new += missing
            if i in mine:
                done += rows
                report(done, total)
    except OSError as error:
        raise OSError(f"cannot write {kind.noun} to {folder}: {error.strerror or error}") from error
    if part is None and parts > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(kind.name)
    return new


def open_records(folder: Path, kind: Kind, verify: bool = True) -> Records:
    """Open a folder. verify: check every shard's digest, some seconds per gigabyte, and not only its length.

    Raises FileNotFoundError where there is none, ValueError where it is another kind of folder, has no records, or a
    shard is missing or damaged.
    """
    manifest = _manifest(folder, kind)
    if manifest is None:
        what = f"is not a folder of {kind.what}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: give one that `{kind.command}` wrote")
    count, size = manifest["count"], manifest["shard_size"]
    found = [_whole(folder, kind, i, expected(i, count, size), verify) for i in range(-(-count // size))]
    missing = [i for i, shard in enumerate(found) if shard is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} shards in {folder} are missing or damaged (numbers "
            f"{', '.join(map(str, missing[:8]))}{', …' * (len(missing) > 8)}): repeat the command that made the folder "
            "and it makes them"
        )
    shards = tuple(shard for shard in found if shard is not None)
    ends = np.cumsum([len(_mapped(shard)) for shard in shards])
    if not ends[-1]:
        raise ValueError(f"{folder} holds no {kind.noun}: none of its {count} items could be read")
    return Records(folder, manifest["made"], count, size, shards, tuple(map(int, ends)))


def put_single(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write records of their own under a name, in place of those that had it: named arrays of equal leading length."""
    for old in (*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*")):
        old.unlink()
    buffer = io.BytesIO()
    np.save(buffer, joined(arrays))
    content = buffer.getvalue()
    _put(folder / _name(name, hashlib.sha256(content).hexdigest()), content)


def joined(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Named arrays [n, ...] as one array of n records."""
    records = np.empty(len(next(iter(arrays.values()))), [(k, a.dtype, a.shape[1:]) for k, a in arrays.items()])
    for name, array in arrays.items():
        records[name] = array
    return records


def fields(records: np.ndarray) -> dict[str, np.ndarray]:
    """Records as named arrays."""
    arrays = {name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()}
    # An .npy file keeps two bytes of bfloat16 and not their name.
    return {k: a.view(jnp.bfloat16) if a.dtype.kind == "V" and a.itemsize == 2 else a for k, a in arrays.items()}


def expected(i: int, count: int, shard_size: int) -> int:
    """The items of shard i."""
    return min(shard_size, count - i * shard_size)


@functools.lru_cache(maxsize=256)  # every open shard takes a file descriptor
def _mapped(path: Path) -> np.ndarray:
    return _load(path)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # an array without records cannot be mapped
        return np.load(path)


def _claim(folder: Path, kind: Kind, manifest: dict[str, Any]) -> None:
    """Make the folder one of these records, or raise if it is anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    # Listed before the manifest is read, which another process may be writing just now, ahead of its shards.
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    before = _manifest(folder, kind)
    if before is None:
        if others:
            raise ValueError(
                f"{folder} is not empty and holds no {kind.what} but {', '.join(others[:5])}"
                f"{', …' * (len(others) > 5)}. Give a new or an empty folder"
            )
    else:
        lines = differences(before["made"], manifest["made"])
        lines += differences({"shard_size": before["shard_size"]}, {"shard_size": manifest["shard_size"]})
        if before["count"] > manifest["count"] or (kind.gaps and before["count"] != manifest["count"]):
            lines.append(f"count: {before['count']} before, {manifest['count']} now")
        if lines:
            adds = "" if kind.gaps else " (a larger count adds to it)"
            raise ValueError(
                f"{folder} holds other {kind.noun}: {'; '.join(lines[:8])}. Write these to a new folder, or repeat the "
                f"command that made this one to finish it{adds}"
            )
    if before != manifest:
        _put(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _manifest(folder: Path, kind: Kind) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {name: manifest[name] for name in ("kind", "count", "shard_size", "made")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of {kind.what} (or a damaged one): take another folder") from error
    if found["kind"] != kind.name:
        raise ValueError(f"{path} is of the kind {found['kind']!r}; {kind.name!r} is what this version reads")
    return found


def _whole(folder: Path, kind: Kind, i: int, rows: int, verify: bool = True) -> Path | None:
    """The file of shard i if its bytes are those it was written with and hold so many rows."""
    path = _found(folder, _stem(i), verify)
    if path is None:
        return None
    try:
        length = len(_load(path))
    except (ValueError, OSError, EOFError):  # cut off, where digests are not asked for
        return None
    return path if length == rows or (kind.gaps and length < rows) else None


def _found(folder: Path, name: str, verify: bool = True) -> Path | None:
    for path in sorted(folder.glob(f"{name}-*.npy")):
        if not verify:
            return path
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.name == _name(name, digest):
            return path
    return None


def _stem(i: int) -> str:
    return f"{i:05d}"


def _name(name: str, digest: str) -> str:
    return f"{name}-{digest[:16]}.npy"


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # processes may write the same manifest
    part.write_bytes(content)
    part.replace(path)
