"""`ddistill plan`: what an experiment takes on a pod, as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ddistill.cli import Plan as Command
from ddistill.cli.output import say, screen, write_json
from ddistill.plan.chips import GIB, Pod, pod
from ddistill.plan.hlo import COLLECTIVES, Collective
from ddistill.plan.report import Plan, Row, described, make
from ddistill.plan.search import Candidate, candidates, neighbours
from ddistill.runs import load_experiment


def plan(command: Command, flags: Sequence[str]) -> None:
    """Print the plan, and write it where it is wanted."""
    where = pod(command.topology)
    if command.steps < 1:
        raise ValueError(f"--steps {command.steps}: a sampler takes at least 1 step")
    if command.price is not None and command.price < 0:
        raise ValueError(f"--price {command.price}: give what a chip costs for an hour, at least 0")
    if command.keep_batch and not command.find:
        raise ValueError("--keep-batch is of --find: without it the batch is the experiment's")
    options: dict[str, Any] = {"sample_steps": command.steps, "compiles": not command.counted, "tell": say}
    if not command.find:
        made = make(command.experiment, flags, where, **options)
        show(made, command.price)
        found = {"plan": described(made, command.price)}
    else:
        found = _find(command, flags, where, options)
    if command.json is not None:
        write_json(command.json, found)
        say(f"Wrote {command.json}")


def _find(command: Command, flags: Sequence[str], where: Pod, options: Mapping[str, Any]) -> dict[str, Any]:
    """Search, plan the winner, and go to what is next to it where that is better, or where the winner does not fit."""
    experiment = load_experiment(command.experiment, flags)
    say("counting layouts")
    among = candidates(experiment, where, keep_batch=command.keep_batch)
    console = screen()
    console.print(_candidates(among, experiment.name, where))
    compiles = where.chip.kind == "tpu" and not command.counted
    left, done = among[:], {}
    chosen: tuple[Candidate, Plan] | None = None
    for _ in range(3 if compiles else 1):
        if not left:
            break
        first = left.pop(0)
        say(f"planning {_words(first.changes)}")
        made = make(command.experiment, flags, where, changes=first.changes, **options)
        done[_words(first.changes)] = described(made, command.price)
        if not made.fits:  # those that take more by the same estimate will not either
            say(f"does not fit: {made.reasons[0]}")
            left = [c for c in left if c.memory < 0.8 * first.memory]
            continue
        if chosen is None or made.seconds() / first.batch_size < chosen[1].seconds() / chosen[0].batch_size:
            chosen = first, made
        near = neighbours(chosen[0], left)
        left = sorted(near, key=lambda c: c.per_image)[:2]
    if chosen is None:
        tried = "; ".join(done)
        raise ValueError(
            f"{experiment.name} on {where.topology}: the compiler refused what the estimate chose ({tried})"
        )
    show(chosen[1], command.price)
    console.print("Set it with " + " ".join(_flags(chosen[0].changes)), highlight=False, markup=False)
    listed = [dataclasses.asdict(c) for c in among]
    return {"plan": described(chosen[1], command.price), "planned": done, "candidates": listed}


def show(made: Plan, price: float | None) -> None:
    """Print a plan."""
    console, chip = screen(), made.pod.chip
    for note in made.notes:
        console.print(f"Not there: {note}", highlight=False, markup=False)
    title = f"{made.name} on {made.pod.topology} ({made.pod.chips} chips): {_words(made.settings)}"
    if made.rows:
        console.print(_memory(made, title))
        console.print(_time(made))
        for row in made.training:
            console.print(_sent(row))
    for line in lines(made, price):
        console.print(line, highlight=False, markup=False)
    console.print(
        f"{chip.name}: {chip.flops / 1e12:g} TFLOP/s, {chip.memory / GIB:.1f} GiB at {chip.bandwidth / 1e9:g} GB/s, "
        f"links {chip.links / 1e9:g} GB/s ({chip.source})", highlight=False, markup=False,
    )  # fmt: skip


def lines(made: Plan, price: float | None) -> list[str]:
    """The plan in words."""
    if not made.fits:
        return [f"Does not fit: {reason}" for reason in made.reasons]
    chip, most = made.pod.chip, max(row.memory for row in made.rows)
    asked = any(row.compiled is not None for row in made.rows)
    how = "as compiled" if asked else "by estimate"
    said = [f"Fits: {most / GIB:.2f} of {chip.usable / GIB:.2f} GiB on each chip, {how}"]
    seconds, batch = made.seconds(), made.training[0].counted.images
    said.append(
        f"A step takes at least {_time_of(seconds)}, {_time_of(made.seconds(lambda t: t.serial))} if nothing overlaps: "
        f"at most {batch / seconds:,.0f} images/s; {made.steps:,} steps at least {made.steps * seconds / 3600:.2g} h"
    )
    if price is not None:
        train, draw = made.cost(price), made.cost(price, sampling=True)
        said.append(
            f"A million images cost at least {train:,.3g} to train on and {draw:,.3g} to sample, at {price:g} for a "
            "chip and an hour"
        )
    return said


def _memory(made: Plan, title: str) -> Table:
    names = dict.fromkeys(name for row in made.rows for name in row.counted.held)
    columns = ("program", *names, "temporaries", "estimate", "compiled", "compiler")
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, caption="GiB on each chip")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in made.rows:
        done, counted = row.compiled, row.counted
        held = [_gib(counted.held[name]) if name in counted.held else "–" for name in names]
        compiled, seconds = "–", "–"
        if done is not None:
            compiled = (
                (f"{_gib(done.needed)} needed" if done.needed else "too large") if done.failed else _gib(done.memory)
            )
            seconds = f"{done.seconds:.0f} s"
        temporary = _gib(counted.temporaries if done is None or done.failed else done.temporaries)
        table.add_row(counted.name, *held, temporary, _gib(counted.memory), compiled, seconds)
    return table


def _time(made: Plan) -> Table:
    table = Table(
        "program", "share", "TFLOP", "of the model", "GB moved", "GB received", "matrix units", "memory",
        "interconnect", "at least", "bound by", "MFU at most", box=SIMPLE_HEAD, caption="for each chip and step",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for row in made.rows:
        done, counted = row.compiled, row.counted
        ran = done is not None and not done.failed
        moved = done.traffic if done is not None and ran else counted.traffic
        received = (
            sum(c.received for c in done.collectives.values()) if done is not None and ran else counted.least.received
        )
        table.add_row(
            counted.name, f"{counted.share:.3g}", f"{counted.work.flops / 1e12:.4g}", f"{counted.model / 1e12:.4g}",
            _gb(moved), _gb(received), _time_of(row.time.matrix), _time_of(row.time.memory),
            _time_of(row.time.links), _time_of(row.time.seconds), row.time.bound, f"{row.mfu:.0%}",
        )  # fmt: skip
    return table


def _sent(row: Row) -> Table:
    done, least = row.compiled, row.counted.least
    table = Table(
        "collectives", "count", "GB of whole arrays", "GB received by each chip", title=row.counted.name,
        title_justify="left", box=SIMPLE_HEAD,
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    total = Collective()
    for kind in COLLECTIVES:
        if done is not None and (one := done.collectives.get(kind)) is not None:
            total += one
            table.add_row(kind, f"{one.count:,.0f}", _gb(one.bytes), _gb(one.received))
    if done is not None and not done.failed:
        times = f" ({total.received / least.received:.1f} times the minimum)" if least.received else ""
        table.add_row("all", f"{total.count:,.0f}", _gb(total.bytes), f"{_gb(total.received)}{times}")
    whole = _gb(least.gathered + least.summed)
    table.add_row("FSDP's minimum: gathered once per use, summed once", "", whole, _gb(least.received))
    return table


def _candidates(among: Sequence[Candidate], name: str, where: Pod) -> Table:
    table = Table(
        "layout", "at least", "images/s at most", "GiB by estimate", title=f"{name} on {where.topology}: the best of "
        f"{len(among)} that fit by estimate", title_justify="left", box=SIMPLE_HEAD,
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for c in among[:8]:
        table.add_row(_words(c.changes), _time_of(c.seconds), f"{1 / c.per_image:,.0f}", _gib(c.memory))
    return table


def _flags(changes: Mapping[str, Any]) -> list[str]:
    """Settings as a command's flags."""
    return [
        f"--{'network.remat' if name == 'remat' else name.replace('_', '-')} {value}" for name, value in changes.items()
    ]


def _words(settings: Mapping[str, Any]) -> str:
    def one(name: str, value: Any) -> str:
        shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        return f"{name.replace('_', ' ')} {shown}"

    return ", ".join(one(name, value) for name, value in settings.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.01 * GIB else f"{size / GIB:.1g}"


def _time_of(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.2g}"
