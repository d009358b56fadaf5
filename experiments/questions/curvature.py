"""Research direction: "focus on the trajectory's properties": times where the teacher's trajectories bend.

(1) Where they bend: E ‖dε̂/dλ‖² over the half-log-SNR λ. (2) Consistency distillation with its grid laid, or only its
times drawn, uniformly in Karras' index, uniformly in log-SNR, or by curvature, at equal cost. (3) The teacher itself on
grids with equal shares of each law in every interval.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, Training, case, command_line, conclude, draw, gmm2d, isotropic, over_seeds, starts, table
from jax import Array

from ddistill import grids
from ddistill.integrators import ddim, heun
from ddistill.losses.curvature import Curved, curvature, curved, flat
from ddistill.losses.distances import PseudoHuber
from ddistill.methods.base import Method, Sampling, from_teacher
from ddistill.methods.consistency import renoising_times
from ddistill.mixture import Mixture
from ddistill.net import Net
from ddistill.process import Process

INTERVALS = 14
COLUMNS = ("endpoint, 1 step", "sw2, 1 step", "sw2, 4 steps")


def unseen(seed: int = 5) -> Mixture:
    """Ten modes of uneven weights and sizes that nothing here was tuned on."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, 10)
    return isotropic(weights / weights.sum(), rng.normal(size=(10, 2)).tolist(), rng.uniform(0.001, 0.02, 10))


def consistency(process: Process) -> Method:
    """Consistency distillation at the times of its batches: t, s one interval below, and the solver's node between."""

    def loss(nets, batch, progress, key):
        x0, t, s = batch["x"], batch["t"], batch["s"]
        x_t = process.diffuse(x0, jax.random.normal(key, x0.shape), t)
        x_s = heun(nets["teacher"].bind(), process, jnp.stack([t, batch["middle"], s]), x_t).x
        f_t, f_s = (nets["student"].jump(process, x, r, jnp.zeros_like(r)) for x, r in ((x_t, t), (x_s, s)))
        return jnp.mean(batch["weight"] / (t - s) * PseudoHuber()(f_t, jax.lax.stop_gradient(f_s))), {}

    return Method(
        losses={"student": loss}, init={"student": from_teacher}, ema={"ema": ("student", 0.99)}, result="ema",
        needs=frozenset({"x"}), sampling=Sampling(lambda steps: renoising_times(process, steps), gamma=1.0),
    )  # fmt: skip


def timetable(process: Process, grid: Curved, law: Curved, weigh: bool = False, rows: int = 2**16) -> dict[str, Array]:
    """Times t of the law, with a share 1/n at t_min, and s one interval below on the grid of n + 1 nodes down to 0.

    The grid's nodes up to n − 1 are at equal shares of `grid`. weigh: each time counts as under the grid's own law.
    """
    k_t, k_last = jax.random.split(jax.random.key(4))
    n = INTERVALS

    def node(i: Array) -> Array:
        return jnp.where(i >= n, 0.0, grid.warp(process, jnp.minimum(i / (n - 1), 1.0)))

    last = jax.random.uniform(k_last, (rows,)) * n < 1
    t = jnp.where(last, process.t_min, law(process, k_t, rows))
    i = jnp.where(last, n - 1.0, (n - 1) * grid.position(process, t))
    middle = jnp.where(last, 0.5 * t, node(jnp.minimum(i + 0.5, n - 1)))
    middle = jnp.where(middle < t, middle, 0.5 * t)
    weight = law.weight(process, t, grid) if weigh else jnp.ones_like(t)
    return {"t": t, "middle": middle, "s": node(i + 1), "weight": weight}


def laws(problem: Case, intervals: int = 64) -> tuple[Curved, Curved, Callable[[float, float], Curved]]:
    """Karras' grid, the grid uniform in log-SNR, and by curvature: from its share of Karras' law and its power."""
    process, key = problem.process, jax.random.key(3)
    x0 = problem.mixture.sample(jax.random.key(2), 2000)
    grid = grids.karras(process, intervals, final=None)

    def bent(uniform: float, power: float) -> Curved:
        return curved(problem.teacher.bind(), process, x0, key, grid, uniform=uniform, power=power)

    karras = flat(bent(0.5, 1.0))
    spans = np.diff(karras.nodes) / (karras.nodes[-1] - karras.nodes[0])
    return karras, dataclasses.replace(karras, shares=tuple(map(float, spans))), bent


def profile(problem: Case) -> list[float]:
    """Where E ‖dε̂/dλ‖² is largest, and what the fifth of λ with the most of it holds."""
    lam = jnp.linspace(-4.0, 6.0, 201)
    x0 = problem.mixture.sample(jax.random.key(2), 2000)
    k2 = np.asarray(curvature(problem.teacher.bind(), problem.process, x0, lam, jax.random.key(3))) ** 2
    return [float(np.exp(-lam[k2.argmax()])), float(np.sort(k2)[::-1][:40].sum() / k2.sum())]


@functools.partial(jax.jit, static_argnums=1)
def walk(teacher: Net, process: Process, grid: Array, x: Array) -> Array:
    """Where DDIM takes x along a grid."""
    return ddim(teacher.bind(), process, grid, x).x


def teacher_errors(problem: Case, law: Curved) -> list[float]:
    """Endpoint errors of DDIM with 4, 8 and 16 steps on the grid of equal shares of a law."""

    def error(steps):
        grid = jnp.append(law.warp(problem.process, jnp.linspace(0, 1, steps)), 0.0)
        return problem.endpoint(walk(problem.teacher, problem.process, grid, problem.noise))

    return [error(steps) for steps in (4, 8, 16)]


def students(problem: Case, variants: dict[str, dict[str, Array]], seeds: int, steps: int) -> dict[str, dict]:
    """Students trained at each timetable, judged over seeds; all share one compilation."""
    process, nets = problem.process, starts(problem, seeds, 800)

    def batches(key, store):
        k_x, k_rows = jax.random.split(key)
        rows = jax.random.randint(k_rows, (256,), 0, len(store["t"]))
        return {"x": problem.mixture.sample(k_x, 256), **{name: a[rows] for name, a in store.items()}}

    train = Training(consistency(process), batches, steps)

    def judged(seed, store):
        net = train(nets[seed], problem.teacher, jax.random.key(seed), store)
        one, four = (
            draw(net, process, renoising_times(process, n), problem.noise, jax.random.key(5), 1.0) for n in (1, 4)
        )
        return dict(zip(COLUMNS, (problem.endpoint(one), problem.sw2(one), problem.sw2(four)), strict=True))

    return {name: over_seeds(seeds, lambda seed, store=store: judged(seed, store)) for name, store in variants.items()}


def main(seeds: int = 3, steps: int = 600) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Print the tables."""
    cases = {"grid25": case(Mixture.load("grid25")), "unseen": case(unseen())}
    rows = [[n, *profile(p)] for n, p in {"three modes": case(gmm2d(), scale=False), **cases}.items()]
    header = ["mixture", "σ/α of the largest E‖dε̂/dλ‖²", "share of it in the top fifth of λ in [−4, 6]"]
    table("Where trajectories bend", header, rows)
    results: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    errors: dict[str, dict[str, list[float]]] = {}
    noisy: dict[str, dict[str, float]] = {}
    for name, problem in cases.items():
        karras, log_snr, bent = laws(problem)
        half = bent(0.5, 1.0)
        variants = {
            "Karras' index": (karras, karras),
            "log-SNR": (log_snr, log_snr),
            "half curvature, grid and draws": (half, half),
            "half curvature, draws alone": (karras, half),
            "half curvature, draws alone, weighted back": (karras, half, True),
        }
        tables = {label: timetable(problem.process, *args) for label, args in variants.items()}
        results[name] = students(problem, tables, seeds, steps)
        lines = [[label, *row.values()] for label, row in results[name].items()]
        title = f"Consistency distillation of {name}, {steps} steps, {INTERVALS} intervals"
        table(title, ["grid and law of times", *COLUMNS], lines)
        of = {
            "Karras": karras,
            "log-SNR": log_snr,
            "half curvature": half,
            "curvature": bent(0.001, 1.0),
            "√curvature": bent(0.001, 0.5),
        }
        errors[name] = {label: teacher_errors(problem, law) for label, law in of.items()}
        noisy[name] = {
            label: sum(s for s, lam in zip(of[label].shares, of[label].nodes[1:], strict=True) if lam < 0)
            for label in ("Karras", "half curvature")
        }
        lines = [[label, *row] for label, row in errors[name].items()]
        table(f"The teacher of {name} by DDIM: endpoint", ["grid", "4 steps", "8 steps", "16 steps"], lines)

    def end(name, label):
        return float(results[name][label][COLUMNS[0]].mean())

    base, laid, back = "Karras' index", "half curvature, grid and draws", "half curvature, draws alone, weighted back"
    students_text = "; ".join(
        f"on {name} the one-step endpoint is {end(name, base):.3f} in Karras' index, {end(name, laid):.3f} on a grid "
        f"by curvature and {end(name, back):.3f} with draws alone by curvature, weighted back (of the draws "
        f"{100 * share['Karras']:.0f} and {100 * share['half curvature']:.0f} % have σ/α > 1)"
        for name, share in noisy.items()
    )
    teacher_text = "; ".join(
        f"{e['half curvature'][1]:.3f} instead of {e['Karras'][1]:.3f} on {name}" for name, e in errors.items()
    )
    conclude(
        all(end(name, laid) > 1.1 * end(name, base) for name in cases)
        and all(e["half curvature"][1] < e["Karras"][1] for e in errors.values()),
        f"not for students: {students_text}. For the teacher's own integrator, yes: DDIM in 8 steps errs by "
        f"{teacher_text}.",
    )
    return results


if __name__ == "__main__":
    command_line(main)
