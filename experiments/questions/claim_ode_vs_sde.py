"""Claim: "ODE solvers have lower error than SDE ones → less sampling steps".

For few network calls, yes. With many, the reverse SDE keeps contracting the errors that an imperfect network makes,
which the ODE carries along to the end: sliced Wasserstein-2 by the number of calls, with the exact denoiser and with a
network that was fitted briefly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, case, command_line, conclude, fitting, gmm8, network, over_seeds, table

from ddistill import grids
from ddistill.integrators import ddim, ddpm, dpmpp_2m, heun, heun_churn, sde_dpmpp_2m
from ddistill.net import Net

CALLS = (4, 12, 96)
ODE = {"DDIM": ddim, "Heun": heun, "DPM++(2M)": dpmpp_2m}
SDE = {"DDPM": ddpm, "SDE-DPM++(2M)": sde_dpmpp_2m, "EDM churn": heun_churn}


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(integrator, process, net, grid, noise, key):
    """Samples along a grid."""
    return integrator(net.bind(), process, grid, noise, key).x


def errors(plane: Case, net: Net, key: jax.Array) -> dict:
    """sw2 by sampler and number of network calls."""
    row = {}
    for name, integrator in (ODE | SDE).items():
        for calls in CALLS:
            # Heun's method makes two calls in each step but the last
            steps = (calls + 1) // 2 if integrator in (heun, heun_churn) else calls
            grid = jnp.asarray(grids.karras(plane.process, steps), jnp.float32)
            x = solve(integrator, plane.process, net, grid, plane.noise, jax.random.fold_in(key, calls))
            row[name, calls] = plane.sw2(x)
    return row


def main(seeds: int = 3, fit_steps: int = 150) -> dict:
    """Print the tables."""
    plane = case(gmm8(), 2000)
    fit = fitting(plane, fit_steps)
    exact = over_seeds(seeds, lambda seed: errors(plane, plane.teacher, jax.random.key(seed)))

    def one(seed):
        net = fit(network(plane, seed), plane.teacher, jax.random.key(seed))
        return errors(plane, net, jax.random.key(100 + seed))

    fitted = over_seeds(seeds, one)
    for what, values in (("the exact denoiser", exact), (f"a network fitted for {fit_steps} steps", fitted)):
        table(
            f"sw2 of eight modes in the plane by network calls, {what}",
            ["sampler", "kind", *(str(calls) for calls in CALLS)],
            [[name, "ODE" if name in ODE else "SDE", *(values[name, calls] for calls in CALLS)] for name in ODE | SDE],
        )

    def best(group, calls):
        return min(float(np.mean(fitted[name, calls])) for name in group)

    few, many = CALLS[1], CALLS[-1]
    ode, sde = ({calls: best(group, calls) for calls in CALLS} for group in (ODE, SDE))
    conclude(
        ode[few] < sde[few] and ode[many] > sde[many],
        f"for {few} calls the best ODE solver wins, {ode[few]:.3f} against {sde[few]:.3f}; for {many} calls of an "
        f"imperfect network the best SDE solver does, {sde[many]:.3f} against {ode[many]:.3f}.",
    )
    return fitted


if __name__ == "__main__":
    command_line(main)
