"""Evaluations in the folders of runs: which of them can stand in one table, and what tells the others apart."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddistill.cli.rows import fingerprint
from ddistill.report.measures import is_student

_SHARED = ("run", "metrics", "batch_size")
"""What rows of one table may differ in: each has the name of its run, and every metric a column."""

_NONE = {"reference": "the run's data", "prompts": "of the data", "models": "the run's own"}


@dataclass(frozen=True)
class Judged:
    """Rows whose numbers can be compared, and the flags of the commands that made them.

    made: JSON that tells how they were judged, of runs that may be others: networks, reference, samples, seed and the
    like; "of" says it in words, in "" where nothing is known.
    """

    made: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    flags: Sequence[Sequence[str]] = ()

    @property
    def key(self) -> str:
        """The same for what was judged in the same way."""
        return digest(self.made)


def digest(value: Any) -> str:
    """A digest of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def evaluations(folder: Path) -> tuple[list[Judged], str]:
    """What all files of evaluations in the folder say, and words on those of an earlier training.

    Of the same sampler, cost and way of judging the file that was written last counts, metric by metric; files of which
    that is unknown stand before all others, by name.
    """
    ways: dict[str, Mapping[str, Any]] = {}
    rows: dict[str, dict[tuple, Mapping[str, Any]]] = {}
    flags: dict[str, dict[tuple[str, ...], None]] = {}
    old = []
    now = fingerprint(folder)
    for path, value in _files(folder):
        made = value.get("made")
        made = made if isinstance(made, dict) else {}
        if made.get("run", now) != now:
            old.append(str(path))
            continue
        own = {name: part for name, part in made.items() if name not in _SHARED}
        way = {"of": "by networks' features" if made else "", **own}
        key = digest(way)
        ways[key] = way
        there = rows.setdefault(key, {})
        for row in value["rows"]:
            place = "student" if is_student(row) else row["sampler"], row.get("nfe")
            there[place] = _joined(there.get(place, {}), row)
        flags.setdefault(key, {})[tuple(map(str, value.get("flags", ())))] = None
    words = f"Of an earlier training, and left out: {', '.join(old)}." if old else ""
    return [Judged(way, list(rows[k].values()), [list(f) for f in flags[k]]) for k, way in ways.items()], words


def _files(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Files with rows of samplers, the last written last: by the date in them, which copies of a folder keep."""
    found = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("evaluation/*.json")]):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        here = value.get("rows") if isinstance(value, dict) else None
        rows = [row for row in here if isinstance(row, dict) and "sampler" in row] if isinstance(here, list) else []
        if rows:
            found.append((path, {**value, "rows": rows}))
    return sorted(found, key=lambda one: str(one[1].get("date", "")))


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the metrics of both, and of one that both have the new."""
    joined = {**old, **{name: value for name, value in new.items() if value is not None or name not in old}}
    if "notes" in old and "notes" in new:
        joined["notes"] = list(dict.fromkeys([*(old["notes"] or ()), *(new["notes"] or ())]))
    return joined


def titles(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """A title for each way of judging, of those beside it: what it is of, and in what it differs from others of that.

    One alone needs none.
    """
    if len(ways) == 1:
        return [""]
    found = []
    for way in ways:
        alike = [other for other in ways if other["of"] == way["of"]]
        names = [name for name in way if any(other.get(name) != way[name] or name not in other for other in alike)]
        told = "; ".join(f"{name.replace('_', ' ')} {_said(way[name], name)}" for name in names)
        found.append(": ".join(filter(None, (str(way["of"]), told))))
    return found


def _said(value: Any, name: str = "") -> str:
    """JSON in a few words; of digests the beginning."""
    if isinstance(value, dict | list):
        return ", ".join(map(_said, value.values() if isinstance(value, dict) else value))
    if value is None:
        return _NONE.get(name, "none")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value[:8] if isinstance(value, str) and re.fullmatch("[0-9a-f]{16,}", value) else str(value)
