"""Q1. "The effect of scores for t ≫ 0" in distribution matching: do they "help to avoid unreliable scores"?

(1) σ² dKL/dm for a fake N(m, .3²) that sits on the left of two modes at ±3: which noise levels say that there is a
right one. (2) Particles with the exact score of their own distribution, matched to .7 N(−3, .3²) + .3 N(3, .3²) at low
noise, high noise, all of it, and high before low. (3) The error of a network's score at samples of the data and at
samples that a generator may draw but the data do not have.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import case, command_line, conclude, gmm2d, over_seeds, starts, table
from drawing import Panel, picture
from particle import RANGE, Particles, centred, collapsed, matching, summary, uneven

SIGMAS = (0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 10.0)
RANGES = {"low, [.02, .3]": (0.02, 0.3), "high, [1, 10]": (1.0, 10.0), "all, [.02, 10]": RANGE}
STARTS = {"N(0, 1)": centred, "left mode": collapsed}
MEASURES = {"right": "mass right of 0 (.3)", "W1": "W1", "width": "width within modes (.3)"}


def pull(sigma: float, std: float = 0.3, a: float = 3.0) -> float:
    """σ² dKL/dm of N(m, std²) from ½ N(−a, std²) + ½ N(a, std²), both noised by σ, at m = −a; by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(300)
    variance = std**2 + sigma**2
    x = -a + np.sqrt(variance) * nodes
    right = 1 / (1 + np.exp(-np.clip(2 * a * x / variance, -700, 700)))
    # s_fake − s_real = (μ_fake(x) − Σ r_k μ_k)/(σ² + std²), of which the left mode's part cancels
    return float(-(sigma**2) / variance * weights @ (2 * a * right) / weights.sum())


def score_errors(seeds: int, steps: int) -> dict[tuple[str, float], np.ndarray]:
    """Relative error of a fitted network's score at noised samples of the data and of N(0, 1), twice as broad."""
    plane = case(gmm2d())
    nets = starts(plane, seeds, steps)

    def one(seed):
        keys, row = jax.random.split(jax.random.key(seed), 3), {}
        places = {"data": plane.mixture.sample(keys[0], 2000), "generator": jax.random.normal(keys[1], (2000, 2))}
        for name, x in places.items():
            for sigma in SIGMAS[:2] + SIGMAS[3:]:
                x_t = x + sigma * jax.random.normal(keys[2], x.shape)
                true = plane.teacher(x_t, sigma)
                wrong = jnp.mean((nets[seed](x_t, sigma) - true) ** 2) / jnp.mean((true - x_t) ** 2)
                row[name, sigma] = float(jnp.sqrt(wrong))
        return row

    return over_seeds(seeds, one)


def main(seeds: int = 3, steps: int = 1500, out: str | None = None) -> dict:
    """Print the tables."""
    pulls = {sigma: pull(sigma) for sigma in SIGMAS}
    table("σ² dKL/dm at the left one of two modes", ["", *map(str, SIGMAS)], [["σ² dKL/dm", *pulls.values()]])

    runs = {name: Particles(uneven(), matching(), *bounds, steps=steps) for name, bounds in RANGES.items()}
    halves = [Particles(uneven(), matching(), *RANGES[name], steps=steps // 2 or 1) for name in list(RANGES)[1::-1]]

    def one(seed):
        key, row = jax.random.key(seed), {}
        for start, begin in STARTS.items():
            ends = {name: run(begin(key), key) for name, run in runs.items()}
            ends["high, then low"] = halves[1](jnp.asarray(halves[0](begin(key), key)), key)
            for name, x in ends.items():
                row |= {(start, name, what): value for what, value in summary(x, uneven()).items()}
        return row

    values = over_seeds(seeds, one)
    names = [*RANGES, "high, then low"]
    rows = [[s, n, *(values[s, n, what] for what in MEASURES)] for s in STARTS for n in names]
    table("Particles matched at these noise levels", ["start", "σ", *MEASURES.values()], rows)

    errors = score_errors(seeds, min(steps, 600))
    sigmas = sorted({sigma for _, sigma in errors})
    table(
        "Relative error of a network's score by σ, data of scale .5",
        ["noised samples of", *map(str, sigmas)],
        [[name, *(errors[name, sigma] for sigma in sigmas)] for name in ("data", "generator")],
    )
    mean = {name: float(np.mean(value)) for name, value in (values | errors).items()}
    low, high, every, both = names
    lost = "left mode"
    off = {sigma: mean["generator", sigma] / mean["data", sigma] for sigma in sigmas}
    conclude(
        bool(
            mean[lost, low, "right"] < 0.01
            and mean[lost, high, "right"] > 0.2
            and mean[lost, high, "width"] > 1.2 * mean[lost, both, "width"]
            and off[sigmas[0]] > 2 * off[sigmas[-1]]
        ),
        "they move mass between modes, which low noise never does: from the left mode "
        f"{mean[lost, low, 'right']:.2f} of the particles get to the right by low noise, "
        f"{mean[lost, high, 'right']:.2f} "
        "by high noise (.3 is true). High noise alone leaves the modes "
        f"{mean[lost, high, 'width'] / 0.3:.1f} times too "
        f"broad; high before low errs by {mean[lost, both, 'W1']:.2f} in W1, all at once by "
        f"{mean[lost, every, 'W1']:.2f}. And a network's scores off the data are {off[sigmas[0]]:.1f} "
        "times as wrong as "
        f"on them at σ = {sigmas[0]:g}, {off[sigmas[-1]]:.1f} times at σ = {sigmas[-1]:g}.",
    )
    if out:
        levels = {"true": 0.3}
        picture(
            out,
            Panel("what a fake on the left feels", "σ", "σ² dKL/dm", SIGMAS, {"": list(pulls.values())}, log="x"),
            *(
                Panel(
                    f"particles: {MEASURES[what]}", "", "", names,
                    {f"from {s}": [values[s, n, what] for n in names] for s in STARTS}, levels=levels,
                )
                for what in ("right", "width")
            ),
            Panel(
                "error of a network's score", "σ", "relative error", sigmas,
                {f"at samples of the {n}": [errors[n, s] for s in sigmas] for n in ("data", "generator")}, log="xy",
            ),
        )  # fmt: skip
    return {"pulls": pulls} | values | errors


if __name__ == "__main__":
    command_line(main)
