"""Claim: rectified flow starts by "initialize v_θ(Z_t, t) with the teacher parameters θ".

The teacher lives in another process: its time, the scale of its input and what it outputs must be converted, or the
parameters mean nothing there. Training 1-RF (flow matching) from a network of the EDM process by the exact conversion,
from the same parameters read as a velocity network, and from random ones: error of the velocity by training step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import Training, case, command_line, conclude, data, gmm2d, network, over_seeds, starts, table

from ddistill.methods.rectified_flow import RectifiedFlow
from ddistill.net import VelocityPrecondition, retime
from ddistill.process import flow

SHOWN = (0, 50, 100, 200, 400, 800)


def main(seeds: int = 3) -> dict:
    """Print the table."""
    plane, there = case(gmm2d()), flow()
    begin = starts(plane, seeds)
    teacher = retime(plane.teacher, plane.process, there)
    keys = jax.random.split(jax.random.key(8), 3)
    t = jax.random.uniform(keys[0], (4000,), minval=0.02, maxval=1.0)
    x = there.diffuse(plane.mixture.sample(keys[1], 4000), jax.random.normal(keys[2], (4000, 2)), t)
    exact = there.velocity(teacher(x, t), x, t)

    @jax.jit
    def error(net):
        return jnp.sqrt(jnp.mean((there.velocity(net(x, t), x, t) - exact) ** 2) / jnp.mean(exact**2))

    method = RectifiedFlow(rate=1.0, ema=0.99)(plane.process)

    def naive(net):
        """The network's parameters, read as those of a velocity network of the flow."""
        bare = network(plane, 0, process=there, precondition=VelocityPrecondition())
        return bare.replace(params=net.params, rest=net.rest)

    inits = {
        "converted": lambda seed: retime(begin[seed], plane.process, there),
        "θ as they are": lambda seed: naive(begin[seed]),
        "random": lambda seed: naive(network(plane, 50 + seed)),
    }
    values = {}
    for name, init in inits.items():
        training = Training(method, data(plane), SHOWN[-1], every=50)

        def one(seed, init=init, training=training):
            seen: dict[int, float] = {}
            training(
                init(seed), teacher, jax.random.key(seed),
                probe=lambda net, step: seen.setdefault(step, float(error(net))),
            )  # fmt: skip
            return seen

        values[name] = over_seeds(seeds, one)
    table(
        "Relative error of the velocity by training step of 1-RF, three modes in the plane",
        ["start", *(str(step) for step in SHOWN)],
        [[name, *(values[name][step] for step in SHOWN)] for name in inits],
    )
    first = {name: np.mean(values[name][0]) for name in inits}
    last = {name: np.mean(values[name][SHOWN[-1]]) for name in inits}
    conclude(
        bool(first["converted"] < 0.1 and first["converted"] < min(last["θ as they are"], last["random"])),
        f"the conversion is needed: converted, the start has an error of {first['converted']:.3f} before any training; "
        f"the same parameters unconverted begin at {first['θ as they are']:.2f} and are at {last['θ as they are']:.3f} "
        f"after {SHOWN[-1]} steps (random ones at {last['random']:.3f}).",
    )
    return values


if __name__ == "__main__":
    command_line(main)
