"""Rows of the benchmark as a page: a table for each mixture, means over seeds with their standard deviation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddistill.bench import pictures
from ddistill.bench.exact import Row
from ddistill.bench.kept import folder_of
from ddistill.methods import METHODS
from ddistill.report.measures import MEASURES
from ddistill.report.page import Column, Group, Kind, Line, Table

_MAIN = ("endpoint", "sw2", "precision", "recall", "spread", "weights", "ll_gap")
_GUIDED = ("endpoint", "sw2", "recall", "diversity")
_INVERSION = ("encoding", "round_trip")
_SCALE = Column("w", "w", "g", words="guidance scale")

_WORDS = (
    "The teacher's answers are known in closed form: students are compared with the truth. "
    "endpoint: root-mean-square distance to where the exact flow takes the same noise, over the data's "
    "root-mean-square; sw2: sliced Wasserstein-2 distance to exact samples, over the same; precision: share of "
    "samples in the region of 99 % of the data, over .99; recall: share of modes that hold a fifth of their weight "
    "or more; spread: width within modes over the true width; weights: Kullback-Leibler divergence of the modes' "
    "weights; ll gap: what the mean log-density lacks. A method has its defaults, the same for all mixtures."
)


@dataclass(frozen=True)
class Summary:
    """The rows of one method at one cost: how many seeds, means, and standard deviations where there are several.

    A measure that does not apply to all of the seeds has no mean.
    """

    method: str
    steps: int
    nfe: int
    w: float | None
    seeds: int
    mean: Mapping[str, float | None]
    spread: Mapping[str, float]


def summaries(rows: Sequence[Row], columns: Sequence[str]) -> list[Summary]:
    """Rows of one mixture over their seeds, the teacher's first, then methods as in their table, by steps."""
    groups: dict[tuple, dict[int, Row]] = {}
    for row in rows:  # each guided method brings the teacher's rows: those of a seed count once
        groups.setdefault((row["method"], row["w"], row["steps"], row["nfe"]), {})[row["seed"]] = row
    order = {name: i for i, name in enumerate(METHODS)}
    first = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}

    def place(who: tuple) -> tuple:
        method, w, steps, nfe = who
        known = order.get(method.partition("/")[0], len(order))
        return (not method.startswith("teacher/"), known, first[method], w or 0.0, nfe, steps)

    made = []
    for who in sorted(groups, key=place):
        method, w, steps, nfe = who
        values: dict[str, list[Any]] = {c: [row.get(c) for row in groups[who].values()] for c in columns}
        whole = {c: np.asarray(v, np.float64) for c, v in values.items() if None not in v}
        mean = {c: float(whole[c].mean()) if c in whole else None for c in columns}
        spread = {c: float(v.std(ddof=1)) for c, v in whole.items() if len(v) > 1 and np.isfinite(v).all()}
        made.append(Summary(method, steps, nfe, w, len(groups[who]), mean, spread))
    return made


def parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], tuple[str, ...]]]:
    """Titles, rows and measures of a mixture's tables: all methods; guidance and inversion where there are such."""
    inverted = [row for row in rows if row.get("encoding") is not None]
    yield "", [row for row in rows if row["w"] is None and row.get("encoding") is None], _MAIN
    if guided := [row for row in rows if row["w"] is not None]:
        yield "Guidance", guided, _GUIDED
    if inverted:
        yield "Inversion", inverted, _INVERSION


def markdown(rows: Sequence[Row], command: str, shown: Mapping[str, str] | None = None) -> str:
    """The rows as Markdown: mean ± standard deviation over seeds, where there are several.

    shown: mixtures and the files of their pictures.
    """
    lines = [
        "# Exact teachers",
        "",
        f"Made by `{command}`. {_WORDS} ± is one standard deviation over seeds.{_devices(rows)}",
    ]
    for mixture in dict.fromkeys(row["mixture"] for row in rows):
        here = [row for row in rows if row["mixture"] == mixture]
        lines += ["", f"## {mixture}", "", f"Two exact samples have an sw2 of {here[0]['floor_sw2']:.4f}."]
        if shown and mixture in shown:
            lines += ["", f"![Samples of each method on {mixture}, modes that are lost in red]({shown[mixture]})"]
        for title, some, columns in parts(here):
            lines += [*(["", f"### {title}"] if title else []), *_markdown_table(some, columns)]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    made = summaries(rows, columns)
    scaled, several = any(s.w is not None for s in made), any(s.seeds > 1 for s in made)
    head = ["method", *["w"] * scaled, "steps", "nfe", *["seeds"] * several, *(c.replace("_", " ") for c in columns)]
    lines = ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for s in made:
        who = [
            s.method,
            *["–" if s.w is None else f"{s.w:g}"] * scaled,
            str(s.steps),
            str(s.nfe),
            *[str(s.seeds)] * several,
        ]
        lines.append("| " + " | ".join([*who, *(_cell(s, c) for c in columns)]) + " |")
    return lines


def _cell(summary: Summary, name: str) -> str:
    mean, form = summary.mean[name], MEASURES[name].form
    if mean is None:
        return "–"
    return f"{mean:{form}} ± {summary.spread[name]:{form}}" if name in summary.spread else f"{mean:{form}}"


def _devices(rows: Sequence[Row]) -> str:
    """On what the rows were measured, as far as they tell."""
    told = [str(row["device"]) for row in rows if row.get("device")]
    counts = ", ".join(f"{told.count(name)} rows on {name}" for name in dict.fromkeys(told))
    return f" Measured: {counts}{', others do not tell' if len(told) < len(rows) else ''}." if told else ""


def write_page(
    path: Path, rows: Sequence[Row], command: str, keep: Path | None = None, say: Callable[[str], None] = print
) -> None:
    """Write the Markdown page and beside it a picture for each mixture that can be read: exact.md, exact-ring8.png.

    keep: the folder of the students' samples (`bench.kept`); without it a picture shows the teacher alone. Raises
    OSError where the files cannot be written.
    """
    shown = {}
    for mixture in dict.fromkeys(row["mixture"] for row in rows):
        picture = path.with_name(f"{path.stem}-{Path(mixture).stem}.png")
        try:
            pictures.save(picture, mixture, [r for r in rows if r["mixture"] == mixture], keep)
        except (FileNotFoundError, ValueError) as error:  # a mixture from a file that is elsewhere now
            say(f"No picture of {mixture}: {error}")
            continue
        shown[mixture] = picture.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(rows, command, shown), encoding="utf-8")


def groups(rows: Sequence[Row], path: Path) -> list[Group]:
    """Mixtures as groups of a report, with the samples that were kept beside the rows' file."""
    made = []
    for mixture in dict.fromkeys(row["mixture"] for row in rows):
        here = [row for row in rows if row["mixture"] == mixture]
        tables = [_table(title, some, columns, here[0]["floor_sw2"]) for title, some, columns in parts(here)]
        words = ""
        try:
            shown = pictures.shown(mixture, here, folder_of(path))
        except (FileNotFoundError, ValueError) as error:
            shown, words = pictures.Shown(), f"No samples: {error}"
        made.append(Group(
            Path(mixture).stem, tables, shown.drawn, shown.motions, shown.centres, shown.modes, words or shown.words
        ))  # fmt: skip
    return made


def _table(title: str, rows: Sequence[Row], names: Sequence[str], floor: float) -> Table:
    made = summaries(rows, names)
    scaled = any(s.w is not None for s in made)
    columns = [*[_SCALE] * scaled, *(MEASURES[name] for name in names)]
    lines = [Line("two exact samples", "reference", None, {"sw2": floor})] if not title else []
    for s in made:
        kind: Kind = "teacher" if s.method.startswith("teacher/") else "student"
        nfe = None if s.method == "teacher/exact-map" else s.nfe
        values, label = {**s.mean, "w": s.w}, s.method.removesuffix("/inversion")
        lines.append(Line(label, kind, nfe, values, s.spread, s.steps if nfe is not None else None, s.seeds))
    return Table(title, columns, lines, _WORDS if not title else "")
