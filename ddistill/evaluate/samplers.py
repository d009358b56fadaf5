"""Ways to sample that are compared: a teacher under an integrator, a student in so many steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from ddistill import grids
from ddistill.integrators import Solution, euler, heun
from ddistill.methods.base import Made, home, sampling_of
from ddistill.net import Net, Scaled, passes
from ddistill.process import Process
from ddistill.sample import matched_noise, sample
from ddistill.sharding import batch_parts, batch_sharding

Draw = Callable[[Net, Array, Any, Array], Solution]
"""A way to sample with any network: draw(net, noise [B, ...], conditions or None, key) -> Solution."""


@dataclass(frozen=True)
class Sampler:
    """A way to sample: draw(noise [B, ...], conditions or None, key) -> Solution.

    steps: what it was asked for, where that is known.
    """

    name: str
    draw: Callable[[Array, Any, Array], Solution]
    steps: int | None = None


def teacher_sampler(teacher: Net, process: Process, integrator: Callable, steps: int, name: str) -> Sampler:
    """A teacher under an integrator, on Karras' grid of so many steps."""
    solve = teacher_solver(process, integrator, steps)
    return Sampler(name, lambda noise, cond, key: solve(teacher, noise, cond, key), steps)


def teacher_solver(process: Process, integrator: Callable, steps: int) -> Draw:
    """The program of `teacher_sampler`, compiled once for networks that differ in parameters alone.

    A guided network counts as two calls, as it costs.
    """
    grid = grids.karras(process, steps)

    @jax.jit
    def draw(net, x, cond, key):
        solution = integrator(net.bind(cond), process, grid, x)
        return solution._replace(nfe=passes(net) * solution.nfe)

    return draw


def student_sampler(
    student: Net, made: Made, process: Process, steps: int, gamma: float | None = None, guidance: float | None = None
) -> Sampler:
    """The student of a method with so many steps, from noise of the teacher's process.

    gamma, guidance: other than the method's. Raises ValueError for steps that the student does not serve, and for a
    guidance scale where it embeds none.
    """
    draw = student_solver(made, process, home(made, process), steps, gamma, guidance)
    return Sampler("student", lambda noise, cond, key: draw(student, noise, cond, key), steps)


def student_solver(
    made: Made, process: Process, own: Process, steps: int, gamma: float | None = None, guidance: float | None = None
) -> Draw:
    """The program of `student_sampler`, compiled once for networks that differ in parameters alone.

    own: the student's process. Raises as `student_sampler`.
    """
    sampling = sampling_of(made)
    if guidance is not None and sampling.guidance is None:
        raise ValueError(
            f"guidance = {guidance}: this student's guidance is built in; only students of `guidance` or "
            "`lcm` take a scale when they sample"
        )
    times = sampling.times(steps)
    gamma = sampling.gamma if gamma is None else gamma
    w = sampling.guidance if guidance is None else guidance

    @jax.jit
    def draw(net, x, cond, key):
        given = cond if w is None else Scaled(cond, jnp.full(x.shape[:1], w))
        return sample(net, own, times, matched_noise(x, process, own), key, gamma=gamma, cond=given)

    return draw


def samplers(
    teacher: Net, suffix: str, student: Net, made: Made, process: Process, steps: Sequence[int]
) -> list[Sampler]:
    """The rows of the table: the teacher with 35 calls (Heun) and as few as the student's, and the student.

    suffix: what the teacher's names end with, its guidance.
    """
    few = [teacher_sampler(teacher, process, euler, n, f"teacher, Euler{suffix}") for n in sorted(steps, reverse=True)]
    students = [student_sampler(student, made, process, n) for n in sorted(steps)]
    return [teacher_sampler(teacher, process, heun, 18, f"teacher, Heun{suffix}"), *few, *students]


def start(
    process: Process, shape: tuple[int, ...], num_classes: int, count: int, seed: int
) -> tuple[Array, Array | None, Array]:
    """Noise [count, ...] at t_max, labels [count] 0, 1, 2, … in turn (None without classes), a key for γ > 0."""
    k_noise, k_sampler = jax.random.split(jax.random.key(seed))
    labels = jnp.arange(count, dtype=jnp.int32) % num_classes if num_classes else None
    return process.prior(k_noise, (count, *shape)), labels, k_sampler


def across(sampler: Sampler, mesh: Mesh) -> Sampler:
    """The same sampler, which splits its samples over the devices of a mesh, all processes' together.

    The mesh is the one its networks lie on. All processes call it with the same noise, conditions and key, and each
    gets all samples, as arrays of numpy: those that one device would draw, up to rounding.
    """
    if mesh.size == 1:
        return sampler
    split = batch_sharding(mesh)

    def laid(array: Any) -> Array:
        whole = np.asarray(array)
        whole = np.concatenate([whole, np.repeat(whole[:1], -len(whole) % batch_parts(mesh), axis=0)])
        return jax.make_array_from_callback(whole.shape, split, lambda index: whole[index])

    def draw(noise: Array, cond: Any, key: Array) -> Solution:
        solution = sampler.draw(laid(noise), jax.tree.map(laid, cond), key)
        x = process_allgather(solution.x, tiled=True)[: len(noise)]
        return Solution(x, np.asarray(solution.nfe))  # type: ignore[arg-type]  # numpy's, which serve as well

    return replace(sampler, draw=draw)
