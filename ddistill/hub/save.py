"""Students as folders and adapters that diffusers opens, with the scheduler that samples them as ddistill does."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from ddistill.hub.autoencoders import Autoencoder
from ddistill.hub.configs import ORIGINALS, config_json, kind_of, network_config, read_json, scheduler_json, table_of
from ddistill.hub.load import parts_of
from ddistill.hub.teachers import written_whole
from ddistill.hub.tensors import STEMS
from ddistill.hub.weights import OURS, tensors_of, to_theirs
from ddistill.lora import Delta, LowRank
from ddistill.net import BoundaryPrecondition, Net, Preconditioning, VelocityPrecondition, module_of
from ddistill.process import EDM, DiscreteVP, Flow, Process

LARGEST_FILE = 5 * 10**9
"""Bytes beyond which weights are split into shards."""

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_LAST_OF_TIME = ("time_embedding.linear_2.bias", "timestep_embedder.linear_2.bias")
"""The bias to which networks add what they read of target and guidance: the last of the time's embedding."""

_LEVELS = 1001
"""Noise levels of an exported consistency model's scheduler, of which its times are whole numbers."""

_PIPELINES = {"CMStochasticIterativeScheduler": "ConsistencyModelPipeline"}
"""Pipelines of a UNet without text by their scheduler; others are a DDPMPipeline's."""


WITH_LORA = (
    "UNet2DConditionModel", "SanaTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
)  # fmt: skip
"""Networks whose pipelines in diffusers load a LoRA file."""


@dataclass(frozen=True)
class Recipe:
    """How a student is sampled by diffusers, and the same with ddistill.

    scheduler: a scheduler_config.json. call: arguments of its set_timesteps, which pipelines take as their own. step:
    those of its step. process, times, gamma: for `ddistill.sample.sample`, from noise of σ(times[0]).
    """

    scheduler: Mapping[str, Any]
    call: Mapping[str, Any]
    process: Process
    times: tuple[float, ...]
    gamma: float
    step: Mapping[str, Any] = field(default_factory=dict)


def recipe(student: Net, process: Process, times: Any, gamma: float, base: Mapping[str, Any] | None = None) -> Recipe:
    """How diffusers samples a student of a process along times, as `ddistill.sample.sample` does.

    Samples live in the network's own process, into which the times are carried. Times of a discrete process become
    whole numbers, as its schedulers have them, and those of a consistency model one of 1001 levels. base: the
    scheduler_config.json of the teacher, whose table of betas is taken over. Raises ValueError for students that no
    scheduler of diffusers samples.
    """
    _, own, precondition = module_of(student)
    nodes = np.asarray(times, np.float64)
    if own != process:
        there = own.time_of(process.half_log_snr(jnp.asarray(nodes, jnp.float32)))
        nodes = np.where(nodes == 0, 0.0, np.clip(np.asarray(there, np.float64), 0.0, own.t_max))
    if gamma not in (0, 1):
        raise ValueError(f"gamma = {gamma}: schedulers of diffusers jump to the next time (0) or to the data (1)")
    if isinstance(own.schedule, DiscreteVP):
        return _discrete(own, len(own.schedule.betas), precondition, nodes, gamma, base or {})
    if isinstance(own.schedule, Flow):
        return _flow(own, precondition, nodes, gamma)
    if isinstance(own.schedule, EDM):
        return _edm(own, precondition, nodes, gamma)
    raise ValueError(f"diffusers has no scheduler of {type(own.schedule).__name__}: take a teacher of another process")


def _discrete(
    process: Process, total: int, precondition: Preconditioning, times: np.ndarray, gamma: float, base: Mapping
) -> Recipe:
    common = {**scheduler_json(process, precondition), "steps_offset": 0}
    if base:
        common |= table_of(base)
    steps = len(times) - 1
    # LCM's scheduler answers x itself at index 0.
    index = np.clip(np.round(times[:-1]) - 1, int(gamma == 1), total - 1).astype(int)
    if np.any(np.diff(index) >= 0):
        raise ValueError(f"times {times[:-1]} are not {steps} whole numbers from {total} down: sample in fewer steps")
    nodes = tuple(float(i + 1) for i in index)
    if gamma == 1:
        # The scheduler mixes x0 with x as if near the data, at time · 10 by default: x0 would be off by 1e-5.
        lcm = {"_class_name": "LCMScheduler", "timestep_spacing": "leading", "timestep_scaling": 1000.0}
        scheduler = {**common, **lcm, "original_inference_steps": total}
        return Recipe(scheduler, {"timesteps": index.tolist()}, process, (*nodes, 0.0), gamma)
    if total % steps == 0 and np.array_equal(index, np.arange(total, 0, -total // steps) - 1):
        return Recipe(common, {"num_inference_steps": steps}, process, (*nodes, 0.0), gamma)
    # TCD takes any times, but ends at the least noise instead of at none.
    tcd = {"_class_name": "TCDScheduler", "timestep_spacing": "leading", "original_inference_steps": total}
    return Recipe({**common, **tcd}, {"timesteps": index.tolist()}, process, (*nodes, 1.0), gamma, {"eta": 0.0})


def _flow(process: Process, precondition: Preconditioning, times: np.ndarray, gamma: float) -> Recipe:
    if not isinstance(precondition, VelocityPrecondition):
        raise ValueError(f"a flow's network in diffusers outputs a velocity, which is not what {precondition} is for")
    # Without a shift of its own the scheduler keeps the noise levels that it is given.
    scheduler = {**scheduler_json(process, precondition), "stochastic_sampling": gamma == 1}
    return Recipe(scheduler, {"sigmas": times[:-1].tolist()}, process, tuple(times.tolist()), gamma)


def _edm(process: Process, precondition: Preconditioning, times: np.ndarray, gamma: float) -> Recipe:
    scheduler, steps = scheduler_json(process, precondition), len(times) - 1
    if not isinstance(precondition, BoundaryPrecondition):
        if steps > 1:
            raise ValueError(
                f"{scheduler['_class_name']}, which this network is of, takes no times of its own: export one step, or "
                "distil a teacher of a CMStochasticIterativeScheduler"
            )
        return Recipe(scheduler, {"num_inference_steps": 1}, process, tuple(times.tolist()), 0.0)
    if gamma == 0 and steps > 1:
        raise ValueError("CMStochasticIterativeScheduler jumps to the data and adds noise again; this student does not")
    high, low = process.t_max ** (1 / 7), process.t_min ** (1 / 7)
    level = np.clip(np.round((high - times[:-1] ** (1 / 7)) / (high - low) * (_LEVELS - 1)), 0, _LEVELS - 1)
    nodes = (high + level / (_LEVELS - 1) * (low - high)) ** 7
    call = {"timesteps": level[::-1].astype(int).tolist()} if steps > 1 else {"num_inference_steps": 1}
    scheduler = {**scheduler, "num_train_timesteps": _LEVELS}
    return Recipe(scheduler, call, process, (*nodes.tolist(), 0.0), float(steps > 1))


def without_inputs(
    student: Net, target: float | None, guidance: float | None, *, drop: bool = False
) -> dict[str, Array]:
    """Parameters of a network that does for every s and w what the student does at s = target and w = guidance.

    What the student's embeddings of target and guidance add to that of the time is, at one value, a bias. target: the
    time that it jumps to, in the network's own process, None where there are several; guidance: None where it is given
    none. drop: what cannot be folded is left out; without, ValueError is raised for it.
    """
    definition, process, precondition = module_of(student)
    params = dict(student.params)
    module: Any = definition(params, student.rest)
    biases = [path for path in params if path.endswith(_LAST_OF_TIME)]
    learned = {path.partition(".")[0] for path, p in params.items() if path.startswith(OURS) and np.any(np.asarray(p))}

    def fold(added: Array) -> None:
        params.update({path: (params[path] + added[0]).astype(params[path].dtype) for path in biases})

    if "target" in learned and target is not None:
        fold(module.target(precondition(process, jnp.full(1, target, jnp.float32))[3]))
    elif "target" in learned and not drop:
        raise ValueError(
            "this student reads the time that it jumps to, and jumps to several; diffusers' networks do not read it. "
            "Export one step, or leave out what it learned of it (--drop-target)"
        )
    if "guidance" in learned and guidance is not None:
        fold(module.guidance(jnp.full(1, guidance, jnp.float32)))
    elif "guidance" in learned and not drop:
        raise ValueError(
            "this student reads a guidance scale, which diffusers' networks do not: say at which, guidance="
        )
    return {path: jnp.zeros_like(p) if path.startswith(OURS) else p for path, p in params.items()}


def save_network(
    folder: Path | str,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    dtype: str | None = None,
    largest: int = LARGEST_FILE,
) -> None:
    """Write a model's folder: config.json and its weights, in shards if they exceed `largest` bytes.

    params: with the buffers that such a model keeps. dtype: "fp16" or "bf16"; by default as they are. What only
    students read is left out. Raises ValueError for numbers that fp16 cannot hold.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    stem = STEMS[0]
    shard: dict[str, np.ndarray] = {}
    parts: list[Path] = []
    where: dict[str, int] = {}
    total = size = 0

    def close() -> None:
        parts.append(folder / f"{stem}.{len(parts)}.part")
        save_file(shard, parts[-1], metadata={"format": "pt"})
        shard.clear()

    for name, array in _tensors(params, dtype):
        if shard and size + array.nbytes > largest:
            close()
            size = 0
        shard[name], where[name] = array, len(parts)
        size, total = size + array.nbytes, total + array.nbytes
    close()
    names = [f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = [f"{stem}.safetensors"]
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in where.items()}}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
    for part, name in zip(parts, names, strict=True):
        part.replace(folder / name)


def save_autoencoder(folder: Path | str, config: Any, params: Mapping[str, Array], dtype: str | None = None) -> None:
    """Write an autoencoder's folder, which `load_autoencoder` and diffusers open: the way back.

    config: `AutoencoderKLConfig` or `AutoencoderTinyConfig`; params: by path, as `split` gives them of the module.
    dtype, and what it raises: as for `save_network`.
    """
    name = type(config).__name__.removesuffix("Config")
    save_network(folder, {"_class_name": name, **dataclasses.asdict(config)}, params, dtype)


def save_pipeline(
    to: Path | str,
    net: Net,
    scheduler: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    autoencoder: Autoencoder | None = None,
) -> None:
    """Write a network of a diffusers class as a pipeline's folder, which `ddistill import` takes and diffusers opens.

    scheduler: by default one of the network's process. autoencoder: of a latent model, for vae/; with it a DiT is all
    that a DiTPipeline has. Raises ValueError for networks and processes of no class of diffusers, FileExistsError where
    the folder is not empty.
    """
    _, process, precondition = module_of(net)
    config = config_of(net)
    scheduler = scheduler_json(process, precondition) if scheduler is None else scheduler
    with written_whole(Path(to)) as part:
        if autoencoder is not None:
            save_autoencoder(part / "vae", autoencoder.config, autoencoder.params, dtype)
        _write_parts(part, config, {**net.params, **net.rest}, scheduler, dtype)


def export_student(
    to: Path | str,
    student: Net,
    process: Process,
    times: Any,
    gamma: float = 0.0,
    *,
    teacher: Path | str | None = None,
    guidance: float | None = None,
    dtype: str | None = None,
    drop_target: bool = False,
    about: str = "",
) -> Recipe:
    """Write a student as a pipeline's folder with its scheduler and a model card; answers how it is sampled.

    process, times, gamma: as `ddistill.sample.sample` takes them. teacher: the imported teacher's folder, whose
    configuration and other parts are copied. guidance: the scale that students which read one are built for. dtype:
    "fp16" or "bf16". about: the method, for the card. Raises ValueError for what diffusers cannot do (`recipe`,
    `without_inputs`), FileExistsError where the folder is not empty.
    """
    config = config_of(student, teacher)
    made = recipe(student, process, times, gamma, _scheduler_of(teacher))
    target = 0.0 if made.gamma == 1 or len(made.times) == 2 else None
    params = without_inputs(student, target, guidance, drop=drop_target)
    with written_whole(Path(to)) as part:
        _copy_others(teacher, part)
        _write_parts(part, config, {**params, **student.rest}, made.scheduler, dtype)
        (part / "README.md").write_text(_card(made, _guidance(student, guidance), about), encoding="utf-8")
    return made


def export_lora(
    to: Path | str,
    student: Net,
    update: Delta,
    process: Process,
    times: Any,
    gamma: float = 0.0,
    *,
    teacher: Path | str | None = None,
    guidance: float | None = None,
    drop_target: bool = False,
    about: str = "",
) -> Recipe:
    """Write what a student learned, its delta, as a LoRA file with a scheduler and a model card beside it.

    Others as in `export_student`. drop_target: leaves out what it learned of the time it jumps to and of guidance,
    which are not the network's in diffusers. Raises ValueError where that is not nothing, for networks into which
    diffusers loads no such file, and as `save_lora` does.
    """
    config = config_of(student, teacher)
    if config["_class_name"] not in WITH_LORA:
        raise ValueError(
            f"diffusers loads no LoRA file into a {config['_class_name']}, only into {', '.join(WITH_LORA)}: export "
            "the whole network, without --lora"
        )
    made = recipe(student, process, times, gamma, _scheduler_of(teacher))
    extra = sorted(path for path, value in update.items() if path.startswith(OURS) and _is_any(value))
    if extra and not drop_target:
        raise ValueError(
            f"this student learned {', '.join(extra)}, which diffusers' network does not have: adapt other layers, "
            "LoRA(layers=...), export the whole network, or leave them out (--drop-target)"
        )
    kept = {path: value for path, value in update.items() if not path.startswith(OURS)}
    with written_whole(Path(to)) as part:
        save_lora(part, kept, student.params, kind_of(config).folder)
        (part / "scheduler").mkdir()
        _write_json(part / "scheduler" / "scheduler_config.json", made.scheduler)
        card = _card(made, _guidance(student, guidance), about, lora=True)
        (part / "README.md").write_text(card, encoding="utf-8")
    return made


def config_of(net: Net, teacher: Path | str | None = None) -> dict[str, Any]:
    """The config.json of a network: its teacher's own, or made from the module's configuration.

    Raises ValueError for networks that no class of diffusers holds, and for those that see a flow's time on another
    scale than the class does.
    """
    definition, _, precondition = module_of(net)
    if teacher is None:
        module: Any = definition(net.params, net.rest)
        config = config_json(getattr(module, "config", module))
    else:
        config = read_json(parts_of(teacher).network / "config.json", "the configuration of a model")
        if config.get("_class_name") in ORIGINALS:
            config = config_json(network_config(config))
    scale = kind_of(config).time_scale
    if isinstance(precondition, VelocityPrecondition) and precondition.time_scale != scale:
        raise ValueError(
            f"diffusers shows its {config['_class_name']} {scale:g} t for a flow's time t, and this network was made "
            f"for {precondition.time_scale:g} t (time_scale)"
        )
    return config


def save_lora(to: Path | str, update: Delta, params: Mapping[str, Any], part: str) -> None:
    """Write a delta as pytorch_lora_weights.safetensors, which `load_lora_weights` of diffusers reads.

    params: of the network that it is for. part: "unet" or "transformer", what the pipeline calls the network. B holds
    the factor α/r, so that alpha is the rank. Lower ranks are filled up with zeros to the highest, as not all versions
    of diffusers scale layers of several ranks rightly. Updates that are 0 are left out. Raises ValueError for what
    such a file cannot hold: biases, embeddings and parameters trained whole.
    """
    changed = {path: value for path, value in update.items() if _is_any(value)}
    whole = [path for path, value in changed.items() if not (isinstance(value, LowRank) and path.endswith(".kernel"))]
    if whole:
        raise ValueError(
            f"a LoRA file holds low-rank updates of kernels alone; these are not: {', '.join(whole[:8])}"
            f"{f' and {len(whole) - 8} more' * (len(whole) > 8)}"
        )
    arrays: dict[str, np.ndarray] = {}
    rank = max((value.down.shape[-1] for value in changed.values() if isinstance(value, LowRank)), default=0)
    for path, value in changed.items():
        for name, a, b in _factors(path, value, np.shape(params[path]), rank):
            arrays |= {f"{part}.{name}.lora_A.weight": a, f"{part}.{name}.lora_B.weight": b}
    to = Path(to)
    to.mkdir(parents=True, exist_ok=True)
    save_file(arrays, to / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def _is_any(value: Array | LowRank) -> bool:
    if isinstance(value, LowRank):
        return bool(np.any(np.asarray(value.down)) and np.any(np.asarray(value.up)))
    return bool(np.any(np.asarray(value)))


def _factors(path: str, value: Any, shape: tuple[int, ...], rank: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names of layers, and A [r, in, ...] and B [out, r, ...] in PyTorch's layout, for each block of a stack."""
    for tensor in tensors_of(path, shape):
        down, up = (np.asarray(a if tensor.block is None else a[tensor.block]) for a in (value.down, value.up))
        missing = rank - down.shape[-1]
        down, up = np.pad(down, ((0, 0), (0, missing))), np.pad(up, ((0, missing), (0, 0)))
        *taps, inward, out = shape if tensor.block is None else shape[1:]
        a = down.reshape(*taps, inward, -1)
        b = up.reshape(*(1 for _ in taps), -1, out)
        yield tensor.name.removesuffix(".weight"), to_theirs(path, a), to_theirs(path, b)


def _tensors(params: Mapping[str, Any], dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint one by one, no more than one of a stack's blocks on the host at a time."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: weights are saved as {', '.join(DTYPES)}")
    for path, array in params.items():
        if path.startswith(OURS):
            continue
        for tensor in tensors_of(path, np.shape(array)):
            theirs = to_theirs(path, np.asarray(array if tensor.block is None else array[tensor.block]))
            with np.errstate(over="ignore"):  # told below
                cast = theirs if dtype is None else theirs.astype(jnp.dtype(DTYPES[dtype]))
            if dtype == "fp16" and np.any(np.isinf(cast)) and np.all(np.isfinite(theirs)):
                raise ValueError(f"{tensor.name} holds {np.abs(theirs).max():g}, too large for fp16: take bf16")
            yield tensor.name, cast


def _scheduler_of(teacher: Path | str | None) -> dict[str, Any] | None:
    home = None if teacher is None else parts_of(teacher).scheduler
    return None if home is None else read_json(home / "scheduler_config.json", "the configuration of a scheduler")


def _write_parts(
    to: Path, config: Mapping[str, Any], params: Mapping[str, Any], scheduler: Mapping[str, Any], dtype: str | None
) -> None:
    part, name = kind_of(config).folder, config["_class_name"]
    save_network(to / part, config, params, dtype)
    (to / "scheduler").mkdir()
    _write_json(to / "scheduler" / "scheduler_config.json", scheduler)
    index = to / "model_index.json"
    if index.exists():
        parts = read_json(index, "the parts of a pipeline")
    elif name == "UNet2DModel":
        parts = {"_class_name": _PIPELINES.get(scheduler["_class_name"], "DDPMPipeline"), part: ["diffusers", name]}
    elif name == "DiTTransformer2DModel" and (to / "vae").is_dir():
        vae = read_json(to / "vae" / "config.json", "the configuration of an autoencoder")["_class_name"]
        parts = {"_class_name": "DiTPipeline", part: ["diffusers", name], "vae": ["diffusers", vae]}
    else:  # the pipelines of other classes have parts that this folder has not
        return
    _write_json(index, {**parts, "scheduler": ["diffusers", scheduler["_class_name"]]})


def _copy_others(teacher: Path | str | None, to: Path) -> None:
    """Copy what a teacher's folder has beside its network, scheduler and record."""
    home = None if teacher is None else parts_of(teacher).network
    if teacher is None or home == Path(teacher):
        return
    for path in sorted(Path(teacher).iterdir()):
        if path.is_dir() and path.name != "scheduler" and path != home:
            shutil.copytree(path, to / path.name)
        elif path.name == "model_index.json":
            shutil.copyfile(path, to / path.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")


def _guidance(student: Net, scale: float | None) -> str:
    without = "sample without classifier-free guidance (`guidance_scale=1`)"
    if scale is None:
        return f"what was distilled is in the weights; {without}."
    if any(path.startswith("guidance.") and np.any(np.asarray(p)) for path, p in student.params.items()):
        return f"a scale of {scale:g} is in the weights; {without}."
    return f"the network reads its scale: `guidance_scale={scale:g}`."


def _card(made: Recipe, guidance: str, about: str, lora: bool = False) -> str:
    """The model card: what the student is and how it is sampled."""
    scheduler, steps = made.scheduler["_class_name"], len(made.times) - 1
    call = ", ".join(f"{name}={value}" for name, value in made.call.items())
    options = ", ".join([call, *(f"{name}={value}" for name, value in made.step.items())])
    noise = "adds fresh noise between its steps" if made.gamma else "adds no noise between its steps"
    opened = """pipe = DiffusionPipeline.from_pretrained("this folder")"""
    if lora:
        opened = f"""pipe = DiffusionPipeline.from_pretrained("the teacher")
pipe.scheduler = {scheduler}.from_pretrained("this folder", subfolder="scheduler")
pipe.load_lora_weights("this folder")"""
    return f"""---
library_name: diffusers
tags: [diffusion, distillation, few-step{", lora" * lora}]
---

# {about or "A few-step student"}

Distilled with ddistill to sample in {steps} network call{"s" * (steps > 1)}.

- Scheduler: `{scheduler}`, in `scheduler/`; it {noise}.
- Steps: `{call}`.
- Guidance: {guidance}

```python
from diffusers import DiffusionPipeline{f", {scheduler}" * lora}

{opened}
image = pipe(..., {options}).images[0]
```

Where a pipeline takes no such arguments they are those of `pipe.scheduler.set_timesteps`. With ddistill the same is
`sample(student, process, {[round(t, 6) for t in made.times]}, noise, key, gamma={made.gamma:g})`.
"""
