"""Trainings that diverge: how it is noticed, and what is done about it."""

import json
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import optax

from ddistill import storage


class DivergedError(FloatingPointError):
    """Training whose updates have not been finite for many steps on end, or whose loss has grown; noticed at `step`."""

    def __init__(self, words: str, step: int = 0):
        super().__init__(words)
        self.step = step


@dataclass(frozen=True)
class Divergence:
    """What is taken for divergence, and what is done about it.

    failing: so many updates of a network on end that were not finite (and not applied). growth: with g > 1, `reports`
    reports on end of a loss whose magnitude is above g times the median of those before; 0 looks at no loss.
    action: "stop" raises DivergedError. "rollback" goes back to the last checkpoint, or to the stage's start where
    there is none, skips the batches that came since and draws other random numbers, at `rate` times the learning rate;
    after `most` rollbacks of a stage it stops. While divergence is suspected no checkpoint is saved for it to go to,
    not by a run that is told to leave either. Raises ValueError for numbers out of range.
    """

    action: Literal["stop", "rollback"] = "stop"
    failing: int = 100
    growth: float = 0.0
    reports: int = 3
    rate: float = 0.5
    most: int = 3

    def __post_init__(self):
        if self.action not in ("stop", "rollback"):
            raise ValueError(f"divergence.action = {self.action!r}: give stop or rollback")
        if self.failing < 1 or self.reports < 1 or self.most < 0:
            raise ValueError(
                f"divergence.failing = {self.failing} and reports = {self.reports} count from 1, most = {self.most} "
                "from 0"
            )
        if self.growth and self.growth <= 1:
            raise ValueError(f"divergence.growth = {self.growth} must be above 1, or 0 to look at no loss")
        if not 0 < self.rate <= 1:
            raise ValueError(f"divergence.rate = {self.rate} must lie in (0, 1]: learning rates are multiplied by it")


class Watch:
    """Looks at the metrics of a stage as they are reported. One for each start of a stage, at a step.

    folder: where it keeps what it saw, beside the stage's checkpoints, since losses that a start finds large are so
    beside those of the starts before. writes: whether this process does.
    """

    LEAST = 5  # reports that make a median

    def __init__(self, rule: Divergence, stage: str, step: int = 0, folder: Path | None = None, writes: bool = True):
        self.rule, self._stage, self._writes = rule, stage, writes
        self._past: dict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=50))
        self._large: dict[str, int] = defaultdict(int)
        self._path = folder / "losses.json" if folder is not None and rule.growth else None
        if self._path is not None and self._path.is_file():
            for name, rows in json.loads(self._path.read_text(encoding="utf-8")).items():
                self._past[name].extend((int(at), float(value)) for at, value in rows if at <= step)

    def keep(self) -> None:
        """Write what was seen, for a later start."""
        if self._path is not None and self._writes:
            storage.put(self._path, json.dumps({name: list(rows) for name, rows in self._past.items()}).encode())

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of a report. Raises DivergedError."""
        failed = int(metrics["failing"])
        if failed >= self.rule.failing:
            raise DivergedError(
                f"stage {self._stage!r}, step {step}: the last {failed} gradients of a network were NaN or infinite "
                "and were not applied. Lower the learning rate, clip gradients, or look at the data; the last finite "
                "state is kept",
                step,
            )
        for name, value in _losses(metrics).items():
            if not self._is_large(name, value):
                self._large[name] = 0
                self._past[name].append((step, abs(value)))
                continue
            self._large[name] += 1
            if self._large[name] >= self.rule.reports:
                raise DivergedError(
                    f"stage {self._stage!r}, step {step}: {name} is {value:.4g}, and for {self.rule.reports} reports "
                    f"was above {self.rule.growth:g} times its median before, {self._median(name):.4g}. Lower the "
                    "learning rate, clip gradients, or look at the data",
                    step,
                )

    def trusts(self, metrics: Mapping[str, float]) -> bool:
        """Whether a state with these metrics shows no sign of divergence: one to go back to."""
        losses = _losses(metrics)
        return not int(metrics["failing"]) and not any(self._is_large(name, value) for name, value in losses.items())

    def _is_large(self, name: str, value: float) -> bool:
        known = self.rule.growth and len(self._past[name]) >= self.LEAST
        return bool(known) and abs(value) > self.rule.growth * self._median(name)

    def _median(self, name: str) -> float:
        return statistics.median(value for _, value in self._past[name])


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {name: float(value) for name, value in metrics.items() if name.endswith("/loss")}
    return {name: value for name, value in found.items() if not math.isnan(value)}


class Back(NamedTuple):
    """A rollback: noticed at one step, and trained on from an earlier one."""

    noticed: int
    to: int


class Rollbacks:
    """The rollbacks of a stage, kept beside its checkpoints, since all that comes after depends on them."""

    def __init__(self, folder: Path | None, writes: bool = True):
        self._path = None if folder is None else folder / "rollbacks.json"
        self._writes = writes
        self.done: list[Back] = []
        if self._path is not None and self._path.is_file():
            self.done = [Back(*map(int, pair)) for pair in json.loads(self._path.read_text(encoding="utf-8"))]

    def add(self, back: Back) -> None:
        """One more."""
        self.done.append(back)
        if self._path is not None and self._writes:
            storage.put(self._path, f"{json.dumps(self.done)}\n".encode())

    @property
    def skipped(self) -> int:
        """How many batches were skipped."""
        return sum(back.noticed - back.to for back in self.done)


def slower(optimizer: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """An optimiser whose updates are multiplied by `rate`; its state is the same, unlike optax.chain's."""

    def update(gradient, state, params=None, **extra):
        updates, state = optax.with_extra_args_support(optimizer).update(gradient, state, params, **extra)
        return optax.tree.scale(rate, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
