"""Rows of a table that are kept as they are made, so that a command that was cut off goes on after the last."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from ddistill import storage
from ddistill.cli.output import finite, write_json, write_text
from ddistill.overrides import differences

Row = dict[str, Any]

FILE = "rows.jsonl"


def fingerprint(run: Path) -> str:
    """A digest of what a run's folder records and has saved: another after it was trained anew."""
    total = hashlib.sha256()
    for path in (run / "experiment.json", *sorted(run.glob("checkpoints/*/*/checksums.*.json"))):
        total.update(path.relative_to(run).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def stamp(path: Path) -> str:
    """A digest of the names, sizes and times of a file, or of all in a folder: another after one was replaced."""
    files = storage.files(path) if path.is_dir() else {path.name: path}
    stats = {name: file.stat() for name, file in files.items()}
    told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def kept_rows(folder: Path, made: Mapping[str, Any]) -> list[Row]:
    """The rows that an earlier call left in a folder; none in a new one, which becomes that of `made`.

    made: JSON that tells what the rows are of. Raises ValueError where the folder holds rows of something else.
    """
    path = folder / FILE
    wanted = json.loads(json.dumps(dict(made)))
    if not path.is_file():
        if jax.process_index() == 0:
            write_text(path, json.dumps({"made": wanted}) + "\n")
        return []
    lines = [_parsed(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = lines[0] if lines and lines[0] is not None else {}
    if "made" not in first:
        raise ValueError(f"{path} is not a file that this command wrote; give another folder, --out FOLDER")
    if told := differences(first["made"], wanted):
        raise ValueError(
            f"{folder} holds another evaluation: {'; '.join(told[:6])}. Give a new folder, --out FOLDER, or "
            "remove this one"
        )
    return [line for line in lines[1:] if line is not None]


def keep_row(folder: Path, row: Row) -> None:
    """Add a row, on the disk before this returns; of several processes the first does."""
    if jax.process_index() != 0:
        return
    path = folder / FILE
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut = end > 0 and file.read(1) != b"\n"  # the last row was cut off
        file.seek(0, os.SEEK_END)
        file.write(b"\n" * cut + (json.dumps(finite(row)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def write_table(folder: Path, value: Mapping[str, Any]) -> None:
    """Write "rows" of a value, with all else of it, as table.json, and the rows as table.csv."""
    write_copies(folder / "table.json", folder / "table.csv", value)


def write_copies(json_file: Path | None, csv_file: Path | None, value: Mapping[str, Any]) -> None:
    """Write the same to the files that are named, as JSON with the date; of several processes the first does."""
    if jax.process_index() != 0:
        return
    if json_file is not None:
        write_json(json_file, {"date": datetime.now(UTC).isoformat(timespec="microseconds"), **value})
    if csv_file is not None:
        write_csv(csv_file, value["rows"])


def steps_in(rows: Sequence[Row]) -> tuple[int, ...]:
    """The steps of the student's rows: those that --steps must name to make all of them again."""
    return tuple(sorted({row["steps"] for row in rows if row["sampler"] == "student"}))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, a column for each key of any of them; lists are joined by "; "."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {k: "; ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in finite(row).items()}
        writer.writerow(flat)
    write_text(path, text.getvalue())


def _parsed(line: str) -> Row | None:
    """A line's row, or None where it was cut off."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
