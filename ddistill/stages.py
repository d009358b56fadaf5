"""A run as a list of stages: each trains with one method, and its result is the teacher of the next."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from ddistill import sharding
from ddistill.checkpoint import Checkpoints
from ddistill.data import Source
from ddistill.data.inverted import beside_inverted
from ddistill.divergence import Back, DivergedError, Divergence, Rollbacks, Watch, slower
from ddistill.gathering import Place
from ddistill.goodput import Clock
from ddistill.log import Log, Silent
from ddistill.loop import Pace, Profile, fit
from ddistill.methods.base import UNKNOWN, Made, Method, Pairs, Space, rounds, split_steps
from ddistill.net import Net, retime, two_way
from ddistill.process import Process
from ddistill.signals import Stop
from ddistill.train import State, Trainer, make_trainer

Look = Callable[[int, Net], None]
"""Shown a step and the network that samples after it. All processes call it."""


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
    place: Callable[[], Place | None] = lambda: None,
) -> list[Stage]:
    """The stages of a method, one for each of its rounds, which share `steps` out.

    process: the first teacher's. data: the batches of rounds without pairs. pairs: makes those of rounds with pairs,
    from the teacher, in the student's process, for the round of a number from 0 on. guide: of the first round's
    teacher, in the teacher's own process; later teachers are students of it. space: what samples look like, for methods
    whose networks are made for them. place: where teachers lie, as for `beside_inverted`; asked for when it is needed.
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
                part=(jax.process_index(), jax.process_count()), place=place(),
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


def run(
    stages: Sequence[Stage],
    first: Net,
    key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rule: sharding.Rule = sharding.Rule(),  # noqa: B008
    log: Log | None = None,
    workdir: Path | None = None,
    log_every: int = 50,
    checkpoint_every: int = 1000,
    steps_per_dispatch: int = 1,
    ahead: int = 2,
    divergence: Divergence | None = None,
    profile: range | None = None,
    stop: Stop | None = None,
    preview_every: int = 0,
    looks: Mapping[str, Look] | None = None,
) -> list[Net]:
    """Run the stages from a first teacher (or the network to be trained as one); answers each stage's result.

    With a workdir every stage checkpoints under it, stages that ended are loaded, and one that was interrupted goes on
    where it stopped, with the same result as if it had not. Damaged checkpoints are skipped, and told of in the log.
    rule: how parameters lie on the mesh. log_every, checkpoint_every, steps_per_dispatch, ahead: the loop's `Pace`.
    profile: the steps of each stage of which a profiler's trace is written under the workdir. looks: by the stages'
    names, what sees the network that samples every `preview_every` steps. Raises Stopped where
    `stop` asks for it, with the state saved, DivergedError as `divergence` says, and as `prepare`.
    """
    results: list[Net] = []
    mesh = sharding.make_mesh() if mesh is None else mesh
    tell = warnings.warn if log is None else log.note
    stop, log = stop or Stop(), log or Silent()
    pace = Pace(log_every, checkpoint_every, steps_per_dispatch, ahead, preview_every)
    if profile is not None and workdir is None:
        raise ValueError("a profile needs a workdir, the folder under which it is written")
    traced = False
    last: tuple[Stage, Trainer] | None = None
    for i, stage in enumerate(stages):
        before = sharding.spread(mesh, results[-1] if results else first, rule)
        trainer = last[1] if last and _trains_alike(last[0], stage) else trainer_of(stage, mesh, rule)
        last = stage, trainer
        trace = Profile(profile, workdir / "profile" / stage.name) if workdir is not None else Profile()
        folder = None if workdir is None else workdir / "checkpoints" / stage.name
        made = _carried_out(
            stage, trainer, before, jax.random.fold_in(key, i), folder,
            pace=pace, log=log, tell=tell, divergence=divergence or Divergence(), profile=trace, stop=stop,
            look=None if looks is None else looks.get(stage.name),
        )  # fmt: skip
        results.append(made)
        traced |= trace.written
    if profile is not None and not traced:
        log.note(f"no stage took steps {profile.start}:{profile.stop} now: nothing was profiled")
    return results


def _carried_out(
    stage: Stage,
    trainer: Trainer,
    before: Net,
    key: jax.Array,
    folder: Path | None,
    *,
    pace: Pace,
    log: Log,
    tell: Callable[[str], None],
    divergence: Divergence,
    profile: Profile,
    stop: Stop,
    look: Look | None,
) -> Net:
    """The result of a stage, from where its checkpoints are; after divergence anew from there, if that is wanted."""
    saved = (lambda: Checkpoints(folder, tell=tell)) if folder is not None else contextlib.nullcontext
    backs = Rollbacks(folder, jax.process_index() == 0)
    source: Source | None = None
    while True:
        clock, count = Clock(), len(backs.done)
        try:
            with saved() as checkpoints:
                with clock.of("start"):
                    if count:
                        trainer = trainer_of(stage, trainer.mesh, trainer.rule, divergence.rate**count, count)
                    teacher, guided = stage.enter(before), stage.enter(stage.guide(before))
                    nets, state = prepare(trainer, teacher, guided, key, stage.space)
                    if checkpoints is not None and checkpoints.latest() is not None:
                        state = checkpoints.restore(state)
                    if int(state.step) < stage.steps:
                        source = source or stage.source(nets["teacher"])
                        skipping = _later(source, backs.skipped)
                    watch = Watch(divergence, stage.name, int(state.step), folder, jax.process_index() == 0)
                if source is not None:
                    state = fit(
                        trainer, state, nets, skipping,
                        stage=stage.name, steps=stage.steps, round=stage.round, pace=pace, log=log, stop=stop,
                        checkpoints=checkpoints, watch=watch, profile=profile, clock=clock,
                        look=look and _seen(look, trainer, nets),
                    )  # fmt: skip
                return result(trainer, state, nets)
        except DivergedError as error:
            if divergence.action == "stop":
                raise
            if count >= divergence.most:
                raise DivergedError(f"{error}. That was after {count} rollbacks", error.step) from error
            with saved() as checkpoints:  # opened anew: what was being written is there now
                to = (checkpoints and checkpoints.latest()) or 0
                backs.add(Back(error.step, to))
            log.note(
                f"{error}. Rollback {count + 1} of {divergence.most}: back to step {to}, without the "
                f"{error.step - to} batches since, and with {divergence.rate ** (count + 1):g} times the learning rate"
            )


def _later(source: Source, skipped: int) -> Source:
    """The batches of later steps."""
    return (lambda step: source(step + skipped)) if skipped else source


def _seen(look: Look, trainer: Trainer, nets: dict[str, Net]) -> Callable[[int, State], None]:
    """The look at the network that would sample if training ended here."""
    return lambda step, state: look(step, result(trainer, state, nets))


def trainer_of(
    stage: Stage,
    mesh: jax.sharding.Mesh,
    rule: sharding.Rule = sharding.Rule(),  # noqa: B008
    rate: float = 1.0,
    draw: int = 0,
) -> Trainer:
    """What trains a stage, with optimisers made for the number of updates that each network gets.

    rule: how parameters lie on the mesh. rate: what learning rates are multiplied by. draw: see `make_trainer`.
    """
    optimizers = {n: stage.optimizer(-(-stage.steps // stage.method.every.get(n, 1))) for n in stage.method.losses}
    if rate != 1:
        optimizers = {n: slower(optimizer, rate) for n, optimizer in optimizers.items()}
    return make_trainer(stage.method, optimizers, mesh=mesh, rule=rule, accumulate=stage.accumulate, draw=draw)


def _trains_alike(a: Stage, b: Stage) -> bool:
    same = a.method is b.method and a.optimizer == b.optimizer
    return same and (a.steps, a.accumulate) == (b.steps, b.accumulate)


def prepare(
    trainer: Trainer, teacher: Net, guided: Net, key: jax.Array, space: Space = UNKNOWN
) -> tuple[dict[str, Net], State]:
    """The networks that a trainer's losses see (those it trains without params) and the state at step 0.

    Raises ValueError for exceptions to the trainer's rule that fit no parameter.
    """
    nets, state = trainer.begin(teacher, key, space)
    trainer.rule.check(trainer.mesh, {"teacher": teacher, "params": state.params})
    return sharding.spread(trainer.mesh, {"teacher": guided, **nets}, trainer.rule), state


def result(trainer: Trainer, state: State, nets: dict[str, Net]) -> Net:
    """The network that samples after training: the method's `result`, a network or an average."""

    def named(name: str) -> Net:
        if name in state.params:
            return nets[name].replace(params=state.params[name])
        return nets[trainer.method.ema[name][0]].replace(params=state.ema[name])

    method = trainer.method
    forth = method.finish(named(method.result))
    return forth if method.inverse is None else two_way(forth, method.finish(named(method.inverse)))
