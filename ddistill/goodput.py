"""Where the time of a run goes: into steps, or into all that keeps the devices from them."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "start": "start",
    "compile": "compilation",
    "data": "waiting for batches",
    "checkpoints": "checkpoints",
    "previews": "previews",
}
"""What a clock tells apart from steps, and how it is called in words."""


class Clock:
    """Seconds of one start of a stage by kind; what is of no other kind is time in steps."""

    def __init__(self):
        self.began = time.time()
        self.first = 0
        self._begin = time.monotonic()
        self._seconds = dict.fromkeys(KINDS, 0.0)

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Count the time inside as of this kind, one of `KINDS`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds[kind] += time.monotonic() - begin

    def spent(self) -> dict[str, float]:
        """Seconds up to now, by kind and in steps; when it was started (Unix time), and at which step."""
        steps = time.monotonic() - self._begin - sum(self._seconds.values())
        rounded = {kind: round(seconds, 3) for kind, seconds in {**self._seconds, "steps": steps}.items()}
        return {"began": round(self.began, 3), "first": self.first, **rounded}


@dataclass(frozen=True)
class Goodput:
    """Where the time of a stage went, over all its starts.

    seconds: by kind of `KINDS` and in steps. redone: steps that a later start took again, after a kill or a rollback.
    share: of all that time, what went into steps that count.
    """

    seconds: Mapping[str, float]
    starts: int
    redone: int
    share: float

    def words(self) -> str:
        """One line."""
        total = max(sum(self.seconds.values()), 1e-9)
        parts = [f"{name} {self.seconds[kind] / total:.1%}" for kind, name in KINDS.items()]
        again = f", {self.redone} steps done again" if self.redone else ""
        more = f" over {self.starts} starts{again}" if self.starts > 1 else ""
        return f"goodput {self.share:.1%} of {total:.4g} s{more}: {', '.join(parts)}"


def of_starts(starts: list[tuple[int, Mapping[str, float]]]) -> Goodput:
    """The goodput of one or more starts in order, each the step that it had come to and what its clock told there."""
    seconds: dict[str, float] = defaultdict(float)
    useful, redone = 0.0, 0
    for i, (step, spent) in enumerate(starts):
        first = int(spent["first"])
        kept = min([step, *(int(later["first"]) for _, later in starts[i + 1 :])])
        done, kept = step - first, max(kept - first, 0)
        redone += done - kept
        useful += spent["steps"] * kept / done if done else 0.0
        for kind in (*KINDS, "steps"):
            seconds[kind] += spent.get(kind, 0.0)  # earlier versions told fewer apart
    return Goodput(dict(seconds), len(starts), redone, useful / max(sum(seconds.values()), 1e-9))


def read_starts(metrics: Path) -> dict[str, list[tuple[int, Mapping[str, float]]]]:
    """The starts of each stage from a run's metrics.jsonl, as `of_starts` takes them."""
    stages: dict[str, dict[float, tuple[int, Any]]] = defaultdict(dict)
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            if '"spent"' not in line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off when the run was killed
                continue
            stages[row["stage"]][row["spent"]["began"]] = row["step"], row["spent"]
    return {stage: list(starts.values()) for stage, starts in stages.items()}
