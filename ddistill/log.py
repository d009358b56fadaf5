"""What a run tells: a progress bar, metrics as JSON lines, TensorBoard events, pictures, Weights & Biases."""

import json
import math
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from ddistill.goodput import of_starts, read_starts

if TYPE_CHECKING:
    from rich.live import Live
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

    def preview(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """What the network draws after a step: numbers, and pictures [height, width, 1 or 3] of bytes by name."""

    def stop(self) -> None:
        """End the stage."""

    def note(self, text: str) -> None:
        """Words for who reads the log."""

    def waits(self, text: str) -> None:
        """What is done while no steps are; said often, it may be told now and then."""


class Silent:
    """A log that keeps metrics in `rows`, words in `notes`, what was spent last in `clock`, and what it is shown.

    previews: (stage, step, numbers, pictures).
    """

    def __init__(self):
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.clock: Mapping[str, float] = {}
        self.previews: list[tuple[str, int, Mapping[str, float], Mapping[str, np.ndarray]]] = []
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

    def preview(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Keep it."""
        self.previews.append((self._stage, step, values, pictures))

    def stop(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Keep the words."""
        self.notes.append(text)

    def waits(self, text: str) -> None:
        """Nothing."""


class RunLog:
    """A log in a folder, metrics.jsonl, events/, previews/, log.txt and where needed notes.txt, and on the terminal.

    On a terminal a progress bar with steps per second and time left, and below it the losses, the share of time that
    went into steps, and the last preview; otherwise a plain line now and then, which log.txt has in any case; and at
    the end of a stage a line that says where its time went. wandb: a project of Weights & Biases that is told the same,
    in a run of the given name, which a later start goes on with. Only the first process of several writes. Use as a
    context manager. Raises ImportError where wandb is asked for and not installed.
    """

    _bar: "Progress | None" = None
    _live: "Live | None" = None
    _board: "Board | None" = None
    _events: "SummaryWriter | None" = None
    _spent: tuple[int, Mapping[str, float]] | None = None

    def __init__(self, directory: Path | str, *, wandb: str = "", name: str = ""):
        self._writes = jax.process_index() == 0
        self._stage = ""
        self._losses: dict[str, float] = {}
        self._seen = ""
        self._waited = -math.inf
        if self._writes:
            from tensorboardX import SummaryWriter

            self._directory = directory = Path(directory)
            self._board = Board(directory, wandb, name) if wandb else None
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
        if self._board is not None:
            self._board.close()

    def start(self, stage: str, first: int, steps: int) -> None:
        """Begin a stage at step `first` of `steps`."""
        self._stage, self._first, self._steps = stage, first, steps
        self._losses = {}  # the last ones known were another stage's
        self._begin = self._told = self._kept = time.monotonic()
        if self._writes and sys.stderr.isatty():
            from rich.console import Console, Group
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.text import Text

            self._bar = bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.4g} steps/s ·"),
                TimeRemainingColumn(),
            )
            self._task = bar.add_task(stage, total=steps, completed=first, rate=0.0)
            self._below = Text()
            self._live = Live(Group(bar, self._below), console=Console(stderr=True), refresh_per_second=4)
            self._live.start()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the metrics of one step."""
        numbers = _numbers(values)
        self._losses = {k: v for k, v in numbers.items() if k.endswith("loss")} or self._losses
        if self._events is not None:
            self._file.write(json.dumps({"stage": self._stage, "step": step, **numbers}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._events.add_scalar(f"{self._stage}/{name}", value, step)
        if self._board is not None:
            self._board.tell(self._stage, step, numbers)

    def progress(self, step: int) -> None:
        """`step` steps are done."""
        now = time.monotonic()
        rate = (step - self._first) / max(now - self._begin, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=rate)
            self._below.plain = " · ".join(part for part in (self._words(), self._seen) if part)
        if self._writes and (now - self._told > 15 or step == self._steps):
            self._told = now
            left = (self._steps - step) / max(rate, 1e-9)
            loss = next(iter(self._losses.values()), math.nan)
            told = "" if math.isnan(loss) else f"  loss {loss:.4g}"  # not read yet
            self._line(f"{self._stage} {step}/{self._steps}{told}  {rate:.3g} steps/s  {left:.0f} s left")

    def _words(self) -> str:
        """The losses, and the goodput of all starts up to now."""
        words = [f"{name} {value:.4g}" for name, value in self._losses.items()]
        if self._writes and self._spent is not None:
            share = of_starts([*self._starts.get(self._stage, []), self._spent]).share
            words.append(f"goodput {share:.0%}")
        return " · ".join(words)

    def _line(self, text: str) -> None:
        """A plain line into log.txt, and on what is no terminal."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        with (self._directory / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def preview(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures into previews/STAGE/, numbers into previews/numbers.jsonl, and both into the events."""
        if self._events is None:
            return
        from PIL import Image

        folder = self._directory / "previews"
        (folder / self._stage).mkdir(parents=True, exist_ok=True)
        with (folder / "numbers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{self._stage}/preview/{name}", value, step)
        for name, pixels in pictures.items():
            path = folder / self._stage / f"{step:08d}-{name}.png"
            Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)
            self._events.add_image(f"{self._stage}/{name}", pixels, step, dataformats="HWC")
            self._seen = str(path)
        if self._board is not None:
            self._board.tell(self._stage, step, {f"preview/{name}": value for name, value in values.items()}, pictures)
        numbers = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self._line(f"{self._stage} {step}/{self._steps}  {numbers}  {self._seen}")

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
        if self._live is not None:
            self._live.stop()
            self._live = self._bar = None
        if self._events is not None and self._spent is not None:
            self._write_spent()
            starts = self._starts.setdefault(self._stage, [])
            starts.append(self._spent)
            done = of_starts(starts)
            self._events.add_scalar(f"{self._stage}/goodput", done.share, self._spent[0])
            self._line(f"{self._stage}: {done.words()}")
            if self._board is not None:
                self._board.tell(self._stage, self._spent[0], {"goodput": done.share})
        self._spent = None

    def waits(self, text: str) -> None:
        """A plain line, at most every five seconds."""
        if self._writes and time.monotonic() - self._waited > 5:
            self._waited = time.monotonic()
            self._line(text)

    def note(self, text: str) -> None:
        """Print the words, in every process, and keep them."""
        print(text, file=sys.stderr, flush=True)
        if self._writes:
            with self._notes.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


class Board:
    """A run of a project of Weights & Biases, as WANDB_MODE says: online, or offline and synchronised later."""

    def __init__(self, directory: Path, project: str, name: str):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "wandb is not installed: pip install 'ddistill[wandb]', or leave the experiment's wandb empty"
            ) from error
        kept = directory / "wandb.txt"  # the run's id: a later start goes on in it
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._wandb = wandb
        self._run = wandb.init(
            project=project, name=name or None, dir=str(directory), id=kept.read_text("utf-8").strip(), resume="allow"
        )
        self._stages: set[str] = set()

    def tell(
        self, stage: str, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Numbers, and pictures, of a stage's step."""
        if stage not in self._stages:  # each stage counts its own steps
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        shown = {f"{stage}/{name}": self._wandb.Image(pixels) for name, pixels in (pictures or {}).items()}
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": v for name, v in values.items()}, **shown})

    def close(self) -> None:
        """End it."""
        self._run.finish()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
