"""A pipeline of diffusers, or a checkpoint of EDM, DiT or SiT, from a file or the Hugging Face hub, as a teacher."""

import contextlib
import dataclasses
import glob
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from ddistill.hub.configs import kind_of, read_json
from ddistill.hub.load import PARTS, open_config, open_diffusion, open_weights, parts_of, plan
from ddistill.hub.pickles import checkpoint_tensors, edm_snapshot
from ddistill.hub.tensors import STEMS, variant_among, weights_among, weights_file
from ddistill.net import Preconditioning, from_nnx
from ddistill.networks.dit import as_flow, from_original, original_config
from ddistill.networks.layers import rngs_of
from ddistill.process import Process
from ddistill.version import version

RECORD = "teacher.json"
"""What an imported teacher's folder says of where it came from."""

_ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": (
        "DiT",
        {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "clip_sample": False,
        },
    ),
    "sit": ("SiT", {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}),
}
"""Projects of original checkpoints: the class of `configs.ORIGINALS`, and a scheduler of the process."""

_TEXTS = (".json", ".txt", ".model", ".jinja")
_ROOT = ("model_index.json", "config.json", "scheduler_config.json")


class Summary(NamedTuple):
    """What an imported teacher is; notes: what is to be known before it is used."""

    name: str
    parameters: int
    process: Process
    precondition: Preconditioning
    notes: tuple[str, ...] = ()


def import_teacher(
    source: Path | str,
    to: Path | str,
    variant: str | None = None,
    revision: str | None = None,
    original: str | None = None,
) -> Summary:
    """Check a pipeline and copy it to a folder that `ddistill.config.Imported` names.

    source: a folder of diffusers with scheduler/ and unet/ or transformer/, the id of one on the hub, "org/name", of
    which `revision` is taken, or a file of which nothing is executed: a snapshot of EDM or EDM2, or a checkpoint of the
    project `original`, "dit" (ε on DDPM's linear 1000 steps) or "sit" (the velocity of the linear path). variant: of
    the weights, "fp16" for example, where they have it; in the copy they have names without it. What else the pipeline
    has, autoencoder and text encoders, is copied along. Weights that are pickles alone (.bin) become safetensors, a
    component at a time in memory; nothing of them is executed. Nothing is left behind of an import that fails.
    Raises FileExistsError for a folder that is not empty, ConnectionError for a hub that cannot be reached, ValueError
    for a checkpoint of DiT or SiT without `original`, and as `load_network`, `edm_snapshot` and `from_original` do.
    """
    if original is not None and original not in _ORIGINALS:
        raise ValueError(f"original = {original!r}: checkpoints are taken of {', '.join(_ORIGINALS)}")
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FileExistsError(f"{to} is not empty: give a new folder")
    if Path(source).is_file():
        return _import_file(Path(source), to, original)
    if original is not None:
        raise FileNotFoundError(f"{source} is no file: --original {original} takes a checkpoint of that project, a .pt")
    folder = find(source, variant, revision)
    network, scheduler = parts_of(folder)
    pickled = any(name.endswith(".bin") for name in _weights_of(network, variant))
    summary = None if pickled else check_teacher(folder, variant_among(_names(network), variant))
    with written_whole(to) as part:
        if scheduler is None:  # a network of EDM, imported before
            _copy(network, part, variant)
        elif network == folder:  # a model's own folder with its scheduler in it
            at = part / open_config(folder)[0].folder
            at.mkdir()
            shutil.copyfile(network / "config.json", at / "config.json")
            _copy_weights(network, at, variant)
            (part / "scheduler").mkdir()
            file = "scheduler_config.json"
            shutil.copyfile(scheduler / file, part / "scheduler" / file)
        else:
            for path in sorted(scheduler.parent.iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    _copy(path, part / path.name, variant)
                elif path.name == "model_index.json":
                    shutil.copyfile(path, part / path.name)
        summary = summary or check_teacher(part)
        _write_record(part, source, summary)
    return summary


def _import_file(source: Path, to: Path, original: str | None) -> Summary:
    config, tensors = _snapshot(source) if original is None else _original(source, original)
    with written_whole(to) as part:
        network = part
        if original is not None:
            network = part / kind_of(config).folder
            network.mkdir()
            (part / "scheduler").mkdir()
            _write_json(part / "scheduler" / "scheduler_config.json", _ORIGINALS[original][1])
        _write_json(network / "config.json", config)
        arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(arrays, network / f"{STEMS[0]}.safetensors")
        summary = check_teacher(part)
        _write_record(part, source, summary)
    return summary._replace(notes=_notes_of(config, original))


def _notes_of(config: Mapping[str, Any], original: str | None) -> tuple[str, ...]:
    if original is not None:
        return (
            "diffusers embeds times otherwise than this project does, so its students cannot be exported: import "
            "diffusers' copy of the model for that, where there is one",
        )
    if config["_class_name"] == "Precond" and config.get("img_channels") == 4:
        return (
            "its latents are those of Stable Diffusion's autoencoder, normalised (EDM2's encoders.py): give that "
            'autoencoder\'s config.json "scaling_factor": 0.5, "latents_mean": [5.81, 3.25, 0.12, -2.15] and '
            '"latents_std": [4.17, 4.62, 3.71, 3.28] before anything is encoded or decoded by it',
        )
    return ()


def _snapshot(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a network of EDM or EDM2."""
    try:
        tensors, init = edm_snapshot(source)
    except ValueError:
        if not _of_original(source):
            raise
        raise ValueError(
            f"{source} is a checkpoint of DiT or of SiT, whose tensors have the same names and shapes: say of which, "
            "with --original dit or --original sit"
        ) from None
    return {"_class_name": init["class_name"], **{k: v for k, v in init.items() if k != "class_name"}}, tensors


def _of_original(source: Path) -> bool:
    try:
        return "x_embedder.proj.weight" in checkpoint_tensors(source)
    except ValueError:
        return False


def _original(source: Path, project: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a network of the DiT or SiT project."""
    given = checkpoint_tensors(source)
    config = {
        "_class_name": _ORIGINALS[project][0],
        **dataclasses.asdict(original_config(given, shared_embedding=True)),
    }
    tensors = from_original(given, shared=True)
    return config, as_flow(tensors) if project == "sit" else tensors


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_record(folder: Path, source: Path | str, summary: Summary) -> None:
    record = {"version": version(), "source": str(source), "class": summary.name, "parameters": summary.parameters}
    _write_json(folder / RECORD, record)


def check_teacher(folder: Path | str, variant: str | None = None) -> Summary:
    """What the teacher in a folder is, by configurations and headers of weights alone; raises as `load_network`."""
    kind, config = open_config(folder)
    process, precondition = open_diffusion(folder)
    net = from_nnx(
        nnx.eval_shape(lambda: kind.network(config, dtype=jnp.float32, rngs=rngs_of(0))), process, precondition
    )
    read, _ = plan(open_weights(folder, variant), net)
    count = sum(math.prod(net.params[path].shape) for path in read if path in net.params)
    return Summary(kind.name, count, process, precondition)


def find(source: Path | str, variant: str | None = None, revision: str | None = None) -> Path:
    """The folder itself, or that of a model of the hub, downloaded; see `import_teacher`."""
    if Path(source).exists():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source} is neither a folder nor an id of the hub, such as organisation/name")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            names = HfApi().list_repo_files(str(source), revision=revision)
            index = None
            if "model_index.json" in names:
                at = Path(snapshot_download(str(source), revision=revision, allow_patterns=["model_index.json"]))
                index = read_json(at / "model_index.json", "the parts of a pipeline")
            names = files_of(names, variant, index)
        except OfflineModeIsEnabled:
            names = None  # what was downloaded before
        patterns = None if names is None else [glob.escape(name) for name in names]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(
            f"there is no folder {source}, and the hub does not give a model of that id: {error}"
        ) from error


def files_of(names: Sequence[str], variant: str | None = None, index: Mapping[str, Any] | None = None) -> list[str]:
    """Of all files of a pipeline on the hub those that are needed: configurations, vocabularies, and weights once.

    index: its model_index.json; folders that are no part of the pipeline, as SDXL's vae_1_0, are left out. Raises
    ValueError where the denoiser has weights of other variants alone.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    alone = not set(PARTS) & set(folders)  # the denoiser lies at the root
    wanted = []
    for folder, files in folders.items():
        of_pipeline = index is None or folder in ("", *PARTS, "scheduler") or folder in index
        if folder.count("/") or not of_pipeline:
            continue
        weights = weights_among(files, variant) if folder or alone else []
        if (folder in PARTS or (alone and not folder)) and not weights:
            there = ", ".join(sorted(file for file in files if file.endswith((".safetensors", ".bin")))) or "nothing"
            raise ValueError(f"the denoiser has {there}: name the variant of its weights, such as --variant fp16")
        texts = [f for f in files if f.endswith(_TEXTS) and ".index." not in f] if folder else list(_ROOT)
        wanted += [f"{folder}/{file}" if folder else file for file in (*texts, *weights) if file in files]
    return wanted


@contextlib.contextmanager
def written_whole(to: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `to` at the end and is removed if anything fails.

    Raises FileExistsError where `to` is not empty.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FileExistsError(f"{to} is not empty: give a new folder")
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy(folder: Path, to: Path, variant: str | None) -> None:
    """Copy a component: its texts, and of its weights those of the variant, or else those without one."""
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in _TEXTS and ".index." not in path.name:
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if _weights_of(folder, variant):
        _copy_weights(folder, to, variant)


def _weights_of(folder: Path, variant: str | None) -> list[str]:
    return weights_among(_names(folder), variant)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _copy_weights(folder: Path, to: Path, variant: str | None) -> None:
    pickles = [name for name in _weights_of(folder, variant) if name.endswith(".bin")]
    if pickles:
        tensors = {n: np.ascontiguousarray(a) for name in pickles for n, a in checkpoint_tensors(folder / name).items()}
        save_file(tensors, to / f"{STEMS[pickles[0].startswith('pytorch_model')]}.safetensors")
        return
    variant = variant_among(_names(folder), variant)
    first = weights_file(folder, variant)
    plain = "" if variant is None else f".{variant}"
    files = [first.name]
    if first.suffix == ".json":
        index = read_json(first, "an index of shards")
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"] = {name: file.replace(plain, "", 1) for name, file in index["weight_map"].items()}
        _write_json(to / first.name.replace(plain, "", 1), index)
    for name in files:
        shutil.copyfile(folder / name, to / name.replace(plain, "", 1))
