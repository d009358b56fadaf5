"""An experiment built with shapes alone: its networks and stages, what they hold on each device, its step traced."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddistill import sharding
from ddistill.config import Data, Experiment, Imported, Published, loaded, resolved
from ddistill.datasets import LatentFolder
from ddistill.hub.load import parts_of, plan
from ddistill.hub.tensors import open_tensors
from ddistill.hub.weights import OURS
from ddistill.lora import is_adapted
from ddistill.net import Apply, Net
from ddistill.runs import check_batch, stages
from ddistill.stages import Stage, prepare, result, trainer_of
from ddistill.train import State, Trainer

PyTree = Any


class Row(NamedTuple):
    """A network of a stage.

    parameters: of the network, without those that only students have and that begin at 0. trained: what an optimiser
    touches, of an adapter its own. weights, optimizer, gradients: bytes on each device; weights of an adapter are its
    own, as it shares its base with the teacher. every: it is updated in one step of so many; 0 for never.
    """

    name: str
    parameters: int
    trained: int
    weights: int
    optimizer: int
    gradients: int
    every: int


class StagePlan(NamedTuple):
    """A stage: its steps, the shapes of its first batch by name, and its networks."""

    name: str
    steps: int
    batch: dict[str, str]
    rows: list[Row]

    @property
    def bytes(self) -> int:
        """What all networks of the stage hold on each device, activations aside."""
        return sum(row.weights + row.optimizer + row.gradients for row in self.rows)


class DryRun(NamedTuple):
    """A run as it would be: over how many devices, and what stood in for what was not there."""

    devices: int
    fsdp: int
    tensor: int
    notes: list[str]
    stages: list[StagePlan]


def dry_run(experiment: Experiment, devices: int | None = None) -> DryRun:
    """Build all that a run builds and trace a step of each stage, without weights, and without data if need be.

    devices: the number of devices to plan for, those that are here by default. What is not there, an imported teacher's
    folder or the data, is taken from the experiment's `published`; what is there is used, weights by their headers.
    Raises ValueError for batches and meshes that do not divide the devices, FileNotFoundError for what neither is there
    nor published, and all that building a run raises: for data, conditions and networks that do not fit each other.
    """
    experiment = resolved(experiment)
    devices = jax.device_count() if devices is None else devices
    if devices < 1:
        raise ValueError(f"devices = {devices}: a run needs at least one")
    mesh = sharding.abstract_mesh(devices, experiment.fsdp, experiment.tensor)
    check_batch(experiment, mesh)
    built, notes = build(experiment)
    plans = []
    for part in built:
        stage = part.stage
        part.trainer.step.eval_shape(  # type: ignore[attr-defined]
            part.state, part.nets, part.batch, stage.method.turn(0), stage.steps, stage.round
        )
        part.trainer.rule.check(mesh, {"teacher": part.nets["teacher"], "params": part.state.params})
        seen = {name: _shown(value) for name, value in part.batch.items()}
        plans.append(StagePlan(stage.name, stage.steps, seen, _rows(part.trainer, part.nets, part.state, mesh)))
    return DryRun(devices, experiment.fsdp, experiment.tensor, notes, plans)


class Built(NamedTuple):
    """A stage with shapes for arrays: what trains it, its networks, state, batch, and its result."""

    stage: Stage
    trainer: Trainer
    nets: dict[str, Net]
    state: State
    batch: dict[str, Any]
    result: Net


def build(
    experiment: Experiment, *, mesh: jax.sharding.Mesh | None = None, once: bool = True
) -> tuple[list[Built], list[str]]:
    """The stages of a `resolved` experiment, with shapes for arrays, and what stood in for what was not there.

    mesh: by default of one device that is here. once: a network is traced once for all calls of the same shapes. Raises
    as `dry_run`, devices aside.
    """
    mesh = sharding.local_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    rule = sharding.rule_of(experiment.layout)
    data, notes = _data(experiment)
    key = jax.random.key(experiment.seed)
    if isinstance(experiment.network, Imported):
        net, more = _imported(experiment.network, experiment.published)
        notes += more
    else:
        net = jax.eval_shape(lambda k: experiment.network.build(data, experiment.process, k), key)
    net = dataclasses.replace(net, apply=_Once(net.apply)) if once else net
    batch = _batch(data, experiment.batch_size)
    built = []
    for stage in stages(experiment, data):
        built.append(_built(stage, trainer_of(stage, mesh, rule), net, batch))
        net = built[-1].result
    return built, notes


@dataclass(frozen=True)
class _Once:
    """A network that is traced once for all calls of the same shapes: a method may call it a dozen times."""

    apply: Apply
    transparent = True

    def __call__(self, params, rest, x, t, cond, *, s, key):
        return _traced(self.apply, params, rest, x, t, cond, s, key)


@partial(jax.jit, static_argnums=0)
def _traced(apply, params, rest, x, t, cond, s, key):
    return apply(params, rest, x, t, cond, s=s, key=key)


def _built(stage: Stage, trainer: Trainer, before: Net, batch: PyTree) -> Built:
    teacher = jax.eval_shape(stage.enter, before)
    guided = jax.eval_shape(lambda net: stage.enter(stage.guide(net)), before)
    start = lambda teacher, guided, key: prepare(trainer, teacher, guided, key, stage.space)  # noqa: E731
    nets, state = jax.eval_shape(start, teacher, guided, jax.random.key(0))
    after = jax.eval_shape(lambda state, nets: result(trainer, state, nets), state, nets)
    return Built(stage, trainer, nets, state, _seen(stage, batch), after)


def _rows(trainer: Trainer, nets: dict[str, Net], state: State, mesh: jax.sharding.AbstractMesh) -> list[Row]:
    def held(tree: PyTree) -> int:
        return bytes_on(tree, mesh, trainer.rule)

    method, teacher = trainer.method, nets["teacher"]
    rows = [Row("teacher", _count(teacher.params), 0, held((teacher.params, teacher.rest)), 0, 0, 0)]
    for name, params in state.params.items():
        whole = nets[name].rest["base"] if is_adapted(nets[name]) else params
        weights, every = held(params), method.every.get(name, 1)
        row = Row(name, _count(whole), _count(params, ours=True), weights, held(state.opt[name]), weights, every)
        rows.append(row)
    for name, params in state.ema.items():
        rows.append(Row(f"{name}, average of {method.ema[name][0]}", _count(params), 0, held(params), 0, 0, 0))
    rows += [Row(f"{name}, kept", 0, 0, held(kept), 0, 0, 0) for name, kept in state.memory.items()]
    return rows


def bytes_on(tree: PyTree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rule: sharding.Rule) -> int:
    """What a tree of shapes holds on each device where it lies as the rule says, keys of random numbers aside."""
    leaves, places = jax.tree.leaves(tree), jax.tree.leaves(sharding.state_shardings(mesh, tree, rule))
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _count(params: PyTree, ours: bool = False) -> int:
    named = params.items() if isinstance(params, dict) else enumerate(jax.tree.leaves(params))
    return sum(
        sum(leaf.size for leaf in jax.tree.leaves(value)) for path, value in named
        if ours or not str(path).startswith(OURS)
    )  # fmt: skip


def _data(experiment: Experiment) -> tuple[Data, list[str]]:
    """The data, or what is published of it; and which."""
    data: Any = experiment.data
    if isinstance(data, LatentFolder):
        data = dataclasses.replace(data, verify=False)  # seconds per gigabyte
    try:
        return loaded(data), []
    except FileNotFoundError as error:
        if experiment.published is None:
            raise
        return experiment.published.data, [f"data: the published shapes, as {error}"]


def _imported(network: Imported, published: Published | None) -> tuple[Net, list[str]]:
    """The shapes of an imported teacher, which its folder fits; and where they are from."""
    net = network.abstract(published)
    if published is not None and not network.folder.exists():
        return net, [f"teacher: the published architecture, as {network.folder} does not exist"]
    try:
        tensors = open_tensors(parts_of(network.folder).network)
    except FileNotFoundError as error:
        return net, [f"teacher: its configuration alone, as {error}"]
    plan(tensors, net)
    return net, []


def _batch(data: Data, size: int) -> PyTree:
    """The shapes of a first batch, which is read where there is data."""
    if data.items is not None or data.arrays:
        first = data.first(size, 0)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), first)
    batch: dict[str, Any] = {"x": jax.ShapeDtypeStruct((size, *data.shape), np.dtype(np.float32))}
    if data.none is not None:
        batch["cond"] = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *np.shape(a)), a.dtype), data.none)
    return batch


def _seen(stage: Stage, batch: PyTree) -> PyTree:
    """The shapes of a stage's batch: of teacher pairs where it learns from them."""
    wanted, x = stage.method.pairs, batch["x"]
    if wanted is None:
        return batch
    pairs = {"x": x, "noise": x, **({"cond": batch["cond"]} if "cond" in batch else {})}
    if wanted.points:
        pairs["path"] = jax.ShapeDtypeStruct((x.shape[0], wanted.points + 1, *x.shape[1:]), x.dtype)
    return pairs


def _shown(value: PyTree) -> str:
    """Shapes in words: "float32 [64, 32, 32, 4]", of a structure those of its parts by name."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype} {list(value.shape)}"
    parts = {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in jax.tree.leaves_with_path(value)}
    return ", ".join(f"{name} {_shown(leaf)}" for name, leaf in parts.items())
