"""The loop of a stage: batches made ahead of the devices, and nothing read from them before it is due."""

import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddistill import sharding, storage
from ddistill.checkpoint import Checkpoints
from ddistill.data import Source
from ddistill.data.loading import prefetched
from ddistill.divergence import Divergence, Watch
from ddistill.goodput import Clock
from ddistill.log import Log, Silent
from ddistill.methods.base import Metrics
from ddistill.net import Net
from ddistill.signals import Stop, Stopped
from ddistill.train import State, Trainer

PyTree = Any

IN_FLIGHT = 2
"""Calls that the devices may be behind: as many as they need not to wait, as few as keep batches from piling up."""


@dataclass(frozen=True)
class Pace:
    """How a loop goes: what it does every so many steps, how many it takes in one call, how many calls' batches wait.

    steps_per_dispatch: more than one for networks whose step takes about as long as its call; logs and checkpoints may
    cut it short, and signals wait for its end. ahead: 0 makes batches when they are needed. preview_every: 0 shows no
    previews. Raises ValueError for other counts below 1.
    """

    log_every: int = 50
    checkpoint_every: int = 1000
    steps_per_dispatch: int = 1
    ahead: int = 2
    preview_every: int = 0

    def __post_init__(self):
        for name in ("log_every", "checkpoint_every", "steps_per_dispatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("ahead", "preview_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 0")


class Profile:
    """A profiler's trace of some steps, by number from 0, into a folder that xprof, TensorBoard and Perfetto open."""

    def __init__(self, steps: range | None = None, folder: Path | None = None):
        self.steps, self.folder = steps or range(0), folder
        self.running = self.written = False
        self._here = Path()

    def enter(self, step: int, state: State) -> None:
        """Begin before this step, if it is one of them, and when what made the state has ended."""
        if self.folder is not None and not (self.running or self.written) and step in self.steps:
            jax.block_until_ready(state)
            if jax.process_index() == 0:
                self._here = Path(tempfile.mkdtemp(prefix="ddistill-"))  # the folder may be in a bucket
                jax.profiler.start_trace(str(self._here), create_perfetto_trace=True)
            self.running = True

    def leave(self, step: int, state: State) -> None:
        """End before this step, if it is none of them, and when what made the state has ended."""
        if self.running and step not in self.steps:
            jax.block_until_ready(state)
            if jax.process_index() == 0 and self.folder is not None:
                jax.profiler.stop_trace()
                storage.copy(self._here, self.folder)
                storage.remove(self._here)
            self.running, self.written = False, True


def fit(
    trainer: Trainer,
    state: State,
    nets: dict[str, Net],
    source: Source,
    *,
    stage: str,
    steps: int,
    round: int = 0,
    pace: Pace | None = None,
    log: Log | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Stop | None = None,
    watch: Watch | None = None,
    profile: Profile | None = None,
    clock: Clock | None = None,
    look: Callable[[int, State], None] | None = None,
) -> State:
    """Train from the state's step to the last of `steps`, on source(step).

    Metrics are read one report late, and batches put on the devices ahead, so that the devices never wait for the host.
    look: is called with a step and its state as often as `pace` shows previews, and after the last step.

    Raises DivergedError as `watch` says, ValueError if a batch lacks what the method needs, and Stopped, once the step
    is saved, unless it may have diverged, where `stop` asks for it.
    """
    pace, clock = pace or Pace(), clock or Clock()
    log, stop = log or Silent(), stop or Stop()
    profile, watch = profile or Profile(), watch or Watch(Divergence(), stage)
    asked, kept = False, ""
    begin = done = clock.first = int(state.step)
    waiting: tuple[int, Metrics] | None = None
    flight: deque[Any] = deque()
    called: set[Any] = set()
    call = _Calls(trainer, nets, steps, round, pace.steps_per_dispatch)
    look_every = pace.preview_every if look is not None else 0

    def report() -> None:
        nonlocal waiting
        if waiting is not None:
            (step, metrics), waiting = waiting, None
            numbers = jax.device_get(metrics)
            log.metrics(step, numbers)
            log.spent(done, clock.spent())
            watch.see(step, numbers)

    log.start(stage, begin, steps)
    try:
        with clock.of("data"):
            first = source(begin)
            _check_needs(trainer, stage, first)
        made_by_devices = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first))
        # Programs that two threads start may meet on several devices in different orders, and wait for each other.
        ahead = 0 if made_by_devices else pace.ahead
        known = {begin: first}
        per = 1 if made_by_devices else pace.steps_per_dispatch
        prepare = call.single if per == 1 else call.stacked
        wide = jax.config.read("jax_enable_x64")

        def make(chunk: range) -> tuple:
            with jax.enable_x64(wide):  # which threads do not take over from each other
                return prepare(chunk, [known.pop(step) if step in known else source(step) for step in chunk])

        edges = (profile.steps.start, profile.steps.stop)
        plan = _chunks(
            begin, steps, per, (pace.log_every, pace.checkpoint_every, *[look_every] * (look_every > 0)), edges
        )
        with stop.watch(), closing(prefetched(make, plan, ahead)) as batches:
            while done < steps:
                with clock.of("data"):
                    chunk, (kind, *batch) = next(batches)
                profile.enter(chunk.start, state)
                with (
                    clock.of("compile") if kind not in called else nullcontext(),
                    jax.profiler.StepTraceAnnotation("train", step_num=chunk.start),
                ):
                    state, metrics = call(state, kind, batch)
                called.add(kind)
                done = chunk.stop
                flight.append(metrics["failing"])
                if len(flight) > IN_FLIGHT:
                    jax.block_until_ready(flight.popleft())
                profile.leave(done, state)
                asked = stop.now()
                ends = asked or done == steps
                if done % pace.log_every == 0 or done == steps:
                    report()
                    waiting = done, _of_turn(metrics, trainer.method.turn(done - 1))
                    log.progress(done)
                if checkpoints is not None and (ends or done % pace.checkpoint_every == 0 or checkpoints.failed()):
                    report()  # what a checkpoint has behind it is not told again
                    if done == steps or watch.rule.action == "stop" or watch.trusts(jax.device_get(metrics)):
                        with clock.of("checkpoints"):
                            checkpoints.save(done, state, wait=ends)
                            watch.keep()
                        kept = " and saved"
                    else:
                        kept = ", and not saved since it may diverge,"
                if look is not None and look_every and not asked and (done % look_every == 0 or done == steps):
                    jax.block_until_ready(state)  # the time of steps that have not ended is not the preview's
                    with clock.of("previews"):
                        look(done, state)
                if ends:
                    break
        report()
        if asked or stop.signal is not None:  # which may have come while the last step was saved
            words = f"stage {stage!r} is stopped{kept} at step {done} of {steps}"
            raise Stopped(words, stop.signal, together=asked)
    finally:
        profile.leave(profile.steps.stop, state)
        log.spent(done, clock.spent())
        log.stop()
    return state


class _Calls:
    """The calls of a trainer's step: one for each batch, or one for several that are stacked."""

    def __init__(self, trainer: Trainer, nets: dict[str, Net], steps: int, round: int, most: int):
        self._trainer, self._nets, self._most = trainer, nets, most
        self._everywhere = sharding.replicated(trainer.mesh)
        self._numbers = jax.device_put((np.int32(steps), np.int32(round)), self._everywhere)
        every = math.lcm(*trainer.method.every.values())
        self._turns = tuple(sorted({trainer.method.turn(step) for step in range(min(every, steps))}))

    def single(self, chunk: range, batches: list[PyTree]) -> tuple:
        """What `__call__` takes for a chunk of one step: its turn, and its batch on the devices."""
        return self._trainer.method.turn(chunk.start), sharding.put_batch(self._trainer.mesh, batches[0])

    def stacked(self, chunk: range, batches: list[PyTree]) -> tuple:
        """What `__call__` takes for a chunk of several, filled up to as many as there may be."""
        filled = [*batches, *batches[-1:] * (self._most - len(batches))]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
        which = [self._turns.index(self._trainer.method.turn(step)) for step in chunk]
        which += [0] * (self._most - len(which))
        numbers = jax.device_put((np.asarray(which, np.int32), np.int32(len(chunk))), self._everywhere)
        return self._turns, sharding.put_batch(self._trainer.mesh, batch, stacked=True), *numbers

    def __call__(self, state: State, kind: tuple, batch: list) -> tuple[State, Metrics]:
        """Take the steps; kind: a turn, or all of them where batches are stacked."""
        if len(batch) == 1:
            return self._trainer.step(state, self._nets, *batch, kind, *self._numbers)
        batches, which, count = batch
        return self._trainer.several(state, self._nets, batches, kind, which, count, *self._numbers)


def _chunks(begin: int, steps: int, most: int, every: tuple[int, ...], edges: tuple[int, ...]) -> Iterator[range]:
    """Steps that are taken in one call: at most so many, up to the next multiple of one of `every`, and to edges."""
    while begin < steps:
        ends = (begin + most, steps, *((begin // n + 1) * n for n in every), *(e for e in edges if e > begin))
        yield range(begin, min(ends))
        begin = min(ends)


def _of_turn(metrics: Metrics, turn: tuple[str, ...]) -> Mapping[str, Any]:
    """The metrics of the networks that the last step has updated, and those of no network."""
    return {n: value for n, value in metrics.items() if "/" not in n or n.partition("/")[0] in turn}


def _check_needs(trainer: Trainer, stage: str, batch: PyTree) -> None:
    missing = sorted(trainer.method.needs - set(batch))
    if missing:
        raise ValueError(
            f"stage {stage!r} needs {missing} in its batches, which hold {sorted(batch)}: "
            "x is data, noise and x together are teacher pairs, path their trajectories"
        )
