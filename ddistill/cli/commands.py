"""What the commands do."""

import json
import math
import shlex
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ddistill import hosts, integrators, sharding, storage
from ddistill import quickstart as quickstart_experiment
from ddistill.cli import (
    Bench,
    Command,
    Compare,
    Distill,
    Encode,
    Evaluate,
    Export,
    Import,
    Invert,
    Methods,
    Pairs,
    Plan,
    Quickstart,
    Report,
    Sample,
    Serve,
)
from ddistill.cli.evaluate import by_pixels, digits_of, evaluate, judge_digits, samplers_of
from ddistill.cli.output import at_least, cell, check_folder, say, screen, write_json
from ddistill.cli.rows import write_copies
from ddistill.config import Imported
from ddistill.data.pair_store import open_pairs, write_pairs
from ddistill.dry_run import DryRun, dry_run
from ddistill.evaluate import digits as judged
from ddistill.evaluate.inversion import Inverter, student_inverter, teacher_inverter
from ddistill.evaluate.samplers import across, start, student_sampler, teacher_sampler
from ddistill.integrators import dpmpp_2m
from ddistill.lora import low_rank
from ddistill.methods import METHODS
from ddistill.methods.base import home, rounds, sampling_of
from ddistill.process import Process
from ddistill.report import image_grid, save_loss_plot, save_sample_sheet, trade_off
from ddistill.runs import Opened, distil, load_experiment, open_run, place_of, read_metrics, student_stages
from ddistill.signals import Stop

Row = dict[str, Any]


def run(command: Command, flags: Sequence[str], stop: Stop) -> None:
    """Carry a command out; flags are those that belong to its experiment, stop asks its training to stop."""
    match command:
        case Quickstart():
            quickstart(command, flags, stop)
        case Import():
            import_(command)
        case Distill():
            distill(command, flags, stop)
        case Plan():
            from ddistill.cli.plan import plan

            plan(command, flags)
        case Pairs():
            pairs(command)
        case Encode():
            encode(command)
        case Sample():
            sample(command)
        case Serve():
            from ddistill.cli.serve import serve

            serve(command)
        case Invert():
            invert(command)
        case Export():
            export(command)
        case Evaluate():
            evaluate(command)
        case Compare():
            compare(command, stop)
        case Report():
            from ddistill.cli.report import report

            report(command)
        case Methods():
            methods()
        case Bench():
            bench(command)


def quickstart(command: Quickstart, flags: Sequence[str], stop: Stop) -> None:
    """Train, distil, judge; samples.png, metrics.json and loss.png go into the run's folder."""
    if "--workdir" in flags:
        raise ValueError(f"quickstart takes the folder of its run as --out, {command.out} by default: not --workdir")
    source = Path(quickstart_experiment.__file__)
    overrides = [*flags, "--seed", str(command.seed)]
    experiment = load_experiment(source, overrides, prog="ddistill quickstart")
    out = command.out
    say(f"Training a teacher on scanned digits and distilling it, in {out}/")
    distil(experiment, out, source=source, overrides=overrides, stop=stop)
    opened = open_run(out)
    digits = digits_of(opened)
    plan = samplers_of(opened, (1, 2, 4))
    judge_digits(digits, opened, plan, out, json=out / "metrics.json")
    sheet = judged.sheet(digits, opened.experiment.process, plan)
    if not hosts.first():
        return
    save_sample_sheet(out / "samples.png", sheet)
    curves = {}
    for stage, rows in read_metrics(out).items():
        curves[stage] = ([row["step"] for row in rows], [row["student/loss"] for row in rows])
    save_loss_plot(out / "loss.png", curves)
    say(f"Wrote {out}/samples.png, metrics.json, loss.png. More samples: ddistill sample {out} --out more.png")


def import_(command: Import) -> None:
    """Copy a pipeline as a teacher."""
    from ddistill.hub.teachers import import_teacher

    made = import_teacher(command.source, command.to, command.variant, command.revision, command.original)
    where, output = type(made.process.schedule).__name__, type(made.precondition).__name__.removesuffix("Precondition")
    say(f"{made.name} of {made.parameters:,} parameters, {where}, {output}, in {command.to}: network=Imported(folder)")
    for note in (*made.notes, *_unused(command.to)):
        say(f"Note: {note}")


def _unused(folder: Path) -> tuple[str, ...]:
    """What of a pipeline `ddistill encode` cannot use, in words."""
    from ddistill.hub.autoencoders import CLASSES
    from ddistill.hub.configs import read_json
    from ddistill.hub.tokenizer import no_tokenizer
    from ddistill.prompts import FAMILIES

    notes = []
    vae, index = folder / "vae" / "config.json", folder / "model_index.json"
    if vae.is_file() and (name := read_json(vae, "an autoencoder").get("_class_name")) not in CLASSES:
        notes.append(f"its autoencoder is {name}, for which there is no network: latents have to come from elsewhere")
    if index.is_file() and any(folder.glob("text_encoder*")):
        family = read_json(index, "the index of a pipeline").get("_class_name")
        if family not in FAMILIES:
            notes.append(f"prompts of a {family} cannot be encoded: conditions have to come from elsewhere")
    for tokenizer in sorted(folder.glob("tokenizer*")):
        if (tokenizer / "spiece.model").is_file() and not (tokenizer / "tokenizer.json").is_file():
            notes.append(no_tokenizer(tokenizer))
    return tuple(notes)


def distill(command: Distill, flags: Sequence[str], stop: Stop) -> None:
    """Train an experiment in its work folder."""
    profile = None if command.profile is None else _steps(command.profile)
    experiment = load_experiment(command.experiment, flags)
    if command.dry_run:
        if command.teacher_from is not None:
            raise ValueError("--teacher-from is of a training: leave it out with --dry-run")
        return _tell(experiment.name, dry_run(experiment, command.devices))
    if command.devices is not None:
        raise ValueError("--devices is of --dry-run: a run takes the devices that are there")
    workdir = storage.folder(Path("runs") / experiment.name if command.workdir is None else command.workdir)
    check_folder("--workdir", workdir, new=True)
    distil(
        experiment, workdir, source=command.experiment, overrides=flags,
        teacher_from=command.teacher_from, stop=stop, profile=profile,
    )  # fmt: skip
    say(f"Done: ddistill sample {workdir} --out samples.npz keeps what the student draws, samples.png shows pictures")


def _steps(text: str) -> range:
    """The steps of --profile."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"--profile {text}: give two steps, FIRST:END, such as 10:15 for steps 10 to 14, from 0 on")
    return range(int(first), int(end))


def _tell(name: str, done: DryRun) -> None:
    """Print what a run would be."""
    console = screen()
    for note in done.notes:
        console.print(f"Not there: {note}", highlight=False, markup=False)
    tensor = f", tensor = {done.tensor}" if done.tensor > 1 else ""
    for stage in done.stages:
        table = Table(
            "network", "updated", "parameters", "trained", "weights", "optimiser", "gradients",
            title=f"{name}: {stage.name}, {stage.steps:,} steps", title_justify="left", box=SIMPLE_HEAD,
            caption=f"bytes on each of {done.devices} devices, fsdp = {done.fsdp}{tensor}; activations are not counted",
        )  # fmt: skip
        for column in table.columns[2:]:
            column.justify = "right"
        for row in stage.rows:
            turn = {0: "–", 1: "each step"}.get(row.every, f"every {row.every} steps")
            sizes = map(_bytes, (row.weights, row.optimizer, row.gradients))
            table.add_row(row.name, turn, *(f"{n:,}" if n else "–" for n in (row.parameters, row.trained)), *sizes)
        table.add_row("all", "", "", "", _bytes(stage.bytes), "", "")
        console.print(table)
        for part, shapes in stage.batch.items():
            console.print(f"  batch: {part} {shapes}", highlight=False, markup=False)


def _bytes(count: int) -> str:
    return "–" if not count else f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def pairs(command: Pairs) -> None:
    """Store pairs of a run's teacher, in the process of its student."""
    from rich.progress import Progress

    at_least(1, count=command.count, steps=command.steps, shard_size=command.shard_size)
    at_least(0, points=command.points, seed=command.seed)
    check_folder("--out", command.out, new=True)
    opened = open_run(command.run)
    experiment, data = opened.experiment, opened.data
    first = student_stages(experiment, data)[0]
    process = first.method.process or experiment.process
    with Progress(console=Console(stderr=True), disable=not (hosts.first() and sys.stderr.isatty())) as progress:
        bar = progress.add_task("pairs", total=None)
        made = write_pairs(
            command.out, first.enter(first.guide(opened.teacher)), process, jax.random.key(command.seed),
            command.count, data.shape, num_classes=data.num_classes, steps=command.steps, points=command.points,
            integrator=getattr(integrators, command.integrator), shard_size=command.shard_size,
            report=lambda done, total: progress.update(bar, completed=done, total=total), place=place_of(experiment),
        )  # fmt: skip
    store = open_pairs(command.out)
    say(f"{len(store)} pairs in {command.out}, {made} of {len(store.shards)} files made now")


def encode(command: Encode) -> None:
    """Store what the models of a pipeline make of images and prompts."""
    from rich.progress import Progress

    from ddistill.data.loading import told
    from ddistill.datasets import encode_images

    if not command.data.exists():
        raise FileNotFoundError(f"{command.data} does not exist: give a folder of images, tar files, .npy or .npz")
    check_folder("--models", command.models)
    check_folder("--to", command.to, new=True)
    with Progress(console=Console(stderr=True), disable=not (hosts.first() and sys.stderr.isatty())) as progress:
        bar = progress.add_task("encode", total=None)
        done = encode_images(
            command.data, command.to, command.models, command.size, classes=not command.flat, prompts=command.prompts,
            mirrored=command.mirrored, dtype=command.dtype, bfloat16=command.bfloat16, variant=command.variant,
            batch_size=command.batch_size, shard_size=command.shard_size,
            report=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    if words := told(done.skipped):
        say(words)
    say(f"{done.records} images in {command.to}, {done.shards} files made now: data=LatentFolder({str(command.to)!r})")


def sample(command: Sample) -> None:
    """Sample a run into a file."""
    from ddistill.cli.networks import conditions_for, read_prompts
    from ddistill.cli.study import decoder, models_of
    from ddistill.evaluate.seen import all_rows

    if command.out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {command.out}: give a name that ends in .png for a picture or in .npz for arrays")
    at_least(1, n=command.n, steps=command.steps)
    at_least(0, seed=command.seed)
    check_folder("--models", command.models)
    opened = open_run(command.run)
    experiment, data, process = opened.experiment, opened.data, opened.experiment.process
    classes = data.num_classes
    if command.label is not None:
        _check_label("--label", command.label, classes)
    prompts = None if command.prompts is None else read_prompts(command.prompts)
    picture = command.out.suffix == ".png"
    models = models_of(opened, command.models) if picture or prompts is not None else None
    decode = decoder(opened, models)
    noise, labels, key = start(process, data.shape, classes, command.n, command.seed)
    if command.label is not None:
        labels = jnp.full(command.n, command.label)
    cond: Any = labels
    if data.null is not None or prompts is not None:
        side = 0 if prompts is None else decode(np.zeros((1, *data.shape), np.float32)).shape[1]
        here = conditions_for(data, prompts, models, command.n, command.seed, side)(0)
        cond = jax.tree.map(lambda leaf: all_rows(np.asarray(leaf)), here)
    if command.teacher:
        if command.gamma is not None or command.guidance is not None:
            raise ValueError("--gamma and --guidance belong to the student's sampler: leave them out with --teacher")
        sampler = teacher_sampler(opened.guided_teacher()[0], process, dpmpp_2m, command.steps, "teacher")
    else:
        made = experiment.method(process)
        sampler = student_sampler(opened.student, made, process, command.steps, command.gamma, command.guidance)
    x = np.asarray(across(sampler, sharding.make_mesh(experiment.fsdp, experiment.tensor)).draw(noise, cond, key).x)
    if not hosts.first():
        return
    command.out.parent.mkdir(parents=True, exist_ok=True)
    if picture:
        _save_picture(command.out, decode(x))
    elif labels is None:
        np.savez(command.out, x=x)
    else:
        np.savez(command.out, x=x, labels=np.asarray(labels))
    say(f"{command.n} samples in {command.out}")


def invert(command: Invert) -> None:
    """Encode data of a run, decode it, and write both."""
    if command.out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {command.out}: give a name that ends in .png for a picture or in .npz for arrays")
    opened = open_run(command.run)
    data = opened.data
    inverter, process = _inverter(opened, command)
    x, labels = _inputs(opened, command)
    target = None
    if command.to_label is not None:
        _check_label("--to-label", command.to_label, data.num_classes)
        target = jnp.full(len(x), command.to_label)
    noise = inverter.encode(jnp.asarray(x), labels)
    rows = {"x": x, "reconstruction": np.asarray(inverter.decode(noise, labels))}
    if target is not None:
        rows["edit"] = np.asarray(inverter.decode(noise, target))
    command.out.parent.mkdir(parents=True, exist_ok=True)
    if command.out.suffix == ".png":
        _check_picture(x)
        names = {"x": "input", "reconstruction": "decoded", "edit": f"decoded as {command.to_label}"}
        save_sample_sheet(command.out, [(names[name], data.to_unit(row)) for name, row in rows.items()])
    else:
        of = {"labels": labels, "edit_labels": target}
        given = {name: np.asarray(value) for name, value in of.items() if value is not None}
        arrays: dict[str, Any] = {"noise": np.asarray(noise), **rows, **given}
        np.savez(command.out, **arrays)
    miss = float(np.sqrt(np.mean((rows["reconstruction"] - x) ** 2)))
    spread = float(np.sqrt(np.mean(np.asarray(noise) ** 2)) / process.sigma(process.t_max))
    print(
        f"round trip of {len(x)} inputs by the {inverter.name}: root-mean-square {miss:.4g}, "
        f"{miss / float(np.std(x)):.3g} of their standard deviation; the noise has {spread:.3f} of its size"
    )
    say(f"Wrote {command.out}")


def export(command: Export) -> None:
    """Write a run's student for diffusers."""
    from ddistill.hub.save import config_of, export_lora, export_student

    opened = open_run(command.run)
    experiment, student = opened.experiment, opened.student
    made, network = experiment.method(experiment.process), experiment.network
    sampling, process = sampling_of(made), home(made, experiment.process)
    if command.guidance is not None and sampling.guidance is None:
        raise ValueError(
            f"--guidance {command.guidance:g}: this student's guidance is built in; only students of `guidance` or "
            "`lcm` take a scale"
        )
    held = network.guidance if isinstance(network, Imported) else None  # the network still reads it
    guidance = next((w for w in (command.guidance, sampling.guidance, held) if w is not None), None)
    options: dict[str, Any] = {
        "teacher": network.folder if isinstance(network, Imported) else None,
        "guidance": guidance,
        "drop_target": command.drop_target,
        "about": f"{experiment.name}, by {type(experiment.method).__name__}",
    }
    at = process, sampling.times(command.steps), sampling.gamma
    if command.lora is None:
        done = export_student(command.to, student, *at, dtype=command.dtype, **options)
    else:
        config_of(student, options["teacher"])  # what diffusers does not have is told before the decompositions
        update, lost = low_rank(student, opened.teacher, command.lora)
        done = export_lora(command.to, student, update, *at, **options)
        say(f"What rank {command.lora} leaves out of what was learned is {lost:.2g} of it")
    call = ", ".join(f"{name}={value}" for name, value in done.call.items())
    say(f"Wrote {command.to}: {done.scheduler['_class_name']}, {call}; README.md says how to sample")


def compare(command: Compare, stop: Stop) -> None:
    """Compare experiments on digits."""
    from ddistill.compare import compare as compared
    from ddistill.compare import front, markdown

    if not command.experiments:
        raise ValueError("give at least one experiment file, such as experiments/digits_kd.py")
    experiments = [load_experiment(path) for path in command.experiments]
    done = compared(
        experiments, command.steps, workdir=command.workdir, files=command.experiments, say=say, stop=stop
    )  # fmt: skip
    rows = list(done)
    files = " ".join(str(path) for path in command.experiments)
    write_json(command.out.with_suffix(".json"), {"rows": rows})
    for name in (e.name for e in experiments):  # for `ddistill report`
        own = [row for row in rows if row["train_s"] is None or row["sampler"] == name]
        folder = command.workdir / name
        write_copies(folder / "compare.json", None, {"made": by_pixels(folder), "rows": own})
    picture = command.out.with_suffix(".png")
    lines, references = front(rows)
    trade_off(picture, lines, references=references, title="Digits: students of one teacher, over network calls")
    page = markdown(rows, experiments, f"ddistill compare {files} --out {command.out}", picture.name)
    command.out.write_text(page, encoding="utf-8")
    say(f"Wrote {command.out}")


def methods() -> None:
    """Print the table of methods."""
    table = Table("name", "title", "paper", "steps")
    table.add_column("file", min_width=max(len(entry.file) for entry in METHODS.values()))
    for name, entry in METHODS.items():
        table.add_row(name, entry.title, entry.paper, ", ".join(map(str, entry.steps)), entry.file)
    screen().print(table)


def bench(command: Bench) -> None:
    """Run the benchmark with exact teachers."""
    from ddistill.bench.kept import folder_of
    from ddistill.bench.leaderboard import leaderboard
    from ddistill.bench.page import write_page
    from ddistill.mixture import BUNDLED, Mixture

    names = list(METHODS) if command.methods == "all" else [n.strip() for n in command.methods.split(",") if n.strip()]
    unknown = [n for n in names if n not in METHODS]
    if unknown or not names:
        what = f"no method {', '.join(unknown)}" if unknown else "no method is named"
        meant = [name for name in METHODS if name in {n.lower() for n in unknown}]
        what += f", did you mean {', '.join(meant)}?" if meant else ""
        raise ValueError(f"--methods {command.methods!r}: {what}; known are {', '.join(METHODS)}")
    at_least(1, seeds=command.seeds, jobs=command.jobs)
    mixtures = command.mixture or BUNDLED
    for mixture in mixtures:
        Mixture.load(mixture)  # a wrong name is told before the first hour, not after it
    rows = [] if command.json is None else _read_rows(command.json)
    file = command.json or command.page
    keep = None if file is None else folder_of(file)
    console = screen()
    try:
        with Live(_bench_table(mixtures[0], []), console=console, refresh_per_second=2, transient=True) as live:
            for row in leaderboard(names, mixtures, command.seeds, rows[:], command.jobs, keep):
                rows.append(row)
                mixture = row["mixture"]
                live.update(_bench_table(mixture, [r for r in rows if r["mixture"] == mixture]))
                if command.json is not None:
                    write_json(command.json, {"rows": rows})
                if not console.is_terminal:
                    sw2 = cell(row["sw2"], ".4f")
                    say(f"{mixture}: {row['method']}, {row['steps']} steps: sw2 {sw2}, {row['wall_s']:.1f} s")
    finally:
        for mixture in mixtures:
            console.print(_bench_table(mixture, [r for r in rows if r["mixture"] == mixture]))
    if command.page is not None:
        words = ["ddistill", "bench", "exact", "--methods", command.methods, "--seeds", str(command.seeds)]
        words += [word for mixture in command.mixture for word in ("--mixture", mixture)]
        words += [] if command.json is None else ["--json", str(command.json)]
        write_page(command.page, rows, shlex.join([*words, "--page", str(command.page)]), keep, say)
        say(f"Wrote {command.page}")


def _read_rows(path: Path) -> list[Row]:
    """The rows of an earlier call, none if there is no file."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text("utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} is not a file that this command wrote; give another name") from error


def _check_label(flag: str, label: int, classes: int) -> None:
    if not 0 <= label < classes:
        accepted = f"labels are 0 to {classes - 1}" if classes else f"this run has no classes, leave {flag} out"
        raise ValueError(f"{flag} {label} is out of range: {accepted}")


def _inverter(opened: Opened, command: Invert) -> tuple[Inverter, Process]:
    """What encodes and decodes, and the process that its noise belongs to."""
    process, method = opened.experiment.process, opened.experiment.method
    steps = (50 if command.teacher else 4) if command.steps is None else command.steps
    at_least(1, steps=steps)
    if command.teacher:
        return teacher_inverter(opened.teacher, process, steps, integrators.heun), process
    made = method(process)
    last = rounds(made)[-1].method
    if last.inverse is None:
        raise ValueError(
            f"the student in {command.run} only generates: it was distilled by {type(method).__name__}, and only "
            "students of `invertible` encode. Add --teacher to use the run's teacher"
        )
    process = home(made, process)
    return student_inverter(opened.student, process, last.sampling.times(steps)), process


def _inputs(opened: Opened, command: Invert) -> tuple[np.ndarray, np.ndarray | None]:
    """The first n inputs and, where the run has classes, their labels."""
    shape, classes = opened.data.shape, opened.data.num_classes
    at_least(1, n=command.n)
    if command.input == "digits":
        digits = digits_of(opened)
        return digits.held_out_x[: command.n], digits.held_out_labels[: command.n]
    wanted = f"arrays x [N, {', '.join(map(str, shape))}]" + f" and labels [N] from 0 to {classes - 1}" * bool(classes)
    if not zipfile.is_zipfile(command.input):
        what = "is not an .npz file" if Path(command.input).exists() else "does not exist"
        raise ValueError(f"--input {command.input} {what}; give an .npz file with {wanted}, or `digits`")
    with np.load(command.input, allow_pickle=False) as file:
        given = {name: file[name] for name in ("x", "labels") if name in file}
    x, labels = given.get("x"), given.get("labels") if classes else None
    if x is None or not _are_inputs(x, shape) or (classes and not _are_labels(labels, len(x), classes)):
        found = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in given.items()) or "neither"
        if labels is not None and labels.size and np.issubdtype(labels.dtype, np.integer):
            found += f" from {labels.min()} to {labels.max()}"
        raise ValueError(f"--input {command.input}: this run takes {wanted}; the file holds {found}")
    if not np.isfinite(x).all():
        raise ValueError(f"--input {command.input}: x holds NaN or infinity")
    return x[: command.n].astype(np.float32), None if labels is None else labels[: command.n].astype(np.int32)


def _are_inputs(x: np.ndarray, shape: tuple[int, ...]) -> bool:
    return x.ndim > 0 and len(x) > 0 and x.shape[1:] == shape and np.issubdtype(x.dtype, np.floating)


def _are_labels(labels: np.ndarray | None, count: int, classes: int) -> bool:
    if labels is None or labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        return False
    return bool(labels.min() >= 0 and labels.max() < classes)


_BENCH = {
    "method": None,
    "steps": "d",
    "nfe": "d",
    "seed": "d",
    "w": "g",
    "endpoint": ".4f",
    "sw2": ".4f",
    "sw2/floor": ".2f",
    "precision": ".3f",
    "recall": ".3f",
    "weights": ".4f",
    "spread": ".3f",
    "diversity": ".3f",
    "ll_gap": ".2f",
    "encoding": ".3f",
    "round_trip": ".3f",
    "wall_s": ".1f",
}


def _bench_table(mixture: str, rows: Iterable[Row]) -> Table:
    rows = list(rows)
    table = Table(*_BENCH, title=f"exact teacher: {mixture}", title_justify="left")
    if rows:
        floor = {"method": "floor", "sw2": rows[0]["floor_sw2"], "floor_sw2": rows[0]["floor_sw2"]}
        for row in [floor, *rows]:
            sw2, least = row["sw2"], row["floor_sw2"]
            shown = {**row, "sw2/floor": sw2 / least if sw2 is not None and least else None}
            table.add_row(*(cell(shown.get(name), form) for name, form in _BENCH.items()))
    return table


def _check_picture(x: np.ndarray) -> None:
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"samples of shape {x.shape[1:]} are no pictures: give --out a name that ends in .npz")


def _save_picture(path: Path, x: np.ndarray) -> None:
    from PIL import Image

    _check_picture(x)
    columns = math.ceil(math.sqrt(len(x)))
    scale = max(1, math.ceil(32 / min(x.shape[1:3])))
    grid = image_grid(np.kron(x, np.ones((1, scale, scale, 1))), columns)
    Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid).save(path)
