"""Runs as parts of a report: what their folders tell, and samples drawn from those that are finished."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddistill import grids
from ddistill.cli.networks import conditions_for
from ddistill.cli.report_judged import Judged, digest, evaluations, titles
from ddistill.cli.study import decoder, models_of, on_latents
from ddistill.config import Data
from ddistill.data.loading import released
from ddistill.evaluate.real import images_of
from ddistill.evaluate.samplers import start, student_sampler, teacher_sampler
from ddistill.integrators import dpmpp_2m, heun
from ddistill.methods.base import home, sampling_of
from ddistill.net import Scaled
from ddistill.report.embed import thumbnails
from ddistill.report.measures import is_student, table
from ddistill.report.motion import motion, student_path, teacher_path
from ddistill.report.page import Drawn, Group, Motion, Sheet
from ddistill.runs import Opened, read_metrics, what_teaches
from ddistill.sample import matched_noise

_USUAL = 18  # steps of Heun's method: 35 calls, the teacher's usual cost
_PATHS = 160


@dataclass(frozen=True)
class Found:
    """What a run's folder tells without its networks.

    data, teacher: digests, equal where runs have the same of it. judged: evaluations found in the folder. words: on
    those that were left out.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    overrides: Sequence[str]
    version: str
    data: str
    teacher: str
    judged: Sequence[Judged] = ()
    words: str = ""
    curves: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """Samples of a run's student, of its teacher and of the data they learned, and words on them."""

    drawn: Sequence[Drawn] = ()
    motions: Sequence[Motion] = ()
    words: str = ""


def find(paths: Sequence[Path]) -> tuple[list[Found], dict[str, str]]:
    """Runs at the paths, each a run's folder or a folder of such, and what was none with the reason."""
    folders: dict[Path, None] = {}
    failed: dict[str, str] = {}
    for path in paths:
        inside = (
            [path] if (path / "experiment.json").is_file() else sorted(p.parent for p in path.glob("*/experiment.json"))
        )
        if not inside:
            what = "is no run and holds none (no experiment.json)" if path.is_dir() else "does not exist"
            what = "is a file, not the folder of a run" if path.is_file() else what
            failed[str(path)] = what
        folders |= dict.fromkeys(inside)
    found = []
    for folder, name in zip(folders, _names(list(folders)), strict=True):
        try:
            found.append(_read(folder, name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            failed[str(folder)] = f"its experiment.json or metrics cannot be read: {error}"
    return found, failed


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, 1 + max((len(f.parts) for f in folders), default=1)):
        names = [str(Path(*folder.parts[-depth:])) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names if folders else []


def _read(folder: Path, name: str) -> Found:
    record = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    config = record["experiment"]
    teaches = what_teaches(config)
    return Found(
        name, folder, config, record["overrides"], record["version"],
        digest([teaches["data"], teaches["process"]]), digest(teaches), *evaluations(folder), _curves(folder),
    )  # fmt: skip


def _curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Curves of training: the teacher's own, and the method's stages after each other."""
    if not (folder / "metrics.jsonl").is_file():
        return {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    done = 0.0
    for stage, rows in read_metrics(folder).items():
        part, first = ("teacher", 0.0) if stage == "teacher" else ("distillation", done)
        for row in rows:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    steps, values = curves.setdefault(f"{part}: {key}", ([], []))
                    steps.append(first + row["step"])
                    values.append(value)
        if part == "distillation" and rows:
            done += rows[-1]["step"]
    return curves


def facts_of(run: Found) -> dict[str, str]:
    """What is said of a run in a line."""
    config = run.config
    method, network = (str(config.get(k, {}).get("type", "?")).rpartition(".")[2] for k in ("method", "network"))
    facts = {"method": method, "network": network, "steps": f"{config.get('steps', 0):,}"}
    return {**facts, "seed": str(config.get("seed")), "ddistill": run.version, "folder": str(run.folder)}


def drawn_of(
    opened: Opened,
    steps: Sequence[int],
    count: int,
    seed: int,
    models: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> Shown:
    """Samples of a finished run from the noise of the seed: its student, its teacher at the same and its usual cost.

    Data in two dimensions has paths too; of other flat data the two main directions are shown, and of what is neither
    flat nor, when it is decoded, an image nothing. models: decodes latents in place of the run's own. prompts: those of
    the samples in turn, where conditions are prompts; by default the data's. Raises what `models_of`, `decoder` and
    `prompt_conditions` raise.
    """
    experiment, process = opened.experiment, opened.experiment.process
    folder = models_of(opened, models if on_latents(experiment) else None)  # others of the page may be pictures
    data = dataclasses.replace(opened.data, to_unit=decoder(opened, folder))
    flat = len(data.shape) == 1 and data.shape[0] > 1
    shape = data.shape if flat else data.to_unit(np.zeros((1, *data.shape), np.float32)).shape[1:]
    images = len(shape) == 3 and shape[2] in (1, 3)
    if not images and not flat:
        return Shown(words=f"Samples of shape {list(data.shape)} are no pictures.")
    n = count if images else 12 * count
    noise, cond, key = start(process, data.shape, data.num_classes, n, seed)
    words = []
    if data.null is not None:
        with released(conditions_for(data, prompts, folder or models, n, seed, shape[0])) as conditions:
            cond = conditions(0)
        words = [
            "Samples are of prompts of the data." if prompts is None else "Samples are of the given prompts in turn."
        ]
    real, view, told = _pictures(data, n, seed) if images else _points(data, n)
    made = experiment.method(process)
    net, suffix = opened.guided_teacher()
    sheets, teacher = {}, {}
    for calls in steps:
        few = teacher_sampler(net, process, dpmpp_2m, calls, "teacher")
        teacher[calls] = Sheet(view(few.draw(noise, cond, key).x))
        try:
            sampler = student_sampler(opened.student, made, process, calls)
        except ValueError:  # a number of steps that the method does not serve
            continue
        sheets[calls] = Sheet(view(sampler.draw(noise, cond, key).x))
    usual = teacher_sampler(net, process, heun, _USUAL, "teacher").draw(noise, cond, key)
    motions: list[Motion] = []
    if data.shape == (2,):
        some = jax.tree.map(lambda leaf: leaf[:_PATHS], cond)
        motions = _motions(opened, noise[:_PATHS], some, key, max(sheets, default=0))
    return Shown(
        [
            *([] if real is None else [Drawn("data", "reference", {0: Sheet(real)})]),
            Drawn(f"teacher, Heun{suffix}", "teacher", {int(usual.nfe): Sheet(view(usual.x))}),
            Drawn(f"teacher, DPM-Solver++(2M){suffix}", "teacher", teacher),
            Drawn("student", "student", sheets),
        ],
        motions,
        " ".join(filter(None, [*words, told])),
    )


def _pictures(data: Data, n: int, seed: int) -> tuple[np.ndarray | None, Callable[[Any], np.ndarray], str]:
    """Images of the data, how samples become images, and words on it."""

    def view(x: Any) -> np.ndarray:
        return thumbnails(data.to_unit(np.asarray(x)))

    if "x" not in data.arrays and data.items is None:
        return None, view, ""
    if data.null is not None:
        return view(data.first(n, seed)["x"]), view, ""  # of the prompts that samples are of
    images = images_of(data, "the data")
    batches = images.batches(n, _in_turn(images.labels, data.num_classes, len(images), n))
    return next((thumbnails(x) for _, x in batches), None), view, ""


def _points(data: Data, n: int) -> tuple[np.ndarray | None, Callable[[Any], np.ndarray], str]:
    """The same of flat data: points."""
    some = max(n, 4096)
    x = None if data.arrays.get("x") is None else np.asarray(data.arrays["x"][:some], np.float32)
    middle, axes = np.zeros(data.shape, np.float32), np.eye(data.shape[0], 2, dtype=np.float32)
    words = "" if data.shape == (2,) else f"The first two of {data.shape[0]} coordinates."
    if x is not None and words:
        middle = x.mean(0)
        axes = np.linalg.svd(x - middle, full_matrices=False)[2][:2].T
        words = f"The two main directions of {data.shape[0]} dimensions."

    def view(x: Any) -> np.ndarray:
        return (np.asarray(x) - middle) @ axes

    if x is None:
        return None, view, words
    labels = data.arrays.get("cond")
    turn = _in_turn(None if labels is None else labels[:some], data.num_classes, len(x), n)
    return view(x[turn]), view, words


def _in_turn(labels: np.ndarray | None, num_classes: int, of: int, n: int) -> list[int]:
    """The first of so many examples, of classes in turn where there are classes, as the samples are."""
    of_class = [np.flatnonzero(np.asarray(labels) == c) for c in range(num_classes if labels is not None else 0)]
    if not of_class or any(not len(at) for at in of_class):
        return list(range(min(n, of)))
    turns = [(of_class[i % num_classes], i // num_classes) for i in range(n)]
    return [int(at[turn % len(at)]) for at, turn in turns]


def _motions(opened: Opened, noise, labels, key, steps: int) -> list[Motion]:
    process, made = opened.experiment.process, opened.experiment.method(opened.experiment.process)
    x, spread = opened.data.arrays.get("x"), 0.5
    if x is not None:
        spread = float(np.sqrt(np.mean(np.asarray(x[:4096], np.float64) ** 2)))
    grid = grids.karras(process, _USUAL)
    teacher, suffix = opened.guided_teacher()
    states = teacher_path(teacher.bind(labels), process, grid, noise)
    motions = [motion(f"teacher, Heun{suffix}", "teacher", process, grid, states, spread)]
    if steps:
        own, sampling = home(made, process), sampling_of(made)
        times = sampling.times(steps)
        cond = labels if sampling.guidance is None else Scaled(labels, jnp.full(len(noise), sampling.guidance))
        begin = matched_noise(noise, process, own)
        states = student_path(opened.student, own, times, begin, key, gamma=sampling.gamma, cond=cond)
        motions.append(motion("student", "student", own, times, states, spread))
    return motions


def groups_of(found: Sequence[Found], shown: Mapping[str, Shown]) -> list[Group]:
    """Runs by the data they learned; teachers that are the same are shown once, others by the names of their runs."""
    groups = []
    for data in dict.fromkeys(run.data for run in found):
        runs = [run for run in found if run.data == data]
        owners = {
            teacher: [r.name for r in runs if r.teacher == teacher]
            for teacher in dict.fromkeys(r.teacher for r in runs)
        }
        several = len(owners) > 1

        def of(teacher: str, label: str, owners=owners, several=several) -> str:
            return (
                f"{label} of {', '.join(owners[teacher][:2])}{' …' * (len(owners[teacher]) > 2)}" if several else label
            )

        named: dict[str, list[tuple[str | None, Mapping[str, Any]]]] = {}
        ways: dict[str, Mapping[str, Any]] = {}
        for run in runs:
            for judged in run.judged:
                ways[judged.key] = judged.made
                named.setdefault(judged.key, []).extend(
                    (run.name, row) if is_student(row) else (None, {**row, "sampler": of(run.teacher, row["sampler"])})
                    for row in judged.rows
                )
        there = [(run, shown[run.name]) for run in runs if run.name in shown]
        drawn = [(run, d) for run, s in there for d in s.drawn]
        references = [d for _, d in drawn if d.kind == "reference"][:1]
        teachers = {of(run.teacher, d.label): d for run, d in drawn if d.kind == "teacher"}
        students = {run.name: d for run, d in drawn if d.kind == "student" and d.sheets}
        labelled = [dataclasses.replace(d, label=label) for label, d in {**teachers, **students}.items()]
        paths = {(of(r.teacher, m.label) if m.kind == "teacher" else r.name): m for r, s in there for m in s.motions}
        words = "" if named else (
            "No results in the runs' folders: ddistill evaluate RUN --json RUN/evaluate.json adds a table and plots."
        )  # fmt: skip
        said = [words, *(run.words for run in runs), *(s.words for _, s in there)]
        groups.append(Group(
            str(runs[0].config["data"].get("type", "data")).rpartition(".")[2].removesuffix("Data").lower(),
            [table(named[key], title) for key, title in zip(ways, titles(list(ways.values())), strict=True)],
            [*references, *labelled],
            [dataclasses.replace(m, label=label) for label, m in paths.items()],
            words=" ".join(dict.fromkeys(filter(None, said))),
        ))  # fmt: skip
    return groups
