"""What commands print and write, the first of several processes alone."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Collection
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


def words_of(command: Any, leave: Collection[str] = ()) -> list[str]:
    """The flags of a command's fields that are not at their defaults, but of those named in `leave`."""
    words: list[str] = []
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name in leave or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, tuple) and isinstance(value[0], str):  # a flag that is repeated
            words += [word for part in value for word in (flag, part)]
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


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
