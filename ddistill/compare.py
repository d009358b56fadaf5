"""Several experiments on digits that distil one teacher, in one table."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ddistill.config import DigitsData, Experiment, Imported, resolved
from ddistill.data.digits import load_digits
from ddistill.evaluate.digits import evaluate
from ddistill.evaluate.samplers import Sampler, student_sampler, teacher_sampler
from ddistill.goodput import of_starts, read_starts
from ddistill.integrators import dpmpp_2m, heun
from ddistill.methods.base import rounds
from ddistill.net import Net
from ddistill.overrides import describe
from ddistill.report import Point
from ddistill.runs import distil, teacher_differences
from ddistill.signals import Stop

Row = dict[str, Any]


def compare(
    experiments: Sequence[Experiment],
    steps: Sequence[int] = (1, 2, 4),
    *,
    workdir: Path,
    files: Sequence[Path | None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Stop | None = None,
) -> Iterator[Row]:
    """Distil one teacher with every experiment, in runs below `workdir`, and judge all; rows come at the end.

    Rows are those of `evaluate`, with `train_s`, the wall time of a student's training, over all its starts. A student
    is judged at those of `steps` that it serves. The first run trains the teacher, and the others take it from there;
    every run goes on where an earlier call stopped. files: those that the experiments are from, with which the runs can
    be opened. Raises ValueError where the experiments are not on digits or differ in what makes their teacher, or share
    a name, and Stopped where `stop` asks for it, with the training saved.
    """
    experiments = [resolved(e) for e in experiments]
    first = experiments[0]
    if not isinstance(first.data, DigitsData):
        raise ValueError(f"experiments on digits can be compared; {first.name} is on {type(first.data).__name__}")
    names = [e.name for e in experiments]
    if len(set(names)) < len(names):
        raise ValueError(f"experiments must have different names; given {', '.join(names)}")
    for e in experiments[1:]:
        if lines := teacher_differences(describe(first), describe(e)):
            raise ValueError(f"{e.name} has another teacher than {first.name}: {'; '.join(lines[:4])}")
    trained = None if isinstance(first.network, Imported) else workdir / first.name
    results = {}
    for e, file in zip(experiments, files or [None] * len(experiments), strict=True):
        say(f"distilling {e.name}")
        results[e.name] = distil(
            e, workdir / e.name, source=file, teacher_from=None if e is first else trained, stop=stop
        )  # fmt: skip
    teacher, process = results[first.name].teacher, first.process
    plan = [teacher_sampler(teacher, process, heun, 18, "teacher, Heun")]
    plan += [teacher_sampler(teacher, process, dpmpp_2m, n, "teacher, DPM-Solver++(2M)") for n in (8, *steps)]
    for e in experiments:
        plan += _students(e, results[e.name].student, steps)
    wall = {name: _training(workdir / name) for name in names}
    for row in evaluate(load_digits(first.data.seed), process, plan):
        yield {**row, "train_s": wall.get(row["sampler"])}


def _training(run: Path) -> float:
    """Seconds that a run's student took, over all its starts."""
    stages = read_starts(run / "metrics.jsonl")
    return sum(sum(of_starts(starts).seconds.values()) for name, starts in stages.items() if name != "teacher")


def _students(experiment: Experiment, student: Net, steps: Sequence[int]) -> list[Sampler]:
    made = experiment.method(experiment.process)
    samplers = []
    for n in steps:
        try:
            sampler = student_sampler(student, made, experiment.process, n)
        except ValueError:  # a number of steps that the method does not serve
            continue
        samplers.append(dataclasses.replace(sampler, name=experiment.name))
    return samplers


def front(rows: Sequence[Row]) -> tuple[dict[str, list[Point]], dict[str, Point]]:
    """Precision and recall as a picture's lines, of the students over their steps, and what to read them against.

    That is the teacher with most network calls and the held-out scans: with few calls it would set the scale.
    """

    def point(row: Row) -> Point:
        return Point(row["precision"], row["recall"], "" if row["nfe"] is None else str(row["nfe"]))

    students = [row for row in rows if row["train_s"] is not None]
    others = [row for row in rows if row["train_s"] is None]
    lines: dict[str, list[Point]] = {}
    for row in students:
        lines.setdefault(row["sampler"], []).append(point(row))
    marks = [row for row in others if row["nfe"] is None]
    marks += sorted((row for row in others if row["nfe"] is not None), key=lambda row: -row["nfe"])[:1]
    return lines, {row["sampler"]: point(row) for row in marks}


_COLUMNS = (
    ("accuracy", "accuracy", ".3f"), ("Fréchet", "frechet", ".2f"), ("to held-out", "frechet_held_out", ".2f"),
    ("precision", "precision", ".3f"), ("recall", "recall", ".3f"), ("density", "density", ".2f"),
    ("coverage", "coverage", ".3f"), ("diversity", "diversity", ".3f"), ("training", "train_s", ".0f"),
)  # fmt: skip


def markdown(rows: Sequence[Row], experiments: Sequence[Experiment], command: str, picture: str | None = None) -> str:
    """The table as a page, with the command that made it; picture: the file beside it that shows `front`."""
    shown = [] if picture is None else [f"![Precision and recall over steps, a line for each method]({picture})", ""]
    head = ("sampler", "network calls", *(title for title, _, _ in _COLUMNS))
    lines = [
        "# Digits: students of one teacher",
        "",
        f"Made by `{command}` on {jax.device_count()} {jax.devices()[0].platform.upper()} device(s). Class-conditional "
        f"MLP teacher, seed {experiments[0].seed}; columns as in the README: Fréchet distance, precision, recall, "
        "density and coverage against the training scans, and the Fréchet distance to the held-out scans; diversity: "
        "mean distance between samples of one digit, over the training scans'; training: wall seconds.",
        "",
        *shown,
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        cells = [row["sampler"], "–" if row["nfe"] is None else str(row["nfe"])]
        cells += [_cell(row[name], form) for _, name, form in _COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| experiment | method | rounds | steps |", "|---|---|---|---|"]
    for e in experiments:
        parts = rounds(e.method(e.process))
        names = ", ".join(part.name for part in parts) if len(parts) > 1 else "one"
        lines.append(f"| {e.name} | {type(e.method).__name__} | {names} | {e.steps} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)
