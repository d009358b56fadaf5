"""A report as data, and the page of HTML that it becomes: one file, which opens from disk and asks for nothing else.

A page has groups, each of samplers that may be compared: runs on the same data, or methods on one mixture. Names tie
its parts together: a student's lines, samples, motion and curves have the name of its run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Kind = Literal["student", "teacher", "reference"]
"""What a sampler is: a reference is data, or what no sampler can surpass."""


@dataclass(frozen=True)
class Column:
    """A measure: the key of its values, its title, how it is written, and whether more (1) or less (-1) is better."""

    name: str
    title: str
    form: str = ".3g"
    better: int = 0
    words: str = ""


@dataclass(frozen=True)
class Line:
    """One sampler at one cost, with values by column (None or absent: does not apply) and their standard deviations.

    nfe: network calls, None for data. count: how many repetitions `values` are means over.
    """

    label: str
    kind: Kind
    nfe: int | None
    values: Mapping[str, float | None]
    spread: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    count: int = 1


@dataclass(frozen=True)
class Table:
    """Lines under columns; words say how to read them."""

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    words: str = ""


@dataclass(frozen=True)
class Sheet:
    """What a sampler drew from the noise that all samplers of its group share: images [n, H, W, C], C = 1 or 3, in
    [0, 1] or as bytes of `embed.thumbnails`, or points [n, 2]. lost: which of the group's modes it misses.
    """

    x: np.ndarray
    lost: Sequence[int] = ()


@dataclass(frozen=True)
class Drawn:
    """The sheets of a sampler by number of steps."""

    label: str
    kind: Kind
    sheets: Mapping[int, Sheet]


@dataclass(frozen=True)
class Motion:
    """Paths x [K + 1, n, 2] from the noise to the data, and the share of noise in [0, 1] at each of their times.

    x is what is on the way over its spread: √(α² c² + σ²)/c, with c the data's.
    """

    label: str
    kind: Kind
    noise: Sequence[float]
    x: np.ndarray


@dataclass(frozen=True)
class Group:
    """Samplers that may be compared: tables, the first of which has plots; samples; paths in two dimensions.

    centres [K, 2]: the modes of the data, where they are known and the plane shows them; modes: how many there are.
    """

    title: str
    tables: Sequence[Table] = ()
    drawn: Sequence[Drawn] = ()
    motions: Sequence[Motion] = ()
    centres: np.ndarray | None = None
    modes: int = 0
    words: str = ""


@dataclass(frozen=True)
class Run:
    """A run: facts by name, the commands that repeat it, its configuration as of `overrides.describe`, its curves.

    curves: name -> (steps [n], values [n]).
    """

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()
    config: Any = None
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A report. failed: what could not be shown, and why. command: the one that made the page."""

    title: str
    groups: Sequence[Group] = ()
    runs: Sequence[Run] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    words: str = ""
    command: str = ""
    version: str = ""

    @property
    def students(self) -> list[str]:
        """Names of runs and students, each once: what a reader may show and hide."""
        named = [(line.label, line.kind) for g in self.groups for table in g.tables for line in table.lines]
        named += [(drawn.label, drawn.kind) for g in self.groups for drawn in g.drawn]
        named += [(motion.label, motion.kind) for g in self.groups for motion in g.motions]
        names = [label for label, kind in named if kind == "student"]
        return list(dict.fromkeys([*(run.name for run in self.runs), *names]))


def best(table: Table) -> dict[str, float]:
    """The best value of a student in each column that has a better side."""
    found = {}
    for column in table.columns:
        values = [
            value
            for line in table.lines
            if line.kind == "student" and (value := line.values.get(column.name)) is not None and math.isfinite(value)
        ]
        if column.better and values:
            found[column.name] = max(values) if column.better > 0 else min(values)
    return found


def differing(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Fields in which the runs' configurations differ, a row of their values for each run, and the fields in common.

    Parts of different types, such as two methods, are compared as a whole. Names of runs are no difference.
    """
    configs = [run.config for run in runs if run.config is not None]
    paths: list[str] = []
    common: dict[str, str] = {}
    _compare(configs, "", paths, common)
    rows = [[_at(run.config, path) for path in paths] for run in runs]
    return paths, rows, common


def _compare(values: Sequence[Any], path: str, paths: list[str], common: dict[str, str]) -> None:
    if not values or path == "name":
        return
    if all(isinstance(v, dict) for v in values) and len({v.get("type") for v in values}) == 1:
        for name in dict.fromkeys(name for value in values for name in value if name != "type"):
            _compare([value.get(name) for value in values], f"{path}.{name}".lstrip("."), paths, common)
    elif all(v == values[0] for v in values):
        common[path] = written(values[0])
    else:
        paths.append(path)


def _at(config: Any, path: str) -> str:
    for name in path.split("."):
        if not isinstance(config, dict):
            return "–"
        config = config.get(name)
    return written(config)


def written(value: Any) -> str:
    """A described value as it would be written in Python: KD(pairs=40000, teacher_steps=32)."""
    if isinstance(value, dict):
        name = str(value.get("type", "")).rpartition(".")[2]
        inside = ", ".join(f"{k}={written(v)}" for k, v in value.items() if k != "type")
        return f"{name}({inside})" if name else f"{{{inside}}}"
    if isinstance(value, list):
        return f"({', '.join(map(written, value))})"
    if isinstance(value, float):
        return format(value, "g")
    text = "–" if value is None else str(value)
    return text.rpartition(".")[2] if text.startswith("ddistill.") else text  # a function by its own name
