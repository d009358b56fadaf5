"""What a run tells: a progress bar, metrics as JSON lines, TensorBoard events."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

from ddistill.goodput import of_starts, read_starts

if TYPE_CHECKING:
    from rich.progress import Progress
    from tensorboardX import SummaryWriter


class Log(Protocol):
    """Told of each stage, of metrics as they become known, and of the end."""

    def start(self, stage: str, first: int, steps: int) -> None:
        """Begin a stage at step `first` of `steps`."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Metrics of one step: numbers or scalar arrays."""

    def progress(self, step: int) -> None:
        """`step` steps are done."""

    def spent(self, step: int, spent: Mapping[str, float]) -> None:
        """Where the time since the stage was started has gone up to now (`goodput.Clock.spent`)."""

    def stop(self) -> None:
        """End the stage."""

    def note(self, text: str) -> None:
        """Words for who reads the log."""


class Silent:
    """A log that keeps metrics in `rows`, words in `notes` and what was spent last in `clock`, and shows nothing."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.clock: Mapping[str, float] = {}
        self._stage = ""

    def start(self, stage: str, first: int, steps: int) -> None:
        """Begin a stage."""
        self._stage = stage

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep the metrics."""
        self.rows.append({"stage": self._stage, "step": step, **_numbers(values)})

    def progress(self, step: int) -> None:
        """Nothing."""

    def spent(self, step: int, spent: Mapping[str, float]) -> None:
        """Keep it."""
        self.clock = spent

    def stop(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Keep the words."""
        self.notes.append(text)


class RunLog:
    """A log in a folder, metrics.jsonl, events/ and where there is something to say notes.txt, and on the terminal.

    On a terminal a progress bar with loss, steps per second and time left; otherwise a plain line now and then; and at
    the end of a stage a line that says where its time went. Only the first process of several writes. Use as a context
    manager.
    """

    _bar: "Progress | None" = None
    _events: "SummaryWriter | None" = None
    _spent: tuple[int, Mapping[str, float]] | None = None

    def __init__(self, directory: Path | str):
        self._writes = jax.process_index() == 0
        self._stage, self._loss, self._kept = "", math.nan, -math.inf
        if self._writes:
            from tensorboardX import SummaryWriter

            directory = Path(directory)
            self._notes = directory / "notes.txt"
            metrics = directory / "metrics.jsonl"
            torn = metrics.is_file() and not metrics.read_bytes().endswith(b"\n")  # killed in the middle of a row
            self._starts = read_starts(metrics)
            self._file = metrics.open("a", encoding="utf-8")
            self._file.write("\n" * torn)
            self._events = SummaryWriter(str(directory / "events"))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        if self._events is not None:
            self._file.close()
            self._events.close()

    def start(self, stage: str, first: int, steps: int) -> None:
        """Begin a stage at step `first` of `steps`."""
        self._stage, self._first, self._steps = stage, first, steps
        self._loss = math.nan  # the last one known was another stage's
        self._begin = self._told = time.monotonic()
        if self._writes and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4g} · {task.fields[rate]:.0f} steps/s ·"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = bar.add_task(stage, total=steps, completed=first, loss=math.nan, rate=0.0)
            bar.start()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the metrics of one step."""
        numbers = _numbers(values)
        self._loss = next((v for k, v in numbers.items() if k.endswith("loss")), math.nan)
        if self._events is not None:
            self._file.write(json.dumps({"stage": self._stage, "step": step, **numbers}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._events.add_scalar(f"{self._stage}/{name}", value, step)

    def progress(self, step: int) -> None:
        """`step` steps are done."""
        now = time.monotonic()
        rate = (step - self._first) / max(now - self._begin, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=self._loss, rate=rate)
        elif self._writes and (now - self._told > 15 or step == self._steps):
            self._told = now
            left = (self._steps - step) / max(rate, 1e-9)
            loss = "" if math.isnan(self._loss) else f"  loss {self._loss:.4g}"  # not read yet
            line = f"{self._stage} {step}/{self._steps}{loss}  {rate:.0f} steps/s  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def spent(self, step: int, spent: Mapping[str, float]) -> None:
        """Keep it, and write it once a minute, so that a run that is killed can be told of as well."""
        self._spent = step, spent
        if time.monotonic() - self._kept > 60:
            self._write_spent()

    def _write_spent(self) -> None:
        if self._events is None or self._spent is None:
            return
        (step, spent), self._kept = self._spent, time.monotonic()
        self._file.write(json.dumps({"stage": self._stage, "step": step, "spent": dict(spent)}) + "\n")
        self._file.flush()

    def stop(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._events is not None and self._spent is not None:
            self._write_spent()
            starts = self._starts.setdefault(self._stage, [])
            starts.append(self._spent)
            done = of_starts(starts)
            self._events.add_scalar(f"{self._stage}/goodput", done.share, self._spent[0])
            print(f"{self._stage}: {done.words()}", file=sys.stderr, flush=True)
        self._spent, self._kept = None, -math.inf

    def note(self, text: str) -> None:
        """Print the words, in every process, and keep them."""
        print(text, file=sys.stderr, flush=True)
        if self._writes:
            with self._notes.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
