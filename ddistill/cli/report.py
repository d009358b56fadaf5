"""`ddistill report`: runs and rows of benchmarks as one page."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ddistill.checkpoint import CheckpointError
from ddistill.cli import Report
from ddistill.cli.networks import read_prompts
from ddistill.cli.output import check_folder, words_of
from ddistill.cli.report_kept import identity, keep, kept
from ddistill.cli.report_runs import Found, Shown, drawn_of, facts_of, find, groups_of
from ddistill.report.html import write_page
from ddistill.report.measures import is_student, table
from ddistill.report.page import Group, Page, Run
from ddistill.runs import open_run
from ddistill.version import version

Row = dict[str, Any]

_IN_WORDS = (ValueError, OSError, ImportError, CheckpointError)


def report(command: Report) -> None:
    """Write the page."""
    if not command.runs:
        raise ValueError("give at least one folder of a run, a folder of such folders, or a file of rows (.json)")
    if command.samples < 1 or command.limit <= 0 or any(n < 1 for n in command.steps):
        raise ValueError("--samples and --steps must be at least 1, --limit above 0")
    check_folder("--out", command.out, new=True)
    prompts = None if command.prompts is None else read_prompts(command.prompts)
    files = [path for path in command.runs if path.suffix == ".json"]
    found, failed = find([path for path in command.runs if path.suffix != ".json"])
    groups: list[Group] = []
    for path in files:
        try:
            groups += groups_of_rows(path)
        except (OSError, ValueError) as error:
            failed[str(path)] = str(error)
    drawn: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for run in progress.track(found, description="sampling runs"):
            try:
                drawn[run.name] = _shown(run, command, prompts)
            except Exception as error:  # one run that fails, in whatever way, must not cost the others their page
                failed[str(run.folder)] = str(error) if isinstance(error, _IN_WORDS) else repr(error)
    groups = _told_apart([*groups_of(found, drawn), *groups])
    if not groups and not found:
        raise ValueError("nothing to show: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    page = Page(
        command.title or _title(found, groups),
        groups,
        [Run(run.name, facts_of(run), commands(run), run.config, run.curves) for run in found],
        failed,
        _words(found, groups),
        _again(command),
        version(),
    )
    said = write_page(command.out / "index.html", page, samples=command.samples, limit=command.limit)
    for name, why in failed.items():
        print(f"not shown in full: {name}: {why}", file=sys.stderr)
    print(f"Wrote {command.out / 'index.html'}: {said}", file=sys.stderr, flush=True)


def _shown(run: Found, command: Report, prompts: list[str] | None) -> Shown:
    """Samples of a run: those that an earlier report has drawn, or new ones, which are kept for the next."""
    asked = {"steps": command.steps, "samples": command.samples, "seed": command.seed, "prompts": prompts}
    made = identity(run, command.models, **asked)
    shown = kept(run, made)
    if shown is None:
        opened = open_run(run.folder)
        shown = drawn_of(opened, command.steps, command.samples, command.seed, command.models, prompts)
        keep(run, made, shown)
    return shown


def commands(run: Found) -> list[str]:
    """What repeats a run, and what was done with it afterwards."""
    if not (run.folder / "experiment.py").is_file():
        return ["# started from Python: no command repeats it"]
    again = f"{run.folder}-again"
    lines = [shlex.join(["ddistill", "distill", f"{run.folder}/experiment.py", *run.overrides, "--workdir", again])]
    every = [flags for judged in run.judged for flags in judged.flags]
    return lines + [shlex.join(["ddistill", "evaluate", again, *flags]) for flags in every]


def groups_of_rows(path: Path) -> list[Group]:
    """Groups of a file of rows: mixtures of `ddistill bench exact`, or one of what evaluate and compare wrote.

    Raises OSError where it cannot be read, ValueError where it is none of these.
    """
    rows = read_rows(path)
    if all("mixture" in row for row in rows):
        from ddistill.bench.page import groups

        return groups(rows, path)
    if all("sampler" in row for row in rows):
        named = [(str(row["sampler"]) if is_student(row) else None, row) for row in rows]
        return [Group(path.name, [table(named)])]
    raise ValueError("its rows are neither of a benchmark (mixture, method) nor of an evaluation (sampler)")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file {"rows": [...]}. Raises OSError or ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError("does not exist") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    rows = value.get("rows") if isinstance(value, Mapping) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError('has no rows: expected {"rows": [...]} as bench, evaluate and compare write it')
    return rows


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    """The same with titles that differ: "digits", "digits 2"."""
    count: dict[str, int] = {}
    named = []
    for group in groups:
        n = count[group.title] = count.get(group.title, 0) + 1
        named.append(group if n == 1 else dataclasses.replace(group, title=f"{group.title} {n}"))
    return named


def _again(command: Report) -> str:
    """The command line of the command."""
    words = ["ddistill", "report", *map(str, command.runs), *words_of(command, ("runs", "out"))]
    return shlex.join([*words, "--out", str(command.out)])


def _title(found: Sequence[Found], groups: Sequence[Group]) -> str:
    if len(found) == 1:
        return found[0].name
    return "Exact teachers" if not found and all(g.tables and _exact(g) for g in groups) else "Distillation report"


def _exact(group: Group) -> bool:
    return any(column.name == "sw2" for column in group.tables[0].columns)


def _words(found: Sequence[Found], groups: Sequence[Group]) -> str:
    if not found:
        students = {line.label for g in groups for t in g.tables for line in t.lines if line.kind == "student"}
        return f"{_counted(len(students), 'student')} on {', '.join(g.title for g in groups)}."
    teachers = len({run.teacher for run in found})
    return f"{_counted(len(found), 'run')} of {_counted(teachers, 'teacher')}, sampled from the same noise."


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
