"""`ddistill evaluate` on digits, by their pixels; with networks' features `ddistill.cli.study` does it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ddistill import sharding
from ddistill.cli import Evaluate
from ddistill.cli.output import at_least, cell, check_folder, growing, words_of
from ddistill.cli.rows import fingerprint, keep_row, kept_rows, steps_in, write_copies, write_table
from ddistill.config import DigitsData
from ddistill.data.digits import Digits, load_digits
from ddistill.data.pairs import gathered
from ddistill.evaluate import digits as judged
from ddistill.evaluate.samplers import Sampler, across, samplers, student_sampler
from ddistill.runs import Opened, open_run

Row = dict[str, Any]

UNJUDGED = ("run", "out", "json", "csv", "peers")
"""Fields of the command that do not change what is judged."""

USUAL = (1, 2, 4, 8)
"""Steps where none are asked for, of those that the student serves."""


def evaluate(command: Evaluate) -> None:
    """Judge a run: by the features of networks where there are any, otherwise by pixels, which digits allow."""
    at_least(1, batch_size=command.batch_size, teacher_steps=command.teacher_steps, steps=min(command.steps or [1]))
    at_least(2 if command.features else 20, samples=command.samples)  # two of each digit
    at_least(0, seed=command.seed)
    check_folder("--models", command.models)
    check_folder("--out", command.out, new=True)
    opened = open_run(command.run)
    if command.features:
        if command.likelihood:
            raise ValueError("--likelihood is of digits, by their pixels: leave --features out for it")
        from ddistill.cli.study import study

        study(command, opened)
        return
    digits = digits_of(opened)
    for flag in ("metrics", "reference", "models", "resize", "prompts"):
        if getattr(command, flag) is not None:
            raise ValueError(f"--{flag} is of metrics by networks: give --features NETWORK=FILE as well")
    plan = samplers_of(opened, steps_of(opened, command.steps))
    judge_digits(
        digits, opened, plan, command.run, json=command.json, csv=command.csv, likelihood=command.likelihood,
        count=command.samples, seed=command.seed, out=command.out, flags=lambda rows: flags_of(command, rows),
    )  # fmt: skip


def flags_of(command: Evaluate, rows: Sequence[Row]) -> list[str]:
    """The flags that make all these rows, of which earlier calls may have made some with other --steps."""
    steps = steps_in(rows)
    return words_of(dataclasses.replace(command, steps=steps) if steps else command, UNJUDGED)


def samplers_of(opened: Opened, steps: Sequence[int]) -> list[Sampler]:
    """The rows of the table of digits."""
    experiment = opened.experiment
    made = experiment.method(experiment.process)
    mesh = sharding.make_mesh(experiment.fsdp, experiment.tensor)
    rows = samplers(*opened.guided_teacher(), opened.student, made, experiment.process, steps)
    return [across(row, mesh) for row in rows]


def steps_of(opened: Opened, asked: Sequence[int] | None) -> list[int]:
    """The steps asked for, or those usual ones that the student serves. Raises ValueError where there are none."""
    if asked:
        return sorted(set(asked))
    experiment = opened.experiment
    made = experiment.method(experiment.process)
    served = []
    for n in USUAL:
        try:
            student_sampler(opened.student, made, experiment.process, n)
        except ValueError:
            continue
        served.append(n)
    if not served:
        raise ValueError(f"the student serves none of {', '.join(map(str, USUAL))} steps: say which, --steps 16")
    return served


def digits_of(opened: Opened) -> Digits:
    """The scans of a run on digits. Raises ValueError for runs on other data."""
    data = opened.experiment.data
    if not isinstance(data, DigitsData):
        raise ValueError(
            f"only runs on digits can be judged by pixels, and this one is on {type(data).__name__}: give "
            "--features NETWORK=FILE to judge it by a network's features, or sample it into an .npz file"
        )
    return load_digits(data.seed)


def by_pixels(run: Path, count: int | None = None, seed: int = 0) -> dict[str, Any]:
    """What tables of a run's digits are of; count: samples of each sampler, by default as many as usual."""
    samples = judged.COUNT if count is None else count
    return {"run": fingerprint(run), "of": "digits, by pixels", "samples": samples, "seed": seed}


_TABLE = {
    "sampler": ("sampler", None),
    "nfe": ("NFE", "d"),
    "accuracy": ("accuracy", ".3f"),
    "frechet": ("Fréchet", ".2f"),
    "frechet_held_out": ("to held-out", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "density": ("density", ".2f"),
    "coverage": ("coverage", ".3f"),
    "diversity": ("diversity", ".3f"),
    "nll": ("bits/pixel", ".3f"),
    "ms_per_image": ("ms/image", ".3f"),
}


def judge_digits(
    digits: Digits,
    opened: Opened,
    plan: Sequence[Sampler],
    run: Path,
    *,
    json: Path | None = None,
    csv: Path | None = None,
    likelihood: bool = False,
    count: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    flags: Callable[[Sequence[Row]], Sequence[str]] = lambda rows: (),
) -> None:
    """Print the table, and write it to json and csv.

    out: a folder for the rows of `run`, in which they are kept. flags: those that make rows, which are
    written beside them.
    """
    shown = {name: column for name, column in _TABLE.items() if likelihood or name != "nll"}
    caption = (
        "from the same noise and labels; Fréchet, precision, recall, density, coverage against the training scans; "
        "Fréchet to held-out; diversity within each digit over the scans'"
    )
    if likelihood:
        caption += "; bits/pixel under the teacher, to be read beside those of its own samples and the held-out scans"
    table = Table(
        *(title for title, _ in shown.values()), caption=caption, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )  # narrow: twelve columns on one screen
    rows: list[Row] = []
    made = by_pixels(run, count, seed)
    options: dict[str, Any] = {
        "count": made["samples"], "seed": seed, "likelihood": gathered(opened.teacher) if likelihood else None,
    }  # fmt: skip
    if out is not None:
        rows = kept_rows(out, {**made, "likelihood": likelihood})
        options["have"] = {(row["sampler"], row["steps"]) for row in rows}

    def show(row: Row) -> None:
        table.add_row(*(cell(row[name], form) for name, (_, form) in shown.items()))

    with growing(table) as update:
        for row in rows:
            show(row)
        for row in judged.evaluate(digits, opened.experiment.process, plan, **options):
            rows.append(row)
            show(row)
            update(table)
            if out is not None:
                keep_row(out, row)
    value = {"made": made, "flags": list(flags(rows)), "rows": rows}
    if out is not None:
        write_table(out, value)
    write_copies(json, csv, value)
