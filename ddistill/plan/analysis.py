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
from ddistill.plan.changes import changed
from ddistill.plan.gathers import Least, least
from ddistill.plan.memory import peak
from ddistill.plan.programs import SAMPLER, Program, placed, programs
from ddistill.plan.work import Work, count
from ddistill.train import State

PyTree = Any


@dataclass(frozen=True)
class Analysed:
    """One program on each chip.

    stage, steps, share, images: as in `Program`. work: its products. model: operations that the losses need, without
    those that only rematerialisation repeats. held: bytes of its arguments by what they are. temporaries: an estimate
    of what it holds besides. traffic: bytes to and from memory where all but products is fused into them. least: what
    must be sent.
    """

    name: str
    stage: str
    steps: int
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
    """The programs of an experiment traced with the part of a batch that one chip gets; the rest is arithmetic.

    jaxprs, works: of each. fixed: the work of each that does not grow with the batch. model: operations of each but for
    those that only rematerialisation repeats.
    """

    programs: list[Program]
    jaxprs: list[Any]
    works: list[Work]
    fixed: list[Work]
    model: list[float]
    built: list[Built]
    notes: list[str]


def check_batch(experiment: Experiment, chips: int) -> int:
    """The samples of a batch that one chip gets. Raises ValueError where the pod cannot take the batch or the mesh."""
    sizes = sharding.abstract_mesh(chips, experiment.fsdp, experiment.tensor).shape
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
    """Trace the programs with so many samples, and as often as it takes to tell their work apart.

    options: as for `programs`.
    """
    seen = traced_once(experiment, samples, **options)
    if any(is_adapted(net) for part in seen.built for net in part.nets.values()):  # products of an adapter's factors
        seen = dataclasses.replace(seen, fixed=fixed_of(seen, traced_once(experiment, 2 * samples, **options)))
    if getattr(experiment.network, "remat", False):
        kept = changed(experiment, {"remat": False})
        model = [work.flops for work in traced_once(kept, samples, **options).works]
        seen = dataclasses.replace(seen, model=model)
    return seen


def traced_once(experiment: Experiment, samples: int, **options: Any) -> Traced:
    """Trace the programs with so many samples, as if all work grew with them and nothing were repeated."""
    mine = dataclasses.replace(experiment, batch_size=samples)
    found, built, notes = programs(mine, samples=samples, **options)
    jaxprs = [program.trace().jaxpr for program in found]
    works = [count(jaxpr) for jaxpr in jaxprs]
    return Traced(found, jaxprs, works, [Work()] * len(found), [work.flops for work in works], built, notes)


def fixed_of(once: Traced, twice: Traced) -> list[Work]:
    """The work that does not grow with the batch, of programs traced with a batch and with one twice as large."""
    return [one.times(2) + two.times(-1) for one, two in zip(once.works, twice.works, strict=True)]


def analysed(experiment: Experiment, chips: int, seen: Traced, *, flash: bool = False) -> list[Analysed]:
    """The programs on each chip of a pod.

    seen: of this experiment, traced with the samples that a chip gets. flash: attention never writes its weights.
    """
    mesh = sharding.abstract_mesh(chips, experiment.fsdp, experiment.tensor)
    tensor = mesh.shape["tensor"] if uses_tensor(seen.built) else 1
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    rows = []
    for i, program in enumerate(seen.programs):
        part = next((b for b in seen.built if b.stage.name == program.stage), seen.built[-1])
        samples = program.stage == SAMPLER
        state, nets = (None, {"student": part.result}) if samples else (part.state, part.nets)
        fixed, jaxpr = seen.fixed[i], seen.jaxprs[i]
        # Products of adapters' factors are split as parameters are, and done again on every copy of them.
        work = (seen.works[i] + fixed.times(-1)).times(1 / tensor) + fixed.times(1 / split)
        leaves = _leaves(nets["student"] if samples else (state, nets), mesh, part)
        parts = {tuple(x.shape): float(n) for _, x, n in leaves if n > 1}
        rows.append(
            Analysed(
                program.name,
                program.stage,
                program.steps,
                program.share,
                program.images * mesh.shape["data"] * mesh.shape["fsdp"],
                work,
                (seen.model[i] - fixed.flops) / tensor + fixed.flops / split,
                _held(state, nets, mesh, part),
                peak(jaxpr, parts, flash=flash),
                (work.flash if flash else work.bytes) + _updates(part, program, mesh),
                _least(jaxpr, program, leaves, mesh),
            )
        )
    return rows


def uses_tensor(built: list[Built]) -> bool:
    """Whether any matrix of the networks is one that "tensor" splits; else its devices do the same work."""
    two = sharding.abstract_mesh(2, 1, 2)
    nets = (placed(part.nets["teacher"], two, part.trainer.rule) for part in built)
    return any("tensor" in leaf.sharding.spec for net in nets for leaf in jax.tree.leaves(net))


def _held(state: State | None, nets: Mapping[str, Any], mesh: AbstractMesh, part: Built) -> dict[str, float]:
    rule = part.trainer.rule
    if state is None:
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


def _leaves(tree: PyTree, mesh: AbstractMesh, part: Built) -> list[tuple[str, Any, int]]:
    """Paths, shapes and numbers of parts of all that a program holds, in the order of its arguments."""
    return [
        (sharding.name_of(path), x, x.size // math.prod(x.sharding.shard_shape(x.shape)))
        for path, x in jax.tree.leaves_with_path(placed(tree, mesh, part.trainer.rule))
    ]


def _least(jaxpr: Any, program: Program, leaves: list[tuple[str, Any, int]], mesh: AbstractMesh) -> Least:
    parts = [n for _, _, n in leaves]
    own = tuple(f"0.params.{name}." for name in program.turn)
    updated = [i for i, (path, _, _) in enumerate(leaves) if own and path.startswith(own)]
    return least(jaxpr, parts + [1] * (len(jaxpr.in_avals) - len(parts)), updated, **mesh.shape)


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
