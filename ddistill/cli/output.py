"""What commands print and write, the first of several processes alone."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ddistill.hosts import first


def cell(value: Any, form: str | None) -> str:
    """A value in a table, a dash for None."""
    if value is None:
        return "–"
    return str(value) if form is None else format(value, form)


def screen() -> Console:
    """Where tables go."""
    # Through a pipe there is no width to ask for, and a table cut at 80 columns is of no use.
    return Console(width=None if sys.stdout.isatty() else 180, quiet=not first())


def say(text: str) -> None:
    """A line about what happens, beside what is asked for; the first of several processes says it."""
    if first():
        print(text, file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file, whole or not at all."""
    write_text(path, json.dumps(finite(value), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    if not first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
