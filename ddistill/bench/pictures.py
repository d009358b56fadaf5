"""Pictures of the benchmark: for each mixture the samples of every method, their paths, the modes lost in red.

Samples of the exact teacher are made here; those of students were kept when they were trained (`bench.kept`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddistill import grids
from ddistill.bench.exact import Row
from ddistill.bench.kept import PATHS, how_many, read_kept
from ddistill.evaluate.mixture import SCALE, judge
from ddistill.integrators import dpmpp_2m, euler
from ddistill.methods import METHODS
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import edm
from ddistill.report import canvas
from ddistill.report.canvas import COLOURS, FAINT, INK
from ddistill.report.motion import motion, teacher_path
from ddistill.report.page import Drawn, Motion, Sheet

LOST = "#c8102e"
_JUDGED = 2000  # samples by which the teacher's lost modes are known: a mode of 1 % holds twenty of them
_TEACHERS = (
    ("teacher/dpmpp_2m, 35 steps", dpmpp_2m, (35,)),  # first: what students are compared with unless told otherwise
    ("teacher/dpmpp_2m", dpmpp_2m, (1, 2, 4, 8)),
    ("teacher/euler", euler, (8,)),
)
_COLUMNS = 6


@dataclass(frozen=True)
class Shown:
    """What there is to show of a mixture: samples, paths, and the modes' middles as samples are shown.

    modes: how many there are. middles [K, ...]: images where samples are images.
    """

    drawn: Sequence[Drawn] = ()
    motions: Sequence[Motion] = ()
    centres: np.ndarray | None = None
    modes: int = 0
    middles: np.ndarray | None = None
    words: str = ""


def shown(name: str, rows: Sequence[Row], keep: Path | None) -> Shown:
    """The exact samples and teacher of a mixture, and the samples kept of the rows' students, of the first seed.

    Raises FileNotFoundError or ValueError where the mixture cannot be read.
    """
    mixture = Mixture.load(name).standardised(SCALE)
    process, view = edm(), _view(name, mixture)
    n, flat = how_many(mixture.d), mixture.d == 2
    teacher = as_teacher(mixture, process)
    noise = process.prior(jax.random.key(7), (10_000, mixture.d))[:_JUDGED]  # that of `bench.exact.problem`
    by = judge(mixture, _JUDGED)
    drawn = [Drawn("exact samples", "reference", {0: Sheet(view(mixture.sample(jax.random.key(3), n)))})]
    for label, integrator, steps in _TEACHERS:
        nodes = {k: jnp.asarray(grids.karras(process, k)) for k in steps}
        solve = {k: integrator(teacher.bind(), process, grid, noise).x for k, grid in nodes.items()}
        sheets = {k: Sheet(view(x[:n]), np.flatnonzero(~by.found(x)).tolist()) for k, x in solve.items()}
        drawn.append(Drawn(label, "teacher", sheets))
    motions: list[Motion] = []
    if flat:
        grid = jnp.asarray(grids.karras(process, 24))
        states = teacher_path(teacher.bind(), process, grid, noise[:PATHS])
        motions.append(motion("teacher/heun", "teacher", process, grid, states, SCALE))
    for method in _students(rows):
        if (kept := None if keep is None else read_kept(keep, name, method)) is None:
            continue
        sheets = {k: Sheet(view(x), kept.lost.get(k, np.zeros(0)).tolist()) for k, x in kept.samples.items()}
        drawn.append(Drawn(method, "student", sheets))
        if kept.motion is not None and flat:
            motions.append(kept.motion)
    middles = view(np.asarray(mixture.means, np.float32))
    missing = [m for m in _students(rows) if m not in {one.label for one in drawn}]
    words = _kind_words(name, mixture.d)
    if missing:
        words += f" No samples were kept of {', '.join(missing)}."
    images = middles.ndim == 4
    return Shown(drawn, motions, None if images else middles, mixture.K, middles if images else None, words.strip())


def _students(rows: Sequence[Row]) -> list[str]:
    names = {row["method"] for row in rows}
    return [name for name in METHODS if name in names]


def _view(name: str, mixture: Mixture) -> Callable[[Any], np.ndarray]:
    """Samples [N, d] as images or as points in the plane."""
    if name == "digits":
        from sklearn.datasets import load_digits

        # The mixture was fitted to scans that were centred and scaled to a root-mean-square of .5.
        scans = load_digits().data / 16
        middle = scans.mean(0)
        scale = float(np.sqrt(np.mean((scans - middle) ** 2))) / SCALE
        return lambda x: np.clip(np.asarray(x) * scale + middle, 0, 1).reshape(-1, 8, 8, 1)
    if mixture.d == 1:
        across = np.random.default_rng(0).standard_normal
        return lambda x: np.stack([np.asarray(x)[:, 0], 0.3 * across(len(x))], axis=1)
    if mixture.d == 2:
        return lambda x: np.asarray(x)
    examples = np.asarray(mixture.sample(jax.random.key(5), 4096))
    axes = np.linalg.svd(examples - examples.mean(0), full_matrices=False)[2][:2].T
    return lambda x: np.asarray(x) @ axes


def _kind_words(name: str, d: int) -> str:
    if name == "digits" or d == 2:
        return ""
    return "Spread at random across." if d == 1 else f"The two main directions of {d} dimensions."


def save(path: Path, name: str, rows: Sequence[Row], keep: Path | None) -> None:
    """Save the picture of a mixture as PNG. Raises as `shown` does, OSError where `path` cannot be written."""
    parts = shown(name, rows, keep)
    canvas.save(path, _images(name, parts) if parts.middles is not None else _points(name, parts))


def _panels(parts: Shown) -> list[tuple[str, str, Sheet]]:
    """(name, what of it, sheet): the exact samples, the teacher with many and with few calls, students with fewest."""
    panels = []
    for one in parts.drawn:
        k = 4 if one.kind == "teacher" and 4 in one.sheets else min(one.sheets)
        what = f"{k} step{'s' * (k != 1)}" if k else ""
        panels.append((one.label.partition(",")[0], what, one.sheets[k]))
    return panels


def _lost(sheet: Sheet, modes: int) -> str:
    return f"{len(sheet.lost)} of {modes} lost" if len(sheet.lost) else ""


def _points(name: str, parts: Shown):
    centres = parts.centres
    assert centres is not None
    panels, moving = _panels(parts), list(parts.motions)
    truth = np.concatenate([parts.drawn[0].sheets[0].x, centres])
    middle = (truth.max(0) + truth.min(0)) / 2
    half = float((truth.max(0) - truth.min(0)).max()) / 2 * 1.08
    rows, paths = math.ceil(len(panels) / _COLUMNS), math.ceil(len(moving) / _COLUMNS)
    figure = canvas.figure(1.9 * _COLUMNS, 2.2 * (rows + paths) + 0.7)
    blocks = figure.subfigures(2, 1, height_ratios=[rows + 0.2, max(paths, 0.01) + 0.2])
    blocks[0].suptitle(
        f"{name}: samples, modes lost in red", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK
    )
    if moving:
        blocks[1].suptitle(
            "Paths from the noise, each time's positions over their spread", x=0.01, ha="left", fontsize=11, color=INK
        )  # fmt: skip
    for i, (label, what, sheet) in enumerate(panels):
        axes = _square(blocks[0].add_subplot(rows, _COLUMNS, i + 1), middle, half, label, what)
        x = np.asarray(sheet.x, np.float64)
        axes.scatter(x[:, 0], x[:, 1], s=2.5, alpha=0.5, color=COLOURS[0], linewidths=0)
        gone = np.isin(np.arange(len(centres)), sheet.lost)
        axes.scatter(*centres[~gone].T, s=14, marker="+", color=FAINT, linewidths=0.6)
        axes.scatter(*centres[gone].T, s=70, facecolors="none", edgecolors=LOST, linewidths=1.3)
        axes.scatter(*centres[gone].T, s=26, marker="+", color=LOST, linewidths=1.1)
        if lost := _lost(sheet, parts.modes):
            axes.set_xlabel(lost, fontsize=8, color=LOST, labelpad=2)
    for i, one in enumerate(moving):
        steps = len(one.noise) - 1
        what = f"{steps} step{'s' * (steps != 1)}"
        axes = _square(blocks[1].add_subplot(max(paths, 1), _COLUMNS, i + 1), middle, 1.3 * half, one.label, what)
        axes.plot(one.x[:, :40, 0], one.x[:, :40, 1], color=COLOURS[0], linewidth=0.6, alpha=0.55)
        axes.scatter(*one.x[0, :40].T, s=3, color=FAINT, linewidths=0)
        axes.scatter(*one.x[-1, :40].T, s=5, color=COLOURS[1], linewidths=0, zorder=3)
    return figure


def _square(axes, middle: np.ndarray, half: float, label: str, what: str):
    axes.set_xlim(middle[0] - half, middle[0] + half)
    axes.set_ylim(middle[1] - half, middle[1] + half)
    axes.set_aspect("equal")
    axes.set_title(f"{label}\n{what}" if what else label, fontsize=8.5, color=INK, pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")
    return axes


def _images(name: str, parts: Shown):
    """A row for each sampler: what it drew, and the middles of all modes, those that are lost in red."""
    assert parts.middles is not None
    panels, columns = _panels(parts), 12
    across = math.ceil(parts.modes / 2)
    figure = canvas.figure(12, 0.5 * len(panels) + 0.5)
    figure.get_layout_engine().set(h_pad=0.02, hspace=0.0)
    grid = figure.add_gridspec(len(panels), 2, width_ratios=[columns, across / 2 * 1.05])
    for i, (label, what, sheet) in enumerate(panels):
        left, right = (figure.add_subplot(grid[i, k]) for k in (0, 1))
        left.imshow(_tiles(sheet.x[:columns], 1), interpolation="nearest")
        tinted = np.repeat(np.asarray(parts.middles, np.float64), 3, axis=3)
        gone = np.isin(np.arange(parts.modes), sheet.lost)
        tinted[gone] = 0.25 + 0.75 * tinted[gone]
        tinted[gone] *= np.array([0.85, 0.12, 0.2])
        right.imshow(_tiles(tinted, 2), interpolation="nearest")
        left.set_ylabel(
            f"{label}\n{what}" if what else label, rotation=0, ha="right", va="center", fontsize=8.5, color=INK
        )
        right.set_ylabel(_lost(sheet, parts.modes), rotation=0, ha="right", va="center", fontsize=7.5, color=LOST)
        for axes in (left, right):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        if not i:
            left.set_title(f"{name}: samples", loc="left", fontsize=12, fontweight="bold", color=INK)
            right.set_title("middles of the modes, lost in red", loc="left", fontsize=10, color=INK)
    return figure


def _tiles(x: np.ndarray, rows: int) -> np.ndarray:
    """Images [n, H, W, C] in so many rows with white gaps, [.., .., 3]."""
    n, height, width, channels = x.shape
    across = math.ceil(n / rows)
    sheet = np.ones((rows * (height + 1) - 1, across * (width + 1) - 1, 3))
    for i, image in enumerate(np.broadcast_to(x, (n, height, width, 3)) if channels == 1 else x):
        y, left = (i // across) * (height + 1), (i % across) * (width + 1)
        sheet[y : y + height, left : left + width] = image
    return sheet
