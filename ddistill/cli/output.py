"""What commands print and write, the first of several processes alone."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

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


@contextmanager
def growing(table: Table) -> Iterator[Callable[[Table], None]]:
    """Show a table, and what it is updated to, and leave the last one; through a pipe each new last row is said."""
    console = screen()
    live = Live(table, console=console, refresh_per_second=2, transient=True)

    def update(table: Table) -> None:
        live.update(table)
        if not console.is_terminal and table.row_count:
            say(", ".join(f"{column.header} {list(column.cells)[-1]}" for column in table.columns))

    try:
        with live:
            yield update
    finally:
        console.print(live.get_renderable())


def at_least(least: int, **flags: int | None) -> None:
    """Raise ValueError for the first of the flags that was given a smaller number."""
    for name, number in flags.items():
        if number is not None and number < least:
            raise ValueError(f"--{name.replace('_', '-')} {number}: at least {least} is needed")


def check_folder(flag: str, folder: Path | None, new: bool = False) -> None:
    """Raise OSError for a file in a folder's place, and for a folder that is not there unless it is a new one."""
    if folder is not None and folder.is_file():
        raise NotADirectoryError(f"{flag} {folder} is a file: give a folder")
    if folder is not None and not new and not folder.exists():
        raise FileNotFoundError(f"{flag} {folder} does not exist")


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
