"""Teacher pairs: noise, and where the teacher's integrator takes it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ddistill import grids, hosts
from ddistill.data.arrays import Source
from ddistill.gathering import Place
from ddistill.integrators import dpmpp_3m
from ddistill.net import Net, laid_out
from ddistill.process import Process
from ddistill.sharding import Rule, batch_parts, batch_sharding, local_mesh, put_batch, replicated, spread

Make = Callable[[int, int], dict[str, np.ndarray]]
"""(first, count) -> the pairs first, …, first + count − 1."""


def teacher_pairs(
    teacher: Net,
    process: Process,
    key: Array,
    count: int,
    shape: tuple[int, ...],
    *,
    steps: int = 64,
    num_classes: int = 0,
    integrator: Callable = dpmpp_3m,
    points: int = 0,
    batch_size: int = 4096,
    devices: Sequence[jax.Device] | None = None,
    place: Place | None = None,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, np.ndarray]:
    """Make `count` pairs: noise [count, ...] at t_max, x [count, ...] at 0, and cond [count] where there are classes.

    Pair i depends on the key and i alone, whatever the batch size and the number of devices (x up to rounding). Labels
    are uniform. points: with n > 0 there is also path [count, n + 1, ...], as `pair_maker` says. place, devices: as
    for `pair_maker`; with neither, several processes, all of which call this, make a part of the pairs each, and get
    all, as they do with a place. report: called before each batch with the pairs that are done, and with their number.
    Raises ValueError for counts below 1 and where the integrator leads to NaN or infinity.
    """
    at_least_one(count=count)
    batch_size, together = min(batch_size, count), devices is None and place is None and jax.process_count() > 1
    make = pair_maker(
        teacher, process, key, shape, steps=steps, num_classes=num_classes, integrator=integrator, points=points,
        batch_size=batch_size, devices=devices, place=place,
    )  # fmt: skip
    if together:
        return _shared_out(make, count, batch_size, report)
    parts = []
    for start in range(0, count, batch_size):
        report(start, count)
        parts.append(make(start, min(batch_size, count - start)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _shared_out(make: Make, count: int, size: int, report: Callable[[int, int], None]) -> dict[str, np.ndarray]:
    """All pairs, made batch by batch by the processes in turn; those beyond the count fill the last batches up."""
    from jax.experimental.multihost_utils import process_allgather

    mine, processes = jax.process_index(), jax.process_count()
    size = min(size, -(-count // processes))
    parts: list[dict[str, np.ndarray]] = []

    def make_mine(start: int) -> None:
        parts.append(make(start + mine * size, size))

    for start in range(0, count, size * processes):
        report(start, count)
        hosts.checked_by_all(functools.partial(make_mine, start))
        parts[-1] = process_allgather(parts[-1], tiled=True)
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def pair_maker(
    teacher: Net,
    process: Process,
    key: Array,
    shape: tuple[int, ...],
    *,
    steps: int = 64,
    num_classes: int = 0,
    integrator: Callable = dpmpp_3m,
    points: int = 0,
    batch_size: int = 4096,
    devices: Sequence[jax.Device] | None = None,
    place: Place | None = None,
) -> Make:
    """What makes any range of the pairs of `teacher_pairs`, compiled once; batches are split over the devices.

    place: the mesh over which they are made, by all of its processes together, and the rule by which the teacher lies
    there, each device holding its part. Without one the teacher is whole on each of `devices`, by default those of this
    process.
    path holds x at the nodes of grids.karras(process, points), noise first and x last. The integrator starts anew in
    each interval between two nodes, with as many steps in each, so that there are at least `steps` in all; the
    last interval, from t_min to 0, takes one. A multistep method is therefore best left to pairs without path. An
    integrator that draws noise is called on each sample alone, with a key of the pair's own.
    """
    at_least_one(steps=steps, batch_size=batch_size)
    if points < 0:
        raise ValueError(f"points = {points} must be 0, for no path, or the number of its intervals")
    mesh = local_mesh(devices) if place is None else place.mesh
    size = -(-batch_size // batch_parts(mesh)) * batch_parts(mesh)
    if place is None:  # a network of an opened run may know of a mesh of several processes
        there = jax.device_put((laid_out(gathered(teacher), None), key), replicated(mesh))
    else:
        there = laid_out(spread(mesh, teacher, place.rule), place), key

    def pairs(first: int, count: int) -> dict[str, np.ndarray]:
        parts = []
        for start in range(first, first + count, size):
            # The last batch is filled up and cut, so that one compilation serves all.
            numbers = start + np.arange(size)
            indices = jax.make_array_from_callback((size,), batch_sharding(mesh), numbers.__getitem__)
            made = _make(*there, indices, process, tuple(shape), steps, num_classes, integrator, points, mesh)
            parts.append(jax.device_get(jax.tree.map(whole, made)))
        made = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        if points:  # here and not in _make, where XLA may compute the noise twice and round differently
            made["path"] = np.concatenate([made["noise"][:, None], made["path"]], axis=1)
        _check_finite(made, first, integrator, steps)
        return made

    return pairs


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8, 9))
def _make(
    teacher: Net,
    key: Array,
    indices: Array,
    process: Process,
    shape: tuple[int, ...],
    steps: int,
    num_classes: int,
    integrator: Callable,
    points: int,
    mesh: Mesh,
) -> dict[str, Array]:
    """The pairs of these numbers; path lacks its first point, the noise."""
    segments = _segments(process, steps, points)
    noisy = _draws_noise(integrator, process, segments[-1][-1], shape)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(indices)
    noise = jax.vmap(lambda k: process.prior(k, shape))(keys[:, 0])
    cond = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(keys[:, 1]) if num_classes else None

    def alone(nodes, x, cond, key, i):
        cond = None if cond is None else cond[None]
        return integrator(teacher.bind(cond), process, nodes, x[None], jax.random.fold_in(key, i)).x[0]

    def step(x, segment):
        nodes, i = segment
        if noisy:
            after = jax.vmap(alone, (None, 0, 0, 0, None))(nodes, x, cond, keys[:, 2], i)
        else:
            after = integrator(teacher.bind(cond), process, nodes, x).x
        return after, after

    x, passed, number = noise, list[Array](), 0
    for part in segments:
        x, ends = jax.lax.scan(step, x, (jnp.asarray(part, x.dtype), number + jnp.arange(len(part))))
        passed.append(jnp.moveaxis(ends, 0, 1))
        number += len(part)
    made = {"noise": noise, "x": x} | ({} if cond is None else {"cond": cond})
    made |= {"path": jnp.concatenate(passed, axis=1)} if points else {}
    return jax.lax.with_sharding_constraint(made, batch_sharding(mesh))


def fresh_program(process: Process, grid: np.ndarray, integrator: Callable, place: Place) -> Callable[..., Any]:
    """The program of `fresh_pairs`: (teacher, key, an array [B, ...] like the samples, cond) -> pairs."""

    @jax.jit
    def make(teacher: Net, key: Array, like: Array, cond: Any) -> dict[str, Array]:
        k_noise, k_steps = jax.random.split(key)
        noise = process.prior(k_noise, like.shape)
        made = {"noise": noise, "x": integrator(laid_out(teacher, place).bind(cond), process, grid, noise, k_steps).x}
        return jax.lax.with_sharding_constraint(made, batch_sharding(place.mesh))

    return make


def fresh_pairs(
    teacher: Net,
    process: Process,
    key: Array,
    data: Source,
    mesh: Mesh,
    *,
    rule: Rule = Rule(),  # noqa: B008
    steps: int = 64,
    integrator: Callable = dpmpp_3m,
) -> Source:
    """Batches of pairs that are made when they are asked for: noise and x, for the cond of a batch of data.

    Nothing is stored, so that conditions may be as large as prompts are, at the price of integrating the teacher for
    each batch. The noise depends on the key and the step alone. Batches lie on the mesh, as the teacher does by the
    rule.
    """
    at_least_one(steps=steps)
    make = fresh_program(process, grids.karras(process, steps), integrator, Place(mesh, rule))

    def source(step: int) -> dict[str, Any]:
        batch = put_batch(mesh, {name: a for name, a in data(step).items() if name in ("x", "cond")})
        return batch | make(teacher, jax.random.fold_in(key, step), batch["x"], batch.get("cond"))

    return source


def gathered(teacher: Net) -> Net:
    """The teacher with every array whole in this process, also where several processes share it."""
    return jax.tree.map(whole, teacher)


def whole(array: Any) -> Any:
    """An array whole in this process; of one that several processes share, all of which call this, a copy."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(array, tiled=True)


def at_least_one(**counts: int) -> None:
    """Raise ValueError for the first of the named counts below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} = {count} must be at least 1")


def _segments(process: Process, steps: int, points: int) -> list[np.ndarray]:
    """Grids that follow each other, equally long ones stacked: arrays [segments, steps in each + 1]."""
    if points < 2:
        return [grids.karras(process, steps)[None]]
    coarse = grids.karras(process, points)
    if process.t_min == 0:  # the ramp itself ends at the data
        each = max(1, -(-steps // points))
        fine = grids.karras(process, points * each)
        fine[::each] = coarse
        return [fine[np.arange(points)[:, None] * each + np.arange(each + 1)]]
    each = max(1, -(-(steps - 1) // (points - 1)))
    # Without its last node, 0, Karras' grid of (points − 1) each + 1 intervals subdivides that of `points`.
    fine = grids.karras(process, (points - 1) * each + 1)
    fine[:-1:each] = coarse[:-1]
    rows = np.arange(points - 1)[:, None] * each + np.arange(each + 1)
    return [fine[rows], fine[None, -2:]]


def _draws_noise(integrator: Callable, process: Process, nodes: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether the integrator refuses to work without a key."""
    try:
        jax.eval_shape(lambda x: integrator(lambda x, t: x, process, nodes, x).x, jnp.zeros((1, *shape)))
    except ValueError:  # with a key it says whatever else may be wrong
        return True
    return False


def _check_finite(made: dict[str, np.ndarray], first: int, integrator: Callable, steps: int) -> None:
    bad = ~np.isfinite(made["x"].reshape(len(made["x"]), -1)).all(axis=1)
    if bad.any():
        name = getattr(integrator, "__name__", str(integrator))
        raise ValueError(
            f"{name} with {steps} steps led {bad.sum()} of {len(bad)} samples to NaN or infinity, the first from pair "
            f"{first + int(np.argmax(bad))}: take more steps or another integrator, or look at the teacher"
        )
