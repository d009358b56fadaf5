"""What a network draws while it trains: pictures from the same noise each time, and how far its samples are from data.

Looking takes nothing from training: noise, conditions and data are those of a seed, and parameters are only read.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from ddistill.config import Data
from ddistill.evaluate import frechet
from ddistill.evaluate.samplers import Draw, Sampler, across, start, student_solver, teacher_solver
from ddistill.gathering import Place
from ddistill.integrators import dpmpp_2m
from ddistill.log import Log
from ddistill.net import Net, laid_out
from ddistill.process import Process
from ddistill.report import image_grid
from ddistill.sharding import Rule
from ddistill.stages import Look, Stage

STUDENT_STEPS = (1, 4)
TEACHER_STEPS = 8
SHOWN = 36
WIDEST = 1024
"""Coordinates up to which the Fréchet distance is measured: its time grows with their cube."""


def looks_of(
    data: Data,
    process: Process,
    stages: Sequence[Stage],
    mesh: Mesh,
    log: Log,
    count: int,
    batch_size: int,
    seed: int,
    rule: Rule = Rule(),  # noqa: B008
) -> dict[str, Look]:
    """What looks at the network of each stage, by its name; the first is the teacher's if it is called so.

    process: the first teacher's. mesh, rule: where the networks lie. count: samples that are measured, the
    first 36 of which are shown. A student is drawn with 1 and 4 steps where it serves them, a teacher with 8 of
    DPM-Solver++(2M). Raises ValueError for a count below 2.
    """
    if count < 2:
        raise ValueError(f"preview_samples = {count}: at least 2 are needed to compare with data")
    real = _batch(data, count, seed)
    noise, labels, key = start(process, data.shape, data.num_classes, count, seed)
    cond = real["cond"] if data.null is not None else labels
    looks: dict[str, Look] = {}
    own, place = process, Place(mesh, rule)
    for stage in stages:
        draws: dict[int, Draw] = {}
        if stage.name == "teacher":
            draws[TEACHER_STEPS] = teacher_solver(process, dpmpp_2m, TEACHER_STEPS)
        else:
            own = stage.method.process or own
            for steps in STUDENT_STEPS:
                try:
                    draws[steps] = student_solver(stage.method, process, own, steps)
                except ValueError:  # steps that this student does not serve
                    continue

        def look(step: int, net: Net, draws=draws) -> None:
            numbers: dict[str, float] = {}
            pictures: dict[str, np.ndarray] = {}
            for steps, draw in draws.items():
                sampler = across(Sampler("preview", partial(draw, laid_out(net, place)), steps), mesh)
                x = drawn(sampler, noise, cond, key, batch_size)
                name = f"{steps}-step{'s' * (steps > 1)}"
                numbers |= {f"{measure}/{name}": value for measure, value in measured(x, real["x"]).items()}
                pictures[name] = picture(x[:SHOWN], data, real["x"])
            log.preview(step, numbers, pictures)

        looks[stage.name] = look
    return looks


def drawn(sampler: Sampler, noise: Any, cond: Any, key: jax.Array, batch_size: int) -> np.ndarray:
    """Samples [n, ...] from noise [n, ...], `batch_size` at a time, the last ones from noise that is used again."""
    n, parts = len(noise), []
    for begin in range(0, n, batch_size):
        rows = np.arange(begin, begin + min(batch_size, n)) % n  # all batches alike, for one compilation
        some, given = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (noise, cond))
        parts.append(np.asarray(sampler.draw(some, given, jax.random.fold_in(key, begin)).x))
    return np.concatenate(parts)[:n]


def measured(x: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """How far samples [n, ...] are from data [m, ...], over the data's spread: cheap, and comparable within a run.

    finite: the share of samples that are. mean: the root mean square, over coordinates, of how far their means are from
    the data's, over the data's standard deviation. spread: their standard deviation over the data's, both of all
    coordinates together; 1 is right, less are samples that are too much alike. frechet: the distance of Gaussians over
    the data's total variance, where there are at most 1024 coordinates; with few samples it is not small even if they
    are right. With fewer than two finite samples only `finite` is known.
    """
    x, real = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, real))
    good = np.isfinite(x).all(axis=1)
    numbers = {"finite": float(good.mean())}
    x = x[good]
    if len(x) < 2:
        return numbers
    variance = max(float(real.var(axis=0).mean()), 1e-12)
    miss = float(np.mean((x.mean(axis=0) - real.mean(axis=0)) ** 2))
    numbers |= {"mean": math.sqrt(miss / variance), "spread": math.sqrt(float(x.var(axis=0).mean()) / variance)}
    if x.shape[1] <= WIDEST:
        numbers["frechet"] = frechet(x, real) / variance / x.shape[1]
    return numbers


def picture(x: np.ndarray, data: Data, real: np.ndarray) -> np.ndarray:
    """Samples [n, ...] as a picture [height, width, 1 or 3] of bytes.

    Images, and latents that `data` can decode, lie side by side; of other latents the first channel is shown. Of
    vectors the first two coordinates are points in the frame of the data.
    """
    if x.ndim != 4:
        return _points(x.reshape(len(x), -1), real.reshape(len(real), -1))
    images = np.asarray(data.to_unit(x))
    if images.shape[3] not in (1, 3):
        images = images[..., :1]
    images = np.nan_to_num(images, nan=0.0, posinf=1.0, neginf=0.0)
    scale = max(1, math.ceil(32 / min(images.shape[1:3])))
    grid = image_grid(np.kron(images, np.ones((1, scale, scale, 1))), math.ceil(math.sqrt(len(x))))
    return grid


def _points(x: np.ndarray, real: np.ndarray, side: int = 256) -> np.ndarray:
    """Points in black on white, data in grey below them; those outside of the frame lie on its edge."""
    x, real = (np.pad(a, ((0, 0), (0, max(0, 2 - a.shape[1]))))[:, :2] for a in (x, real))
    low, high = real.min(axis=0), real.max(axis=0)
    room = 0.25 * np.maximum(high - low, 1e-6)
    low, high = low - room, high + room
    page = np.full((side, side, 1), 255, np.uint8)
    for points, ink in ((real, 200), (x[np.isfinite(x).all(axis=1)], 0)):
        at = np.clip((points - low) / (high - low) * side, 1, side - 2).astype(int)
        for dx in (0, 1):
            for dy in (0, 1):
                page[side - 1 - at[:, 1] - dy, at[:, 0] + dx] = ink
    return page


def _batch(data: Data, count: int, seed: int) -> dict[str, Any]:
    """A batch of data, and its conditions, the same in all processes."""
    count += -count % jax.process_count()
    batch = data.first(count, seed)
    return batch if jax.process_count() == 1 else process_allgather(batch, tiled=True)
