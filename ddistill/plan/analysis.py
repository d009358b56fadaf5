"""An experiment's programs counted on each chip of a pod, without a compiler: work, memory, and what must be sent."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh

from ddistill import sharding
from ddistill.config import Experiment
from ddistill.dry_run import Built, bytes_on
from ddistill.lora import is_adapted
from ddistill.plan.gathers import Least, least
from ddistill.plan.memory import peak
from ddistill.plan.programs import SAMPLER, Program, placed, programs, split_of
from ddistill.plan.work import Work, count

PyTree = Any


@dataclass(frozen=True)
class Analysed:
    """One program on each chip.

    stage, share, images: as in `Program`. work: its products. model: operations that the losses need, those aside that
    only rematerialisation repeats. held: bytes of its arguments by what they are. temporaries: an estimate of what it
    holds besides. traffic: bytes to and from memory where all but products is fused into them. least: what must be sent.
    """

    name: str
    stage: str
    share: float
    images: int
    work: Work
    model: float
    held: Mapping[str, float]
    temporaries: float
    traffic: float
    least: Least

    @property
    def memory(self) -> float:
        """Bytes at the peak: what is held and the estimate of what is besides."""
        return sum(self.held.values()) + self.temporaries


@dataclass(frozen=True)
class Traced:
    """The programs of an experiment traced with a part of the batch, the one that a device gets: the rest is arithmetic.

    rows: each with its jaxpr and the work that does not grow with the batch. parts: the samples of that part.
    """

    rows: list[tuple[Program, Any, Work]]
    model: list[float]
    built: list[Built]
    notes: list[str]
    parts: int


def check_batch(experiment: Experiment, chips: int) -> int:
    """The samples of a batch that one chip gets. Raises ValueError where the pod cannot take the batch or the mesh."""
    sizes = sharding.abstract_mesh(chips, *split_of(experiment)).shape
    parts = sizes["data"] * sizes["fsdp"]
    if experiment.batch_size % (parts * experiment.accumulate):
        tensor = f", tensor = {sizes['tensor']}" if sizes.get("tensor", 1) > 1 else ""
        raise ValueError(
            f"batch_size = {experiment.batch_size} does not split over {chips} chips (data = {sizes['data']}, fsdp = "
            f"{sizes['fsdp']}{tensor}) in {experiment.accumulate} parts (accumulate): take a multiple of "
            f"{parts * experiment.accumulate}, or fewer chips"
        )
    return experiment.batch_size // parts


def traced(experiment: Experiment, samples: int, **options: Any) -> Traced:
    """Trace the programs with so many samples. options: as for `programs`."""
    mine = dataclasses.replace(experiment, batch_size=samples)
    found, built, notes = programs(mine, samples=samples, **options)
    jaxprs = [program.trace().jaxpr for program in found]
    works = [count(jaxpr) for jaxpr in jaxprs]
    fixed = [Work()] * len(found)
    if any(is_adapted(net) for part in built for net in part.nets.values()):  # products of factors, whatever the batch
        twice = dataclasses.replace(experiment, batch_size=2 * samples)
        again = [count(program.trace().jaxpr) for program in programs(twice, samples=2 * samples, **options)[0]]
        fixed = [work.times(2) + more.times(-1) for work, more in zip(works, again, strict=True)]
    model = [work.flops for work in works]
    if getattr(experiment.network, "remat", False):
        kept = dataclasses.replace(mine, network=dataclasses.replace(mine.network, remat=False))
        model = [count(program.trace().jaxpr).flops for program in programs(kept, samples=samples, **options)[0]]
    return Traced(list(zip(found, jaxprs, fixed, strict=True)), model, built, notes, samples)


def analysed(experiment: Experiment, chips: int, seen: Traced, *, flash: bool = False) -> list[Analysed]:
    """The programs on each chip of a pod.

    seen: of this experiment, traced with the samples that a chip gets. flash: attention never writes its weights.
    """
    mesh = sharding.abstract_mesh(chips, *split_of(experiment))
    split = mesh.size // mesh.shape["data"]
    rows = []
    for (program, jaxpr, fixed), model in zip(seen.rows, seen.model, strict=True):
        part = next((b for b in seen.built if b.stage.name == program.stage), seen.built[-1])
        tensor = mesh.shape.get("tensor", 1)
        # Products of adapters' factors are split as the parameters are, and done again on every copy of them.
        work = (count(jaxpr) + fixed.times(-1)).times(1 / tensor) + fixed.times(1 / split)
        grows = (model - fixed.flops) / tensor + fixed.flops / split
        state, nets = (part.state, part.nets) if program.stage != SAMPLER else ({}, {"student": part.result})
        held = _held(state, nets, mesh, part)
        rows.append(
            Analysed(
                program.name, program.stage, program.share, program.images * mesh.shape["data"] * mesh.shape["fsdp"],
                work, grows, held, peak(jaxpr, _parts_of(state, nets, mesh, part), flash=flash),
                (work.flash if flash else work.bytes) + _updates(part, program, mesh),
                _least(jaxpr, program, state, nets, mesh, part),
            )
        )  # fmt: skip
    return rows


def _held(state: PyTree, nets: Mapping[str, Any], mesh: AbstractMesh, part: Built) -> dict[str, float]:
    rule = part.trainer.rule
    if not state:
        return {"parameters": bytes_on(nets, mesh, rule)}
    teacher, others = nets["teacher"], {name: net for name, net in nets.items() if name != "teacher"}
    found = {
        "parameters": bytes_on(state.params, mesh, rule),
        "optimiser": bytes_on(state.opt, mesh, rule),
        "averages": bytes_on(state.ema, mesh, rule),
        "teacher": bytes_on(teacher, mesh, rule),
        "other": bytes_on((others, state.memory), mesh, rule),
        "batch": float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part.batch))),
    }
    return {name: size for name, size in found.items() if size}


def _leaves(state: PyTree, nets: PyTree, mesh: AbstractMesh, part: Built) -> list[tuple[str, Any, int]]:
    """Paths, shapes and numbers of parts of all that a program holds, in the order of its arguments."""
    flat = jax.tree.leaves_with_path(placed((state, nets), mesh, rule=part.trainer.rule))
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), x, x.size // math.prod(x.sharding.shard_shape(x.shape)))
        for path, x in flat
    ]


def _parts_of(state: PyTree, nets: PyTree, mesh: AbstractMesh, part: Built) -> dict[tuple[int, ...], float]:
    return {tuple(x.shape): n for _, x, n in _leaves(state, nets, mesh, part) if n > 1}


def _least(
    jaxpr: Any, program: Program, state: PyTree, nets: PyTree, mesh: AbstractMesh, part: Built
) -> Least:
    if program.stage == SAMPLER:
        nets = nets["student"]  # the sampler's only network is its first argument
        leaves = [(path, x, n) for path, x, n in _leaves((), nets, mesh, part)]
    else:
        leaves = _leaves(state, nets, mesh, part)
    parts = [n for _, _, n in leaves]
    own = tuple(f"0.params.{name}" for name in program.turn)
    updated = [i for i, (path, x, _) in enumerate(leaves) if path.startswith(own) and program.turn]
    parts += [1] * (len(jaxpr.in_avals) - len(parts))
    return least(jaxpr, parts, updated, mesh.shape["fsdp"], mesh.shape["data"])


def _updates(part: Built, program: Program, mesh: AbstractMesh) -> float:
    """Bytes that the optimisers read and write: parameters, moments, averages, and gradients twice."""
    if program.stage == SAMPLER:
        return 0.0
    method, rule = part.stage.method, part.trainer.rule
    total = 0.0
    for name in program.turn:
        own = bytes_on({"params": {name: part.state.params[name]}}, mesh, rule)
        total += 2 * (2 * own + bytes_on({"opt": {name: part.state.opt[name]}}, mesh, rule))
        total += sum(2 * own for source, _ in method.ema.values() if source == name)
    return total
