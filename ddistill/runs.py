"""A run: an experiment, and the folder in which it was or is being carried out.

The folder holds experiment.py (a copy of the experiment's file), experiment.json (the overrides and every field as it
was resolved), checkpoints/<stage>/, metrics.jsonl and events/.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from ddistill import hosts, seals, sharding, storage
from ddistill.checkpoint import CheckpointError, Checkpoints
from ddistill.config import Data, Experiment, Imported, PairsData, loaded, resolved
from ddistill.data import Source
from ddistill.data.pairs import fresh_pairs, teacher_pairs
from ddistill.gathering import Place
from ddistill.log import Log, RunLog, Silent
from ddistill.methods.base import Pairs, sampling_of
from ddistill.net import Net, guided, laid_out
from ddistill.overrides import describe, differences, override
from ddistill.previews import looks_of
from ddistill.process import Process
from ddistill.signals import Stop
from ddistill.stages import Look, Stage, run, stages_of
from ddistill.version import version

HOW = frozenset({
    "fsdp", "tensor", "layout", "steps_per_dispatch", "log_every", "checkpoint_every", "divergence", "preview_every",
    "preview_samples", "wandb",
})  # fmt: skip
"""Fields of an experiment that say how it is carried out: a run may go on with other values of them."""


class Result(NamedTuple):
    """What a run ends with: the teacher without guidance, and its student."""

    teacher: Net
    student: Net


class Opened(NamedTuple):
    """A finished run read back."""

    experiment: Experiment
    data: Data
    teacher: Net
    student: Net

    def guided_teacher(self, guidance: float | None = None) -> tuple[Net, str]:
        """The teacher as the student's method sees it, and what its name ends with, ", w = 2" with guidance.

        guidance: the scale for students that take one; by default that with which they are sampled.
        """
        experiment, none = self.experiment, self.data.none
        usual = sampling_of(experiment.method(experiment.process)).guidance
        w = experiment.guidance if usual is None else usual if guidance is None else guidance
        return (self.teacher, "") if w == 1 or none is None else (guided(self.teacher, w, none), f", w = {w:g}")


def load_experiment(path: Path | str, overrides: Sequence[str] = (), *, prog: str | None = None) -> Experiment:
    """Execute an experiment's file, call its `experiment()` and apply the flags `overrides` (`ddistill.overrides`).

    The file stands alone: a copy of it in the run's folder must give the same experiment. prog: the command
    that --help, and the message for a value of another type, name; with both the process exits. Raises
    FileNotFoundError for no file, ValueError where it cannot be executed or gives no Experiment, or for an unknown
    flag.
    """
    path = storage.folder(path)
    how = "an experiment is a Python file with `def experiment() -> Experiment`"
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; {how}")
    name = f"ddistill_experiment_{path.stem}"
    if storage.remote(path):  # Python imports files on disk
        with tempfile.TemporaryDirectory() as here:
            copy = Path(here) / path.name
            copy.write_bytes(path.read_bytes())
            return load_experiment(copy, overrides, prog=prog or f"ddistill distill {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file (.py); {how}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file look their module up
    try:
        spec.loader.exec_module(module)
        experiment = module.experiment() if callable(getattr(module, "experiment", None)) else None
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_file(frame.filename, path)]
        at = (frames[-1].lineno, frames[-1].line) if frames else (None, None)
        said = str(error)
        if isinstance(error, SyntaxError) and _is_file(error.filename or "", path):
            at, said = (error.lineno, (error.text or "").strip()), error.msg
        where, text = (f", line {at[0]}" if at[0] else "", f" (in: {at[1]})" if at[1] else "")
        raise ValueError(f"{path}{where}: {type(error).__name__}: {said}{text}") from error
    if experiment is None:
        raise ValueError(f"{path} has no function `experiment` that answers something; {how}")
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment() of {path} answered {type(experiment).__name__}; {how}")
    return resolved(override(experiment, overrides, prog=prog or f"ddistill distill {path}"))


def _is_file(name: str, path: Path) -> bool:
    return bool(name) and Path(name).absolute() == path.absolute()  # what Python runs has an absolute name


def stages(experiment: Experiment, data: Data, log: Log | None = None) -> list[Stage]:
    """The stages of an experiment: "teacher", denoising on the data, and those of the method on that teacher.

    An imported teacher has no stage. The method's losses, and teacher pairs where it asks for them and the data has
    none, see the guided teacher. log: told while such pairs are made. Raises ValueError for guidance of a teacher
    without classes.
    """
    first = [] if isinstance(experiment.network, Imported) else [teacher_stage(experiment, data)]
    return [*first, *student_stages(experiment, data, log)]


def teacher_stage(experiment: Experiment, data: Data) -> Stage:
    """The stage that trains the teacher."""
    e = experiment
    return Stage(
        "teacher", e.teacher.method(e.process), e.teacher.steps,
        source=lambda _: data.source(e.batch_size, e.seed, e.teacher.unlabelled),
        optimizer=e.teacher.optimizer.build, accumulate=e.accumulate,
    )  # fmt: skip


def student_stages(experiment: Experiment, data: Data, log: Log | None = None) -> list[Stage]:
    """The stages that distil the teacher; log: as for `stages`."""
    e, told = experiment, log or Silent()
    if e.guidance != 1 and data.none is None:
        raise ValueError(f"guidance = {e.guidance} needs classes, and the data has none: leave guidance at 1")

    def guide(teacher: Net) -> Net:
        return teacher if e.guidance == 1 else guided(teacher, e.guidance, data.none)

    def place() -> Place:
        return Place(sharding.make_mesh(e.fsdp, e.tensor), sharding.rule_of(e.layout))

    def from_pairs(teacher: Net, process: Process, wanted: Pairs, number: int) -> Source:
        key = jax.random.fold_in(jax.random.key(e.seed), number)
        if not wanted.count:
            batches, at = data.source(e.batch_size, e.seed, 0.0), place()
            return fresh_pairs(
                teacher, process, key, batches, at.devices, rule=at.rule, steps=wanted.steps,
                integrator=wanted.integrator,
            )  # fmt: skip
        if number == 0 and data.pairs is not None:
            data.pairs.check_fits(process, data.shape, data.num_classes, wanted.points)
            return data.pairs.source(e.batch_size, e.seed, part=(jax.process_index(), jax.process_count()))
        if number == 0 and "noise" in data.arrays:
            return data.source(e.batch_size, e.seed, 0.0)
        if data.null is not None:
            raise ValueError("pairs for conditions that are no labels are made batch by batch: set count to 0")
        arrays = teacher_pairs(
            teacher, process, key, wanted.count, data.shape, steps=wanted.steps, integrator=wanted.integrator,
            points=wanted.points, num_classes=data.num_classes, place=place(),
            report=lambda done, of: told.waits(f"making {of:,} teacher pairs: {done:,}"),
        )  # fmt: skip
        return dataclasses.replace(data, arrays=arrays, items=None).source(e.batch_size, e.seed, 0.0)

    return stages_of(
        e.method(e.process), e.process, e.steps,
        data=lambda: data.source(e.batch_size, e.seed, 0.0), pairs=from_pairs,
        optimizer=e.optimizer.build, guide=guide, accumulate=e.accumulate, space=data.space, place=place,
    )  # fmt: skip


def distil(
    experiment: Experiment,
    workdir: Path | str | None = None,
    log: Log | None = None,
    *,
    source: Path | str | None = None,
    overrides: Sequence[str] = (),
    teacher_from: Path | str | None = None,
    stop: Stop | None = None,
    profile: range | None = None,
) -> Result:
    """Train the teacher and distil it; with a workdir, go on where an earlier call in the same folder stopped.

    log: by default metrics in the workdir and a progress bar, or nothing without a workdir. source, overrides: the file
    and flags that the experiment came from, kept in the workdir so that `open_run` can rebuild it. teacher_from: a run
    whose teacher is copied into the workdir, in place of training the same once more; its student need not be trained.
    stop: asked after each step; where it says so the step is saved and Stopped raised. profile: the steps of each stage
    of which a profiler's trace is written to the workdir's profile/.
    workdir: a folder that all processes of the run share, on disk or in a bucket (gs://, s3://).
    Raises ValueError where the workdir holds another experiment or unrelated files, or the teacher is another one or
    unfinished, OSError where it cannot be written, hosts.Busy where another command trains in it.
    """
    experiment = resolved(experiment)
    data = loaded(experiment.data)
    # What can be refused is refused before the folder becomes this experiment's.
    stages(experiment, data)
    check_batch(experiment, sharding.make_mesh(experiment.fsdp, experiment.tensor))
    if data.arrays or data.items is not None:
        data.source(experiment.batch_size, experiment.seed, experiment.teacher.unlabelled)
    if workdir is None:
        if teacher_from is not None:
            raise ValueError("a teacher is taken from another run into a workdir: give one")
        return _run(experiment, data, stages(experiment, data, log), None, log, stop, profile)
    workdir = storage.folder(workdir)
    taken = None if teacher_from is None else storage.folder(teacher_from)
    if taken is not None:
        hosts.done_by_first(lambda: _check_teacher(experiment, taken, workdir))
    with ExitStack() as held:
        _claim(workdir, experiment, None if source is None else Path(source), overrides, held)
        if taken is not None:
            hosts.done_by_first(lambda: _take_teacher(experiment, taken, workdir))
        if log is None:
            buffered = storage.remote(workdir) and hosts.first()
            folder = held.enter_context(storage.mirrored(workdir)) if buffered else workdir
            log = held.enter_context(_log_of(experiment, folder))
        return _run(experiment, data, stages(experiment, data, log), workdir, log, stop, profile)


def open_run(workdir: Path | str, experiment: Experiment | None = None) -> Opened:
    """Read a finished run back without training; its experiment has a mesh of the devices that are here.

    experiment: needed only where the run was started from Python without an experiment file. Raises FileNotFoundError
    where the folder is no run, CheckpointError where the run is unfinished, ValueError where the experiment it was made
    with is no longer what its file gives (as after an update that changed a default; fields that it added or took away
    are not asked for).
    """
    workdir = storage.folder(workdir)
    record = _record(workdir)
    if record is None:
        what = "does not exist"
        if workdir.exists():
            what = f"is {'not' if workdir.is_dir() else 'a file, not'} the folder of a run (it has no experiment.json)"
        raise FileNotFoundError(
            f"{workdir} {what}: give a folder that `ddistill distill --workdir` or quickstart wrote"
        )
    if experiment is None:
        if not (workdir / "experiment.py").is_file():
            raise FileNotFoundError(
                f"{workdir} has no experiment.py: its run was started from Python, pass the experiment to open_run"
            )
        experiment = load_experiment(workdir / "experiment.py", record["overrides"])
    experiment = resolved(experiment)
    lines = differences(_what(record["experiment"]), _what(describe(experiment)), absent=False)
    if lines:
        raise ValueError(
            f"{workdir} was made by ddistill {record['version']} with other values: {'; '.join(lines[:8])}. "
            "Set them in its experiment.py"
        )
    data = loaded(experiment.data)
    plan = stages(experiment, data)
    for stage in plan:
        folder = workdir / "checkpoints" / stage.name
        done = _steps_done(folder)
        if done < stage.steps:
            raise CheckpointError(
                f"the run in {workdir} is unfinished: {done} of {stage.steps} steps of stage {stage.name!r} are saved. "
                "Start it again with the same command to finish it"
            )
    fitting = _fitting(experiment)
    nets = _run(fitting, data, plan, workdir, None, None, None)
    place = place_of(fitting)
    return Opened(fitting, data, *(laid_out(net, place) for net in nets))


def place_of(experiment: Experiment) -> Place | None:
    """Where an experiment's networks lie, on all devices; None where there is one device."""
    mesh = sharding.make_mesh(experiment.fsdp, experiment.tensor)
    return Place(mesh, sharding.rule_of(experiment.layout)) if mesh.size > 1 else None


def read_metrics(workdir: Path | str) -> dict[str, list[dict[str, float]]]:
    """The rows of metrics.jsonl by stage, each with its "step", in rising order.

    Where a stage goes back to an earlier step, after a kill or a rollback, what it had told from there on is left out.
    """
    stages: dict[str, list[dict[str, float]]] = {}
    with (storage.folder(workdir) / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off when the run was killed
                continue
            if "spent" not in row:
                rows = stages.setdefault(row.pop("stage"), [])
                while rows and rows[-1]["step"] >= row["step"]:
                    rows.pop()
                rows.append(row)
    return stages


def _run(
    experiment: Experiment,
    data: Data,
    plan: list[Stage],
    workdir: Path | None,
    log: Log | None,
    stop: Stop | None,
    profile: range | None,
) -> Result:
    key = jax.random.key(experiment.seed)
    mesh, rule = sharding.make_mesh(experiment.fsdp, experiment.tensor), sharding.rule_of(experiment.layout)
    architecture, at = experiment.network, jax.random.fold_in(key, 0)
    if isinstance(architecture, Imported):
        network = architecture.build(data, experiment.process, at, mesh, rule)
    elif mesh.size == 1:
        network = architecture.build(data, experiment.process, at)
    else:
        network = sharding.created(
            mesh, lambda at: architecture.build(data, experiment.process, at), at, rule=rule
        )  # fmt: skip
    try:
        looks = _looks(experiment, data, plan, mesh, rule, log)
        results = run(
            plan, network, jax.random.fold_in(key, 1),
            mesh=mesh, rule=rule, log=log, workdir=workdir,
            log_every=experiment.log_every, checkpoint_every=experiment.checkpoint_every,
            steps_per_dispatch=experiment.steps_per_dispatch, divergence=experiment.divergence, profile=profile,
            stop=stop, preview_every=experiment.preview_every, looks=looks,
        )  # fmt: skip
    finally:
        if log is not None and data.items is not None and (skipped := data.items.told()):
            log.note(skipped)
    return Result(network if isinstance(architecture, Imported) else results[0], results[-1])


def _log_of(experiment: Experiment, folder: Path) -> RunLog:
    return RunLog(folder, wandb=experiment.wandb, name=experiment.name)


def _looks(
    experiment: Experiment, data: Data, plan: list[Stage], mesh: jax.sharding.Mesh, rule: sharding.Rule, log: Log | None
) -> dict[str, Look] | None:
    """What shows the networks to the log while they train."""
    e = experiment
    if log is None or not e.preview_every:
        return None
    return looks_of(data, e.process, plan, mesh, log, e.preview_samples, e.batch_size, e.seed, rule)


def _claim(
    workdir: Path, experiment: Experiment, source: Path | None, overrides: Sequence[str], held: ExitStack
) -> None:
    """Make the folder this experiment's, or raise, in all processes, if it is something else's.

    On a disk process 0 keeps other commands out of it until `held` is closed, and takes over what another experiment
    has claimed and saved nothing in; buckets have no locks.
    """
    now = describe(experiment)
    text = json.dumps({"version": version(), "overrides": list(overrides), "experiment": now}, indent=2) + "\n"

    def write() -> None:
        try:
            if storage.remote(workdir):
                storage.retried(lambda: storage.names(workdir), f"reach {workdir}", tell=_say)
            workdir.mkdir(parents=True, exist_ok=True)
            if new := _record(workdir) is None:
                others = [name for name in storage.names(workdir) if not name.startswith(".")]
                if others and "experiment.json" not in others:  # which another start may have written just now
                    raise ValueError(
                        f"{workdir} is not empty and is not the folder of a run: it holds {', '.join(others[:5])}"
                        f"{', …' * (len(others) > 5)}. Give a new or an empty folder"
                    )
            alone = not storage.remote(workdir) and held.enter_context(hosts.alone_in(workdir, _say))
            if new:
                storage.put(workdir / "experiment.json", text.encode(), new=True)
            elif alone and _is_untrained(workdir) and _differs(workdir, now):
                _say(f"{workdir} held another experiment, of which nothing was saved: it is this one's now")
                (workdir / "experiment.py").unlink(missing_ok=True)
                storage.put(workdir / "experiment.json", text.encode())
            _check_same(workdir, now)
            storage.put(workdir / "experiment.json", text.encode())
            if source is not None and source.resolve() != Path(workdir / "experiment.py").resolve():
                storage.put(workdir / "experiment.py", source.read_bytes())
        except OSError as error:
            raise OSError(
                f"cannot write to the work folder {workdir}: {error.strerror or error}. Give one where you may write"
            ) from error

    hosts.done_by_first(write)
    if jax.process_count() > 1:
        hosts.checked_by_all(lambda: _check_same(workdir, now))


def _check_teacher(experiment: Experiment, run: Path, workdir: Path) -> None:
    """Raise unless a run has trained the teacher that the experiment would train, or the workdir has it already."""
    if seals.is_sealed(_taught(experiment, workdir)):
        return
    if isinstance(experiment.network, Imported):
        raise ValueError(f"the teacher is imported from {experiment.network.folder}: none is to be taken from {run}")
    record = _record(run)
    if record is None:
        raise FileNotFoundError(f"{run} is not the folder of a run (it has no experiment.json): no teacher is there")
    if lines := teacher_differences(record["experiment"], describe(experiment)):
        raise ValueError(
            f"the teacher in {run} is not the one of this experiment, which differs in {'; '.join(lines[:8])}"
            f"{f' and {len(lines) - 8} more' * (len(lines) > 8)}. Give the experiment the values of {run}"
        )
    last = _taught(experiment, run)
    if not seals.is_sealed(last):
        raise CheckpointError(f"the teacher of {run} is unfinished: there is no {last}. Finish that run first")
    if damage := seals.damage(last, 0, 1):
        raise CheckpointError(f"the teacher of {run} is damaged: {damage}. Take it from another run")


def _take_teacher(experiment: Experiment, run: Path, workdir: Path) -> None:
    """Copy a run's trained teacher into a workdir that has none."""
    if not seals.is_sealed(here := _taught(experiment, workdir)):
        seals.copy(_taught(experiment, run), here)


def _taught(experiment: Experiment, run: Path) -> Path:
    return run / "checkpoints" / "teacher" / str(experiment.teacher.steps)


def teacher_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What makes the teachers of two described experiments different ones."""
    return differences(what_teaches(before), what_teaches(after))


def what_teaches(described: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the teacher of a described experiment: pairs beside its data do not."""
    names = ("data", "process", "network", "teacher", "batch_size", "accumulate", "seed")
    made = {name: described.get(name) for name in names}
    data = made["data"]
    if isinstance(data, dict) and data.get("type") == describe(PairsData):
        made["data"] = data["data"]
    return made


def _what(described: dict[str, Any]) -> dict[str, Any]:
    """What a described experiment is, without how it is carried out."""
    return {name: value for name, value in described.items() if name not in HOW}


def check_batch(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError unless the batch splits into `accumulate` parts over the mesh."""
    over = sharding.batch_parts(mesh)
    parts = over * experiment.accumulate
    if experiment.batch_size % parts:
        raise ValueError(
            f"batch_size = {experiment.batch_size} does not split into {experiment.accumulate} parts (accumulate) over "
            f"{over} devices: take a multiple of {parts}"
        )


def _fitting(experiment: Experiment) -> Experiment:
    """The experiment on the devices that are here, which may be others than those it was trained on."""
    if jax.device_count() % (experiment.fsdp * experiment.tensor) == 0:
        return experiment
    return dataclasses.replace(experiment, fsdp=jax.device_count(), tensor=1, layout={})


def _is_untrained(workdir: Path) -> bool:
    """Whether a folder on disk has neither a checkpoint of any stage nor a row of metrics."""
    metrics = workdir / "metrics.jsonl"
    return not any(workdir.glob("checkpoints/*/*")) and not (metrics.is_file() and metrics.stat().st_size)


def _differs(workdir: Path, now: Any) -> list[str]:
    """What this experiment differs in from that of a folder. Raises ValueError where the folder has none."""
    record = _record(workdir)
    if record is None:
        raise ValueError(
            f"process {jax.process_index()} does not see in {workdir} what process 0 wrote there: give a folder that "
            "all hosts share, or one in a bucket"
        )
    return differences(_what(record["experiment"]), _what(now))


def _check_same(workdir: Path, now: Any) -> None:
    """Raise ValueError unless the folder is that of a run of this experiment."""
    if lines := _differs(workdir, now):
        raise ValueError(
            f"{workdir} holds another experiment, which differs in {'; '.join(lines[:8])}"
            f"{f' and {len(lines) - 8} more' * (len(lines) > 8)}. Start this one in a new folder, or repeat the "
            "command that made this folder to resume it"
        )


def _record(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "experiment.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("version", "overrides", "experiment")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): it is no record of a run. Start again in a new folder"
        ) from error


def _steps_done(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest() or 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
