"""Q11. "Can we come up with the deterministic sampling" of consistency models?

A consistency model f(x, t) is the trajectory's end point, not the posterior mean, so that the tempting DDIM read-out
x_s = f + (s/t)(x − f) is wrong even for a perfect f: it does not stay on the trajectory. A student must either renoise
(stochastic) or be trained with its destination s (a flow map, such as CTM's). Exact on a Gaussian of standard deviation
.5, where f(x, t) = x · .5/√(.25 + t²); then with trained students in the plane.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from common import Distillation, case, command_line, conclude, gmm2d, over_seeds, starts, table

from ddistill.methods import Consistency
from ddistill.methods.ctm import CTM
from ddistill.net import Net
from ddistill.process import edm
from ddistill.sample import sample

STD = 0.5
STEPS = (1, 2, 4, 8, 16)


def slope(t):
    """f(x, t)/x of the exact consistency function."""
    return STD / np.sqrt(STD**2 + np.asarray(t, np.float64) ** 2)


def geometric(k: int, low: float = 0.02) -> np.ndarray:
    """K + 1 geometric times from 80 to low, and 0 in place of the last."""
    return np.append(np.geomspace(80.0, low, k + 1)[:-1], 0.0)


def read_out(times: np.ndarray) -> float:
    """Standard deviation after the DDIM read-out of the exact f along these times, from N(0, 80² + .25)."""
    std = np.hypot(80.0, STD)
    for t, s in itertools.pairwise(times):
        std *= slope(t) + s / t * (1 - slope(t))
    return float(std)


def renoised(times: np.ndarray, error: float = 0.0) -> float:
    """Standard deviation after multistep consistency sampling with f's slope off by the factor 1 − error."""
    std = np.hypot(80.0, STD)
    for t, s in itertools.pairwise(times):
        std = np.hypot((1 - error) * slope(t) * std, s)
    return float(std)


def flow_map(times: np.ndarray, error: float = 0.0, shared: bool = False) -> float:
    """Standard deviation after the jumps of a flow map whose slope is off by 1 − error, in each jump or over all."""
    std, jumps = np.hypot(80.0, STD), len(times) - 1
    for t, s in itertools.pairwise(times):
        std *= (1 - error) ** (1 / jumps if shared else 1) * slope(t) / slope(s)
    return float(std)


def exact_student(destination: bool) -> Net:
    """The exact student of the Gaussian: f, or, with `destination`, the g(x, t, s) whose jump is the flow map."""

    def apply(params, rest, x, t, cond, *, s, key):
        def shrink(time):
            return STD / jnp.sqrt(STD**2 + time**2)

        to_data = shrink(t)
        to_s = to_data / shrink(s)
        # G = (s/t) x + (1 − s/t) g  =>  g = (G − (s/t) x)/(1 − s/t)
        ratio = s / t
        return x * ((to_s - ratio) / (1 - ratio) if destination else to_data)[:, None]

    return Net({}, {}, apply)


def library(times: np.ndarray, destination: bool, gamma: float) -> float:
    """The same standard deviations by the library's own sampler."""
    x = jax.random.normal(jax.random.key(0), (100_000, 1))
    x = x * np.hypot(80.0, STD) / jnp.std(x)
    key = jax.random.key(1) if gamma else None
    return float(jnp.std(sample(exact_student(destination), edm(), times, x, key, gamma=gamma).x))


def closed_form() -> dict[str, list[float]]:
    """Every row of the first table, by K."""
    grids = [geometric(k) for k in STEPS]
    # K nodes from 80 to .05, then 0: a start of the last jump that is already below the data's scale
    low = [np.append(np.geomspace(80.0, 0.05, k) if k > 1 else [80.0], 0.0) for k in STEPS]
    rows = {
        "f, DDIM read-out": [read_out(times) for times in grids],
        "– by the library's sampler": [library(times, destination=False, gamma=0.0) for times in grids],
        "– last jump from t = .05": [read_out(times) for times in low],
        "f, renoised": [renoised(times) for times in grids],
        "– by the library's sampler ": [library(times, destination=False, gamma=1.0) for times in grids],
        "flow map, deterministic": [flow_map(times) for times in grids],
        "– by the library's sampler  ": [library(times, destination=True, gamma=0.0) for times in grids],
        "error of a renoised f that is 2 % too flat": [STD - renoised(times, 0.02) for times in grids],
        "error of a flow map 2 % too flat over all": [STD - flow_map(times, 0.02, shared=True) for times in grids],
        "error of a flow map 2 % too flat in each jump": [STD - flow_map(times, 0.02) for times in grids],
    }
    table(
        "Standard deviation of the samples of N(0, .5²), K + 1 geometric times from 80 to .02, the last replaced by 0",
        ["student, sampler", *(f"K = {k}" for k in STEPS)],
        [[name.strip(), *values] for name, values in rows.items()],
    )
    return rows


def trained(seeds: int, steps: int) -> dict[tuple[str, int], np.ndarray]:
    """Sliced Wasserstein-2 by K of trained students."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    counts = (1, 2, 4, 8)
    consistency = Distillation(plane, Consistency(), steps)
    flow = Distillation(plane, CTM(), steps)

    def one(seed):
        student = consistency(begin[seed], jax.random.key(seed))
        row: dict = {}
        for k in counts:
            row["consistency, renoised", k] = plane.sw2(student(k))
            row["consistency, DDIM read-out", k] = plane.sw2(student(k, gamma=0.0, times=geometric(k)))
        student = flow(begin[seed], jax.random.key(seed))
        for k in counts:
            row["CTM, γ = 0", k] = plane.sw2(student(k, gamma=0.0))
            row["CTM, γ = 1", k] = plane.sw2(student(k, gamma=1.0))
        return row

    values = over_seeds(seeds, one)
    names = list(dict.fromkeys(name for name, _ in values))
    table(
        "sw2 of students trained on three modes in the plane",
        ["student, sampler", *(f"K = {k}" for k in counts)],
        [[name, *(values[name, k] for k in counts)] for name in names],
    )
    return values


def main(seeds: int = 3, steps: int = 1000) -> dict[str, list[float]]:
    """Print both tables."""
    rows = closed_form()
    values = trained(seeds, steps)
    at8 = {name: np.mean(value) for (name, k), value in values.items() if k == 8}
    read, renoise, flow = (at8[n] for n in ("consistency, DDIM read-out", "consistency, renoised", "CTM, γ = 0"))
    exact_worse = np.all(np.diff(rows["f, DDIM read-out"]) > 0)
    conclude(
        bool(exact_worse and read > 2 * renoise and read > 2 * flow),
        "the deterministic read-out of a consistency model over-disperses, more with every step, even with f exact; "
        "a flow map, which knows its destination, samples deterministically without it.",
    )
    return rows


if __name__ == "__main__":
    command_line(main)
