"""`ddistill evaluate --features …`: any run whose samples are images, or latents of them, by networks' features."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ddistill import integrators, sharding
from ddistill.cli import Evaluate
from ddistill.cli.evaluate import flags_of, steps_of
from ddistill.cli.networks import conditions_for, open_networks, read_prompts, text_embeddings
from ddistill.cli.output import cell, growing, say
from ddistill.cli.rows import FILE, fingerprint, keep_row, kept_rows, stamp, write_copies, write_table
from ddistill.config import Experiment, Imported, PairsData
from ddistill.data.loading import released
from ddistill.datasets import LatentFolder
from ddistill.digests import digest_of
from ddistill.evaluate.quality import Study, floor, judge, notes_of, real_variety
from ddistill.evaluate.real import Decode, images_at, images_of, in_colour, to_bytes
from ddistill.evaluate.samplers import Sampler, student_sampler, teacher_sampler
from ddistill.evaluate.scores import METRICS, STANDARD, chosen, wanted
from ddistill.evaluate.seen import Seen, look, part_of_process
from ddistill.evaluate.statistics import (
    Statistics,
    check_statistics,
    open_statistics,
    save_statistics,
    statistics_in,
    statistics_of,
    with_moments,
)
from ddistill.hub.autoencoders import load_autoencoder
from ddistill.hub.features import Features
from ddistill.runs import Opened

Row = dict[str, Any]

KEPT = 50_000
"""Real images whose single features are kept, at most; moments are of all of them."""

_FEW = "DPM-Solver++(2M)"
_NAMES = {
    "ddim": "DDIM", "deis": "DEIS", "dpmpp_2m": _FEW, "dpmpp_2s": "DPM-Solver++(2S)", "dpmpp_3m": "DPM-Solver++(3M)",
    "dpmpp_3s": "DPM-Solver++(3S)", "euler": "Euler", "heun": "Heun", "rk4": "RK4", "unipc": "UniPC",
}  # fmt: skip


def study(command: Evaluate, opened: Opened) -> None:
    """Judge the samplers of a run, row by row."""
    out = command.run / "evaluation" if command.out is None else command.out
    there = (None, True) if command.reference is None else statistics_in(command.reference)
    given = open_networks(command.features, command.resize or _resize_of(there[0]))
    prompts = None if command.prompts is None else read_prompts(command.prompts)
    names = chosen(command.metrics, given.kinds, prompts is not None)
    kinds = {METRICS[name].feature.split(".")[0] for name in names}
    networks = {kind: features for kind, features in sorted(given.features.items()) if kind in kinds}
    used = dataclasses.replace(given, features=networks, lpips=given.lpips if "lpips" in kinds else None)
    folder = models_of(opened, command.models)
    decode = decoder(opened, folder)
    shape = to_bytes(decode(np.zeros((1, *opened.data.shape), np.float32))).shape[1:]
    in_colour(np.zeros((1, *shape), np.uint8))
    count = STANDARD if command.samples is None else command.samples
    made = {
        "run": fingerprint(command.run),
        "metrics": list(names),
        "networks": used.identity(),
        "prompts": None if prompts is None else digest_of(np.frombuffer("\n".join(prompts).encode(), np.uint8)),
        "models": None if folder is None else stamp(folder),
        "reference": None if command.reference is None else [str(command.reference), stamp(command.reference)],
        "crop": command.crop,
        "samples": count,
        "seed": command.seed,
        "batch_size": command.batch_size,
        "teacher": [command.integrator, command.teacher_steps],
    }
    if (out / FILE).is_file():
        kept_rows(out, made)  # what is refused is refused before images are looked at
    images = (made["run"], made["models"], made["reference"], made["crop"])
    real, notes = reference(command, opened, networks, names, decode, shape, there, out / "reference.npz", images)
    rows = kept_rows(out, made)
    experiment, size = opened.experiment, command.batch_size
    conditions = conditions_for(opened.data, prompts, folder, size, command.seed, shape[0])
    texts = text_embeddings(given, prompts) if prompts is not None and "clip_score" in names else None
    mesh = sharding.make_mesh(experiment.fsdp, experiment.tensor)
    what = Study(
        experiment.process, opened.data.shape, conditions, decode, mesh, networks, names, real, count, size,
        command.seed, texts, used.lpips, opened.data.num_classes,
    )  # fmt: skip
    table = _table(names, rows, real)
    with released(conditions), growing(table) as update:

        def add(row: Row | None) -> None:
            if row is not None:
                row["notes"] = list(notes_of(row, real))
                keep_row(out, row)
                rows.append(row)
                update(_table(names, rows, real))

        if not any(row["nfe"] is None for row in rows):
            row = floor(what, _own(command, opened, what) if real.halves is None else None)
            if row is not None and used.lpips is not None:
                row["lpips"] = real_variety(images_of(opened.data, "the data", decode), used.lpips, command.seed)
            add(row)
        have = {(row["sampler"], row["steps"]) for row in rows}
        for sampler in plan(opened, steps_of(opened, command.steps), command.integrator, command.teacher_steps):
            if (sampler.name, sampler.steps) not in have:
                add(judge(sampler, what))
    notes = (*notes, *dict.fromkeys(note for row in rows for note in row["notes"]))
    for note in notes:
        say(f"Note: {note}")
    told = {name: real.about.get(name) for name in ("source", "images", "resolution")}
    value = {
        "made": made,
        "flags": flags_of(command, rows),
        "reference": told,
        "how": {name: METRICS[name].how for name in names},
        "notes": list(notes),
        "rows": rows,
    }
    write_table(out, value)
    write_copies(command.json, command.csv, value)
    say(f"Wrote {out}/table.json and table.csv")


def models_of(opened: Opened, given: Path | None) -> Path | None:
    """The folder of the models that decode a run's latents, None where its samples are images themselves.

    Raises ValueError where samples are latents and no folder is known.
    """
    experiment = opened.experiment
    folder = given or getattr(opened.data.to_unit, "models", None)
    if folder is None and on_latents(experiment):
        network = experiment.network
        if not isinstance(network, Imported) or not (Path(network.folder) / "vae").is_dir():
            raise ValueError("this run's samples are latents: give the folder of their autoencoder, --models FOLDER")
        folder = Path(network.folder)
    return folder


def on_latents(experiment: Experiment) -> bool:
    """Whether the samples of an experiment are latents that `ddistill encode` made."""
    data = experiment.data.data if isinstance(experiment.data, PairsData) else experiment.data
    return isinstance(data, LatentFolder)


def decoder(opened: Opened, models: Path | None) -> Decode:
    """From samples to brightness: by the autoencoder in a folder where they are latents."""
    if models is None:
        return opened.data.to_unit
    mesh = sharding.local_mesh()
    autoencoder = load_autoencoder(models, mesh=mesh)

    def decode(latents: np.ndarray) -> np.ndarray:
        whole = -(-len(latents) // mesh.size) * mesh.size
        filled = np.concatenate([latents, np.repeat(latents[-1:], whole - len(latents), axis=0)])
        there = jax.device_put(filled.astype(np.float32), sharding.batch_sharding(mesh))
        return np.asarray(autoencoder.pictures(there) + 1)[: len(latents)] / 2

    return decode


def plan(opened: Opened, steps: Sequence[int], integrator: str, usual: int) -> list[Sampler]:
    """The teacher as it is usually sampled, then with as few steps as the student, and the student.

    The teacher is guided as the student's method sees it.
    """
    experiment = opened.experiment
    made, process = experiment.method(experiment.process), experiment.process
    teacher, suffix = opened.guided_teacher()
    names = {name: f"teacher, {shown}{suffix}" for name, shown in _NAMES.items()}
    rows = [teacher_sampler(teacher, process, getattr(integrators, integrator), usual, names[integrator])]
    few = sorted({n for n in steps if (integrator, n) != ("dpmpp_2m", usual)}, reverse=True)
    rows += [teacher_sampler(teacher, process, integrators.dpmpp_2m, n, names["dpmpp_2m"]) for n in few]
    return rows + [student_sampler(opened.student, made, process, n) for n in sorted(steps)]


def reference(
    command: Evaluate,
    opened: Opened,
    networks: Mapping[str, Features],
    names: Sequence[str],
    decode: Decode,
    shape: tuple[int, ...],
    given: tuple[Statistics | None, bool],
    file: Path,
    of: Any,
) -> tuple[Statistics, tuple[str, ...]]:
    """Statistics of the real images, and what is to be said of them.

    given: those of the reference's file, and whether it holds images. file: where they are kept, and taken from where
    they are there already. of: what makes the images.
    """
    needs = wanted(names)
    theirs, pictured = given
    if command.reference is not None and theirs is not None and not pictured:
        return theirs, check_statistics(command.reference, theirs, networks, needs, shape)
    if command.reference is None:
        images = images_of(opened.data, f"data of {command.run}", decode)
    else:
        images = images_at(command.reference, shape, crop=command.crop)
    if file.is_file():
        there = open_statistics(file)
        if there.about.get("of") == json.loads(json.dumps(of)):
            try:
                return there, check_statistics(file, there, networks, needs, shape)
            except ValueError:  # of other metrics or networks: made anew
                pass
    say(f"Looking at {len(images):,} real images ({images.source})")
    made = statistics_of(images, networks, needs, kept=KEPT, batch_size=command.batch_size, seed=command.seed)
    if command.reference is not None and theirs is not None:
        made = with_moments(made, theirs, command.reference)
        check_statistics(command.reference, made, networks, needs, shape)
    made = dataclasses.replace(made, about={**made.about, "of": of})
    save_statistics(file, made)
    return made, tuple(made.about["notes"])


def _resize_of(theirs: Statistics | None) -> str:
    """Inception's preprocessing that statistics were made with; ADM's and EDM's have that of the first FID."""
    if theirs is None:
        return "clean"
    told = theirs.about.get("networks", {}).get("inception", {}).get("preprocessing", "tensorflow")
    return str(told).partition(",")[0]


def _own(command: Evaluate, opened: Opened, what: Study) -> Seen:
    """The run's data, for a floor beside statistics that are no images."""
    images = images_of(opened.data, f"data of {command.run}", what.decode)
    some = np.random.default_rng(command.seed).permutation(len(images))[: what.count]
    mine = sorted(int(i) for i in some[part_of_process(len(some))])
    batches = ((numbers, in_colour(x)) for numbers, x in images.batches(what.batch_size, mine))
    return look(what.networks, batches, what.wanted, batch_size=what.batch_size)[0]


def _table(names: Sequence[str], rows: Sequence[Row], real: Statistics) -> Table:
    """The rows so far; titles tell the number of samples where it is not the standard one."""
    columns: list[tuple[str, str, str | None]] = [("sampler", "sampler", None), ("nfe", "NFE", "d")]
    columns += [("samples", "samples", ",d")]
    columns += [(name, METRICS[name].title, METRICS[name].form) for name in names]
    columns += [("images_per_s", "images/s", ".4g"), ("wall_s", "wall s", ".3g"), ("compile_s", "compile s", ".3g")]
    there = f"{real.whole.count:,}" if real.whole.count else "an unknown number of"
    fewer = sorted({row["samples"] for row in rows if row["samples"] < STANDARD})
    caption = f"against {there} real images; from the same noise and conditions"
    if fewer:
        caption += f"; * {', '.join(f'{n:,}' for n in fewer)} samples, fewer than the standard {STANDARD:,}"
    table = Table(
        *(title for _, title, _ in columns), caption=caption, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for row in rows:
        mark = "*" if row["samples"] < STANDARD else ""
        cells = [cell(row.get(key), form) + (mark if key in names else "") for key, _, form in columns]
        table.add_row(*cells)
    return table
