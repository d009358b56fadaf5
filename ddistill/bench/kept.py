"""Samples that the benchmark keeps beside its rows, for pictures: a small file for each mixture, method and seed."""

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddistill.report.page import Motion

PATHS = 64
"""How many paths are kept."""


@dataclass(frozen=True)
class Kept:
    """Samples [n, d] of one student by its number of steps, and the modes that all its samples, not these alone, miss.

    motion: paths of the first of them in most steps, as `report.motion` gives them; None where none were kept.
    """

    samples: Mapping[int, np.ndarray]
    lost: Mapping[int, np.ndarray]
    motion: Motion | None = None


def how_many(d: int) -> int:
    """How many samples in d dimensions are kept: 500 in up to two, for which files take 20 KB, 64 in more."""
    return 500 if d <= 2 else 64


def folder_of(rows: Path) -> Path:
    """The folder of samples that belongs to a file of rows or a page."""
    return rows.with_name(f"{rows.stem}-samples")


def write_kept(folder: Path, mixture: str, method: str, seed: int, kept: Kept) -> None:
    """Write a student's samples, whole or not at all. Raises OSError where the folder cannot be written."""
    arrays: dict[str, np.ndarray] = {f"samples_{n}": np.asarray(x, np.float16) for n, x in kept.samples.items()}
    arrays |= {f"lost_{n}": np.asarray(k, np.int32) for n, k in kept.lost.items()}
    if kept.motion is not None:
        arrays |= {"path": np.asarray(kept.motion.x, np.float16), "noise": np.asarray(kept.motion.noise, np.float32)}
    folder.mkdir(parents=True, exist_ok=True)
    file = _file(folder, mixture, method, seed)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with part.open("wb") as out:
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]  # numpy takes allow_pickle for one of the arrays
    part.replace(file)


def read_kept(folder: Path, mixture: str, method: str, seed: int = 0) -> Kept | None:
    """A student's samples, None where none are kept or the file is damaged."""
    file = _file(folder, mixture, method, seed)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            samples, lost = (_numbered(arrays, part) for part in ("samples_", "lost_"))
            path = None
            if "path" in arrays:
                path = Motion(method, "student", arrays["noise"].tolist(), arrays["path"].astype(np.float32))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Kept({n: x.astype(np.float32) for n, x in sorted(samples.items())}, lost, path)


def _numbered(arrays: Mapping[str, np.ndarray], part: str) -> dict[int, np.ndarray]:
    return {int(name.removeprefix(part)): arrays[name] for name in arrays if name.startswith(part)}


def _file(folder: Path, mixture: str, method: str, seed: int) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', Path(mixture).stem)}.{method}.{seed}.npz"
