"""A run as a list of stages: each trains with one method, and its result is the teacher of the next."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from ddistill import sharding
from ddistill.checkpoint import Checkpoints
from ddistill.data import Source
from ddistill.data.inverted import beside_inverted
from ddistill.log import Log, Silent
from ddistill.methods.base import UNKNOWN, Made, Method, Metrics, Pairs, Space, rounds, split_steps
from ddistill.net import Net, retime, two_way
from ddistill.process import Process
from ddistill.signals import Stop, Stopped
from ddistill.train import State, Trainer, make_trainer


@dataclass(frozen=True)
class Stage:
    """Train `method` for `steps` batches of source(teacher).

    source: from the teacher that the losses see (for methods that learn from pairs it makes) to batches by step.
    optimizer: from the number of a network's updates to its transformation. guide: what the losses see as "teacher",
    the guided one for example; networks start from the unguided one. enter: carries either into the method's process.
    round: its number, for the losses. space: the samples' shape and classes, for networks made for them. Stages of the
    same method, steps and optimizer share one compilation.
    """

    name: str
    method: Method
    steps: int
    source: Callable[[Net], Source]
    optimizer: Callable[[int], optax.GradientTransformation]
    enter: Callable[[Net], Net] = lambda teacher: teacher
    guide: Callable[[Net], Net] = lambda teacher: teacher
    accumulate: int = 1
    round: int = 0
    space: Space = UNKNOWN


def stages_of(
    made: Made,
    process: Process,
    steps: int,
    *,
    data: Callable[[], Source],
    pairs: Callable[[Net, Process, Pairs, int], Source],
    optimizer: Callable[[int], optax.GradientTransformation],
    guide: Callable[[Net], Net] = lambda teacher: teacher,
    accumulate: int = 1,
    space: Space = UNKNOWN,
) -> list[Stage]:
    """The stages of a method, one for each of its rounds, which share `steps` out.

    process: the first teacher's. data: the batches of rounds without pairs. pairs: makes those of rounds with pairs,
    from the teacher, in the student's process, for the round of a number from 0 on. guide: of the first round's
    teacher, in the teacher's own process; later teachers are students of it. space: what samples look like, for methods
    whose networks are made for them.
    """
    parts = rounds(made)
    stages = []
    for i, (part, count) in enumerate(zip(parts, split_steps(parts, steps), strict=True)):
        there = part.method.process or process

        def enter(teacher: Net, source=process, target=there) -> Net:
            return teacher if source == target else retime(teacher, source, target)

        def see(teacher: Net, first=i == 0) -> Net:
            return guide(teacher) if first else teacher

        def batches(teacher: Net, wanted=part.method.pairs, target=there, number=i) -> Source:
            if wanted is None:
                return data()
            made = pairs(teacher, target, wanted, number)
            if not wanted.inverted:
                return made
            return beside_inverted(
                made, data(), teacher, target,
                share=wanted.inverted, count=wanted.count, steps=wanted.steps, integrator=wanted.integrator,
            )  # fmt: skip

        name = part.name if len(parts) == 1 else f"student-{part.name}"
        stages.append(
            Stage(
                name, part.method, count, batches, optimizer, enter, see, accumulate, part.number,
                space,
            )
        )  # fmt: skip
        process = there
    return stages


class DivergedError(FloatingPointError):
    """Training whose updates have not been finite for many steps on end."""


def run(
    stages: Sequence[Stage],
    first: Net,
    key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    log: Log | None = None,
    workdir: Path | None = None,
    log_every: int = 50,
    checkpoint_every: int = 1000,
    stop: Stop | None = None,
) -> list[Net]:
    """Run the stages from a first teacher (or the network to be trained as one); answers each stage's result.

    With a workdir every stage checkpoints under it, stages that ended are loaded, and one that was interrupted goes on
    where it stopped, with the same result as if it had not. Damaged checkpoints are skipped, and told of in the log.
    Raises Stopped where `stop` asks for it, with the state saved.
    """
    results: list[Net] = []
    mesh = sharding.make_mesh() if mesh is None else mesh
    stop = Stop() if stop is None else stop
    last: tuple[Stage, Trainer] | None = None
    for i, stage in enumerate(stages):
        before = results[-1] if results else first
        teacher = stage.enter(before)
        trainer = last[1] if last and _trains_alike(last[0], stage) else trainer_of(stage, mesh)
        last = stage, trainer
        guided = stage.enter(stage.guide(before))
        nets, state = prepare(trainer, teacher, guided, jax.random.fold_in(key, i), stage.space)
        if workdir is None:
            state = fit(trainer, state, nets, stage, log=log, log_every=log_every, stop=stop)
        else:
            tell = warnings.warn if log is None else log.note
            with Checkpoints(workdir / "checkpoints" / stage.name, tell=tell) as checkpoints:
                if checkpoints.latest() is not None:
                    state = checkpoints.restore(state)
                state = fit(
                    trainer, state, nets, stage, log=log, log_every=log_every,
                    checkpoints=checkpoints, checkpoint_every=checkpoint_every, stop=stop,
                )  # fmt: skip
        results.append(result(trainer, state, nets))
    return results


def trainer_of(stage: Stage, mesh: jax.sharding.Mesh) -> Trainer:
    """What trains a stage, with optimisers made for the number of updates that each network gets."""
    optimizers = {n: stage.optimizer(-(-stage.steps // stage.method.every.get(n, 1))) for n in stage.method.losses}
    return make_trainer(stage.method, optimizers, mesh=mesh, accumulate=stage.accumulate)


def _trains_alike(a: Stage, b: Stage) -> bool:
    same = a.method is b.method and a.optimizer == b.optimizer
    return same and (a.steps, a.accumulate) == (b.steps, b.accumulate)


def prepare(
    trainer: Trainer, teacher: Net, guided: Net, key: jax.Array, space: Space = UNKNOWN
) -> tuple[dict[str, Net], State]:
    """The networks that a trainer's losses see (those it trains without params) and the state at step 0."""
    k_nets, k_state = jax.random.split(key)
    nets = trainer.start(teacher, k_nets, space)
    state = trainer.init(nets, k_state, space)
    whole = {"teacher": guided, **{n: net.replace(params=None) for n, net in nets.items()}}
    return jax.device_put(whole, sharding.state_shardings(trainer.mesh, whole)), state


def result(trainer: Trainer, state: State, nets: dict[str, Net]) -> Net:
    """The network that samples after training: the method's `result`, a network or an average."""

    def named(name: str) -> Net:
        if name in state.params:
            return nets[name].replace(params=state.params[name])
        return nets[trainer.method.ema[name][0]].replace(params=state.ema[name])

    method = trainer.method
    forth = method.finish(named(method.result))
    return forth if method.inverse is None else two_way(forth, method.finish(named(method.inverse)))


def fit(
    trainer: Trainer,
    state: State,
    nets: dict[str, Net],
    stage: Stage,
    *,
    log: Log | None = None,
    log_every: int = 50,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 1000,
    stop: Stop | None = None,
) -> State:
    """Train from the state's step to the stage's last.

    Metrics are read one report late, so that the devices never wait for the host.
    Raises DivergedError when no update of a network has been finite for 100 of its turns on end, ValueError if a batch
    lacks what the method needs, and Stopped, once the step is saved, where `stop` asks for it.
    """
    log = Silent() if log is None else log
    stop = Stop() if stop is None else stop
    begin = int(state.step)
    if begin >= stage.steps:
        return state
    source = stage.source(nets["teacher"])
    log.start(stage.name, begin, stage.steps)
    waiting: tuple[int, Metrics] | None = None
    try:
        with stop.watch():
            for step in range(begin, stage.steps):
                batch = source(step)
                if step == begin:
                    _check_needs(stage, batch)
                turn = trainer.method.turn(step)
                state, metrics = trainer.step(
                    state, nets, sharding.put_batch(trainer.mesh, batch), turn, stage.steps, stage.round
                )
                done = step + 1
                asked = stop.now()
                ends = asked or done == stage.steps
                if done % log_every == 0 or done == stage.steps:
                    _report(log, stage, waiting)
                    waiting = (done, metrics)
                    log.progress(done)
                if checkpoints is not None and (ends or done % checkpoint_every == 0 or checkpoints.failed()):
                    _report(log, stage, waiting)  # what a checkpoint has behind it is not told again
                    waiting = None
                    checkpoints.save(done, state, wait=ends)
                if ends:
                    break
        _report(log, stage, waiting)
        if asked:
            kept = "" if checkpoints is None else " and saved"
            raise Stopped(f"stage {stage.name!r} is stopped{kept} at step {done} of {stage.steps}", stop.signal)
    finally:
        log.stop()
    return state


def _check_needs(stage: Stage, batch) -> None:
    missing = sorted(stage.method.needs - set(batch))
    if missing:
        raise ValueError(
            f"stage {stage.name!r} needs {missing} in its batches, which hold {sorted(batch)}: "
            "x is data, noise and x together are teacher pairs, path their trajectories"
        )


def _report(log: Log, stage: Stage, waiting: tuple[int, Metrics] | None) -> None:
    if waiting is None:
        return
    step, metrics = waiting
    log.metrics(step, metrics)
    failed = int(metrics["failing"])
    if failed >= 100:
        raise DivergedError(
            f"stage {stage.name!r}, step {step}: the last {failed} gradients of a network were NaN or infinite and "
            "were not applied. Lower the learning rate, clip gradients, or look at the data; the last finite state is "
            "kept"
        )
