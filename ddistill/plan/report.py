"""The plan of an experiment on a pod: whether it fits, how fast it can be, what bounds it, and what it costs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddistill.config import Experiment
from ddistill.plan.analysis import Analysed, analysed, check_batch, traced
from ddistill.plan.aot import Compiled, check_libtpu, compiled
from ddistill.plan.changes import changed
from ddistill.plan.chips import GIB, Pod
from ddistill.plan.programs import SAMPLER
from ddistill.plan.roofline import Roofline, average, per_million, roofline
from ddistill.runs import load_experiment


@dataclass(frozen=True)
class Row:
    """One program: what was counted, what the compiler said if it was asked, and the roofline of both."""

    counted: Analysed
    compiled: Compiled | None
    time: Roofline
    memory: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """An experiment on a pod.

    settings: batch_size, fsdp and all else that decides the layout. steps: of all stages. reasons: why it does not
    fit; none where it does. notes: what stood in for data and weights that are not here. rows: its programs.
    """

    name: str
    pod: Pod
    settings: Mapping[str, Any]
    steps: int
    rows: Sequence[Row] = ()
    reasons: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def fits(self) -> bool:
        """Whether every program fits the chips."""
        return not self.reasons

    @property
    def training(self) -> list[Row]:
        """The programs of the steps."""
        return [row for row in self.rows if row.counted.stage != SAMPLER]

    def seconds(self, of: Callable[[Roofline], float] = lambda time: time.seconds) -> float:
        """The least that a step takes, averaged over all steps of the run."""
        return average((row.counted, of(row.time)) for row in self.training)

    def cost(self, price: float, sampling: bool = False) -> float:
        """What a million images cost at the least, of training or of sampling, at a price for a chip and an hour."""
        rows = [row for row in self.rows if row.counted.stage == SAMPLER] if sampling else self.training
        seconds = rows[0].time.seconds if sampling else self.seconds()
        return per_million(seconds, rows[0].counted.images, self.pod.chips, price)


def make(
    path: Path,
    flags: Sequence[str],
    pod: Pod,
    *,
    changes: Mapping[str, Any] | None = None,
    sample_steps: int = 1,
    compiles: bool = True,
    only: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan the experiment of a file for a pod: counted, and for TPUs compiled.

    flags: as for `load_experiment`. changes: fields set afterwards, and remat. compiles: ask the compiler where the pod
    has TPUs. only: "steps" or "sampler" compiles these alone. tell: hears what is being done. A layout that the pod
    cannot take, and programs that its chips cannot hold, are reasons in the plan. Raises ImportError where libtpu is
    needed and missing, and all that building an experiment raises.
    """
    experiment = changed(load_experiment(path, flags), changes or {})
    if compiles and pod.chip.kind == "tpu":
        check_libtpu()
    try:
        samples = check_batch(experiment, pod.chips)
    except ValueError as error:
        return Plan(experiment.name, pod, settings(experiment), experiment.steps, reasons=(str(error),))
    tell("counting products and bytes")
    flash = pod.chip.kind == "gpu"
    seen = traced(experiment, samples, sample_steps=sample_steps)
    rows = analysed(experiment, pod.chips, seen, flash=flash)
    found: dict[str, Compiled] = {}
    held = max(sum(row.held.values()) for row in rows)
    if compiles and pod.chip.kind == "tpu" and held <= pod.chip.usable:
        tell(f"compiling for {pod.topology}, which may take minutes for each program")
        options = {"sample_steps": sample_steps, **({"only": only} if only else {})}
        for one in compiled(path, flags, pod, changes=changes, **options):
            found[one.name] = one
            tell(f"{one.name}: {'too large' if one.failed else 'compiled'} in {one.seconds:.0f} s")
    steps = sum({row.stage: row.steps for row in rows if row.stage != SAMPLER}.values())
    made = [_row(row, found.get(row.name), pod) for row in rows]
    return Plan(experiment.name, pod, settings(experiment), steps, made, _reasons(made, pod), tuple(seen.notes))


def settings(experiment: Experiment) -> dict[str, Any]:
    """What decides how an experiment lies on a pod."""
    names = ("batch_size", "accumulate", "fsdp", "tensor")
    found = {name: getattr(experiment, name) for name in names}
    if hasattr(experiment.network, "remat"):
        found["remat"] = experiment.network.remat
    return found


def _row(row: Analysed, done: Compiled | None, pod: Pod) -> Row:
    ran = done is not None and not done.failed
    traffic = done.traffic if done is not None and ran else row.traffic
    received = sum(c.received for c in done.collectives.values()) if done is not None and ran else row.least.received
    time = roofline(pod.chip, row.work.kinds, traffic, received)
    memory = row.memory if done is None else done.memory
    mfu = row.model / pod.chip.flops / time.seconds if time.seconds else 0.0
    return Row(row, done, time, memory, mfu)


def _reasons(rows: Iterable[Row], pod: Pod) -> tuple[str, ...]:
    """Why programs do not fit."""
    usable, found = pod.chip.usable, []
    for row in rows:
        if row.compiled is not None and row.compiled.failed:
            found.append(f"{row.counted.name}: the compiler says {row.compiled.failed}")
        elif row.memory > usable:
            by = ", ".join(f"{name} {size / GIB:.2f}" for name, size in row.counted.held.items())
            found.append(
                f"{row.counted.name}: {row.memory / GIB:.2f} GiB on each chip, and {pod.chip.name} has "
                f"{usable / GIB:.2f} for a program ({by}, temporaries about {row.counted.temporaries / GIB:.2f})"
            )
    return tuple(found)


def described(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The plan as numbers and words for a JSON file."""
    rows = []
    for row in plan.rows:
        done = row.compiled
        rows.append(
            {
                **dataclasses.asdict(row.counted),
                "compiled": None if done is None else {**dataclasses.asdict(done), "memory": done.memory},
                "memory": row.memory,
                "seconds": row.time.seconds,
                "busy": dataclasses.asdict(row.time),
                "bound": row.time.bound,
                "mfu": row.mfu,
            }
        )
    found = {
        "experiment": plan.name, "pod": dataclasses.asdict(plan.pod), "settings": dict(plan.settings),
        "steps": plan.steps, "fits": plan.fits, "reasons": list(plan.reasons), "notes": list(plan.notes),
        "programs": rows,
    }  # fmt: skip
    if rows:
        found["seconds_per_step"] = plan.seconds()
    if rows and price is not None:
        found["price"] = price
        found["per_million_images"] = {"training": plan.cost(price), "sampling": plan.cost(price, sampling=True)}
    return found
