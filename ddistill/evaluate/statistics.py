"""Reference statistics: what networks see of the real images, kept in an .npz that other programs read too.

`mu`, `sigma`, `mu_s`, `sigma_s` are ADM's and EDM's names for the moments of Inception's "pool" and "spatial"; other
features are mu.NETWORK.OUTPUT and so on, float64. `about` is JSON: the images, their number and size, and each
network's name, digest of weights and preprocessing. rows.NETWORK.OUTPUT are single features, of the images `numbers`.
Moments of a random half are kept too, so that the real can be compared with the real.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddistill.evaluate.moments import Moments
from ddistill.evaluate.real import Images, in_colour, told
from ddistill.evaluate.seen import Seen, Wanted, all_rows, look
from ddistill.hub.features import Features
from ddistill.version import version

FORMAT = "ddistill statistics, format 1"

_SHORT = {"inception.pool": ("mu", "sigma"), "inception.spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True, eq=False)
class Statistics:
    """What networks see of real images.

    whole: of all of them. halves: of two random halves, or none where they are not known. about: the JSON of the file;
    without "format" where another program wrote it.
    """

    whole: Seen
    halves: tuple[Seen, Seen] | None
    about: Mapping[str, Any]


def identity(networks: Mapping[str, Features]) -> dict[str, dict[str, str]]:
    """What makes features comparable: of each network its name, the digest of its weights, its preprocessing."""
    return {
        kind: {"name": f.name, "digest": f.digest, "preprocessing": f"{f.preprocessing.name}, {f.size} pixels"}
        for kind, f in sorted(networks.items())
    }


def statistics_of(
    images: Images, networks: Mapping[str, Features], wanted: Wanted, *, kept: int, batch_size: int, seed: int = 0
) -> Statistics:
    """Look at all images. kept: rows to keep at most, of images drawn by the seed, as the halves are.

    Raises ValueError where none can be read; what was skipped is in about["notes"].
    """
    rng = np.random.default_rng(seed)
    group = np.zeros(len(images), np.int64)
    group[rng.permutation(len(images))[: len(images) // 2]] = 1
    keep = np.zeros(len(images), bool)
    keep[rng.permutation(len(images))[:kept]] = True
    seen = ((numbers, in_colour(batch)) for numbers, batch in images.batches(batch_size))
    try:
        parts = look(networks, seen, wanted, batch_size=batch_size, groups=group, keep=keep)
    except ValueError as error:
        if len(images.skipped) == len(images):
            raise ValueError(f"{images.source} holds no image that can be read; {told(images)[-1]}") from error
        raise
    images.skipped.update(_of_all_processes(images.skipped))
    one, other = parts if len(parts) == 2 else (parts[0], None)
    about = {
        "format": FORMAT,
        "version": version(),
        "source": images.source,
        "images": one.count + (0 if other is None else other.count),
        "resolution": list(images.shape[:2]),
        "networks": identity(networks),
        "rows": {"kept": kept, "seed": seed},
        "notes": list(told(images)),
    }
    return Statistics(one if other is None else one + other, None if other is None else (one, other), about)


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write a file, whole or not at all; of several processes the first does."""
    if jax.process_index() != 0:
        return
    whole, halves = statistics.whole, statistics.halves
    arrays: dict[str, Any] = {"about": np.asarray(json.dumps(dict(statistics.about)))}
    for key, moments in whole.moments.items():
        mu, sigma = _names(key)
        arrays |= {mu: moments.mean, sigma: moments.covariance, f"count.{key}": moments.count}
        if halves is not None:
            half = halves[1].moments[key]
            arrays |= {f"half.mean.{key}": half.mean, f"half.scatter.{key}": half.scatter}
            arrays[f"half.count.{key}"] = half.count
    arrays |= {f"rows.{key}": rows for key, rows in whole.rows.items()} | {"numbers": whole.numbers}
    if halves is not None:
        arrays["half.numbers"] = halves[1].numbers
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def open_statistics(path: Path) -> Statistics:
    """Read a file of ours, or one of ADM or EDM with `mu` and `sigma` and perhaps `mu_s` and `sigma_s`.

    Raises FileNotFoundError where there is none, ValueError for damaged files and those without moments.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is no file' if path.exists() else 'does not exist'}: give an .npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name not in ("arr_0", "x")}
        about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
        moments, half = {}, {}
        keys = [name.removeprefix("count.") for name in arrays if name.startswith("count.")] if about else list(_SHORT)
        for key in keys:
            mu, sigma = _names(key)
            if mu in arrays and sigma in arrays:
                # Where the number of images is not told the covariance is what counts.
                count = int(arrays.get(f"count.{key}", 2))
                mean, covariance = (np.asarray(arrays[name], np.float64) for name in (mu, sigma))
                moments[key] = Moments(count, mean, covariance * (count - 1))
            if f"half.count.{key}" in arrays:
                count = int(arrays[f"half.count.{key}"])
                half[key] = Moments(count, arrays[f"half.mean.{key}"], arrays[f"half.scatter.{key}"])
    except Exception as error:  # NumPy, zipfile and JSON raise many kinds for a damaged file
        raise ValueError(f"{path} cannot be read as statistics: {error or type(error).__name__}") from error
    rows = {name.removeprefix("rows."): a for name, a in arrays.items() if name.startswith("rows.")}
    if not moments and not rows:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: statistics have mu and sigma, as ADM's and EDM's"
        )
    if about and about.get("format") != FORMAT:
        raise ValueError(f"{path} is of the format {about.get('format')!r}; this version reads {FORMAT!r}")
    for key, m in moments.items():
        if m.mean.ndim != 1 or m.scatter.shape != (len(m.mean),) * 2:
            raise ValueError(f"{path}: moments of {key} have shapes {m.mean.shape} and {m.scatter.shape}")
    numbers = arrays.get("numbers", np.zeros(0, np.int64))
    whole = Seen(int(about.get("images", 0)), moments, rows, numbers)
    if "half.numbers" not in arrays:
        return Statistics(whole, None, about)
    second = np.isin(numbers, arrays["half.numbers"])
    count = max((m.count for m in half.values()), default=int(second.sum()))
    b = Seen(count, half, {key: a[second] for key, a in rows.items()}, numbers[second])
    rest = {key: whole.moments[key] - m for key, m in half.items()}
    a = Seen(whole.count - count, rest, {key: a[~second] for key, a in rows.items()}, numbers[~second])
    return Statistics(whole, (a, b), about)


def statistics_in(path: Path) -> tuple[Statistics | None, bool]:
    """The statistics in an .npz, None where a path holds none; and whether it holds images.

    Raises as `open_statistics`.
    """
    if path.suffix != ".npz" or not path.is_file():
        return None, True
    try:
        with np.load(path, allow_pickle=False) as file:
            none = not {"mu", "about"} & set(file.files)
            images = bool({"arr_0", "x"} & set(file.files))
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged file
        raise ValueError(f"{path} cannot be read as .npz: {error or type(error).__name__}") from error
    return None if none and images else open_statistics(path), images


def with_moments(statistics: Statistics, others: Statistics, path: Path) -> Statistics:
    """Statistics of images with the moments that a file has beside them, as in ADM's, where they are of many more."""
    moments = {k: others.whole.moments.get(k, m) for k, m in statistics.whole.moments.items()}
    for key, of in moments.items():
        _check_width(path, key, len(of.mean), len(statistics.whole.moments[key].mean))
    whole = replace(statistics.whole, moments=moments)
    note = f"{path} has moments of its own, which are taken, beside {statistics.whole.count:,} images for all else"
    about = {**statistics.about, "notes": [*statistics.about["notes"], note]}
    return Statistics(whole, statistics.halves, about)


def check_statistics(
    path: Path, statistics: Statistics, networks: Mapping[str, Features], wanted: Wanted, shape: tuple[int, ...]
) -> tuple[str, ...]:
    """What is to be said about statistics that samples of this shape [H, W, C] are compared with by these networks.

    Raises ValueError where they are of another network, other weights, another preprocessing or resolution, or lack
    what is wanted.
    """
    about, used = statistics.about, identity(networks)
    whole = statistics.whole
    lacking = sorted((wanted.moments - set(whole.moments)) | (wanted.rows - set(whole.rows)))
    if lacking:
        raise ValueError(
            f"{path} lacks {', '.join(lacking)}, which these metrics need: give the images in place of it, or ask for "
            "other metrics"
        )
    if not about:
        for key in sorted(wanted.moments):
            _check_width(path, key, len(whole.moments[key].mean), width_of(networks, key, shape))
        return (f"{path} does not tell its network, preprocessing and resolution: they are taken to be these",)
    for kind in sorted({key.split(".")[0] for key in wanted.moments | wanted.rows}):
        theirs = about["networks"].get(kind, {})
        lines = [
            f"{k} {theirs.get(k, 'none')!r} there, {v!r} here" for k, v in used[kind].items() if theirs.get(k) != v
        ]
        if lines:
            raise ValueError(
                f"{path} was made with another {kind} network: {'; '.join(lines)}. Numbers of the two do not compare: "
                "make statistics anew from the images"
            )
    if about["resolution"] != list(shape[:2]):
        sides = [" x ".join(map(str, size)) for size in (about["resolution"], shape[:2])]
        raise ValueError(
            f"{path} is of images of {sides[0]} pixels, and the samples have {sides[1]}: make statistics of images of "
            "that size"
        )
    return tuple(about.get("notes", ()))


def _of_all_processes(skipped: Mapping[int, str]) -> dict[int, str]:
    """What each process met and could not read, in all of them."""
    lines = "".join(json.dumps([i, why]) + "\n" for i, why in skipped.items()) + "\n"
    together = all_rows(np.frombuffer(lines.encode(), np.uint8)).tobytes().decode()
    return dict(map(json.loads, filter(None, together.split("\n"))))


def _check_width(path: Path, key: str, there: int, here: int) -> None:
    if there != here:
        raise ValueError(
            f"{path} has {there} numbers for {key}, and the network has {here}: these statistics are of another network"
        )


def width_of(networks: Mapping[str, Features], key: str, shape: tuple[int, ...]) -> int:
    """How many numbers a feature has, for images of this shape [H, W, C]."""
    kind, output = key.split(".", 1)
    image = jax.ShapeDtypeStruct((1, *shape[:2], 3), np.uint8)
    return jax.eval_shape(networks[kind].apply, image)[output].shape[1]


def _names(key: str) -> tuple[str, str]:
    return _SHORT.get(key, (f"mu.{key}", f"sigma.{key}"))
