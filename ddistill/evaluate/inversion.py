"""Encoding data to the noise it comes from, decoding it again, and editing by decoding under another condition.

Whatever runs both ways, a two-way student, a teacher under an integrator or the exact flow, is an `Inverter`, and is
judged by the same numbers: how far its noise is from that of the exact flow, and how far the round trip misses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill import grids
from ddistill.evaluate.mixture import SCALE
from ddistill.integrators import ddim
from ddistill.integrators.exact import flow_map
from ddistill.mixture import Mixture
from ddistill.net import Net
from ddistill.process import Process
from ddistill.sample import sample


@dataclass(frozen=True)
class Inverter:
    """Two maps between data x0 [B, ...] and noise [B, ...] at t_max: encode(x0, cond) and decode(noise, cond).

    calls: network calls each way; None for an adaptive solver.
    """

    name: str
    encode: Callable[[Array, Any], Array]
    decode: Callable[[Array, Any], Array]
    calls: int | None = None


def student_inverter(student: Net, process: Process, times) -> Inverter:
    """A two-way student (`net.two_way`) along its method's sampling times, from t_max down to the data."""
    down, up = jnp.asarray(times), encoding_times(process, times)
    move = jax.jit(lambda net, x, times, cond: sample(net, process, times, x, cond=cond).x)
    return Inverter(
        "student", lambda x, cond: move(student, x, up, cond), lambda x, cond: move(student, x, down, cond),
        len(down) - 1,
    )  # fmt: skip


def teacher_inverter(teacher: Net, process: Process, steps: int, integrator: Callable = ddim) -> Inverter:
    """A teacher on Karras' grid of so many steps between t_min, where the data is taken to be, and t_max.

    integrator: a deterministic one; with `ddim` this is DDIM inversion (Song et al. 2021, sec. 4.3).
    """
    down = grids.karras(process, steps, final=None)

    @jax.jit
    def up_to(net, x, cond):
        return integrator(net.bind(cond), process, down[::-1], x)

    @jax.jit
    def down_to(net, x, cond):
        return integrator(net.bind(cond), process, down, x)

    return Inverter(
        f"teacher, {integrator.__name__}",
        lambda x, cond: up_to(teacher, x, cond).x,
        lambda x, cond: down_to(teacher, x, cond).x,
        steps,
    )


def exact_inverter(teacher: Net, process: Process) -> Inverter:
    """The exact flow of a teacher, by an adaptive solver (`integrators.exact.flow_map`); slow."""

    def move(x, cond, t, s):
        return flow_map(teacher.bind(cond), process, x, t, s)

    return Inverter(
        "exact flow",
        lambda x, cond: move(x, cond, 0.0, process.t_max),
        lambda x, cond: move(x, cond, process.t_max, 0.0),
    )


def encoding_times(process: Process, times) -> Array:
    """Sampling times turned round, with the data taken to be at t_min: no jump starts at σ = 0."""
    ascending = jnp.asarray(times)[::-1]
    return ascending.at[0].max(process.t_min)


def inversion_metrics(
    inverter: Inverter, process: Process, x0: Array, noise: Array | None = None, cond: Any = None
) -> dict[str, float]:
    """Errors of encoding and decoding x0 [N, ...], of which `noise` is the exact flow's code.

    encoding: root-mean-square distance of codes to `noise` over the noise's standard deviation σ(t_max), where `noise`
    is given. round_trip: of decoded codes to x0, over the standard deviation of x0. Each also as its median over
    samples, since few points between modes carry most of the mean square.
    """
    code = inverter.encode(x0, cond)
    trip = _errors(inverter.decode(code, cond), x0, float(np.std(np.asarray(x0, np.float64))))
    if noise is None:
        return _summary("round_trip", trip)
    sigma = float(process.sigma(process.t_max))
    return {**_summary("encoding", _errors(code, noise, sigma)), **_summary("round_trip", trip)}


def edit(inverter: Inverter, x0: Array, source: Any, target: Any) -> tuple[Array, Array]:
    """Encode x0 under the condition `source` and decode it under `target`: the noise, and the edited x0.

    What the noise says beyond the condition, the place within a mode for example, is kept. Both fields are to be
    unguided or mildly guided: a high scale makes the encoding inexact (Starodubcev et al. 2024, sec. 4).
    """
    noise = inverter.encode(x0, source)
    return noise, inverter.decode(noise, target)


def edit_metrics(mixture: Mixture, process: Process, edited: Array, exact: Array, target: Array) -> dict[str, float]:
    """How well edits [N, d] on a mixture follow the exact flow's edits of the same points, with classes `target` [N].

    hits: share of edits nearest, by posterior at t_min, to a component of the class asked for. position: root-mean-
    square distance to `exact` over the data's scale, and its median over samples.
    """
    modes = jnp.argmax(mixture.responsibilities(process, edited, process.t_min), axis=1)
    hits = float(np.mean(np.asarray(mixture.labels)[np.asarray(modes)] == np.asarray(target)))
    return {"hits": hits, **_summary("position", _errors(edited, exact, SCALE))}


def _errors(a, b, scale: float) -> np.ndarray:
    difference = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / scale
    return np.sqrt(np.mean(difference.reshape(len(difference), -1) ** 2, axis=1))


def _summary(name: str, errors: np.ndarray) -> dict[str, float]:
    return {name: float(np.sqrt(np.mean(errors**2))), f"{name}_median": float(np.median(errors))}
