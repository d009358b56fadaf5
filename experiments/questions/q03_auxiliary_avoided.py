"""Q3. "Can we avoid training the auxiliary DPM for s_fake(x_t, t)?" and from which noise level and sample count?

Distribution matching of one-step students of eight modes in 2 and in 16 dimensions, with as many updates of the
student, by where s_fake comes from: a network trained beside the student on its samples, whole or an adapter, with
plain or stable targets; point masses (score distillation); the batch's own samples, n of them; or samples above a noise
level σ* and a network trained below it alone. Noise levels σ and σ* are for data of scale .5.
"""

import time
from dataclasses import dataclass

import jax
import numpy as np
from common import Distillation, case, command_line, conclude, digits, gmm8, over_seeds, published, starts, table
from drawing import Panel, picture

from ddistill.lora import LoRA
from ddistill.losses.times import KarrasRamp
from ddistill.methods.fake_scores import Auxiliary, Delta, Fake, Hybrid, MultiSample
from ddistill.process import edm

DIMENSIONS = (2, 16)
SWITCHES = (0.1, 0.5)
EVERY = 2


@dataclass(frozen=True)
class Below:
    """The law of KarrasRamp(0, 1) for σ up to a bound."""

    bound: float

    def __call__(self, process, key, n):
        """Draw n times."""
        top, bottom, bound = (v ** (1 / 7) for v in (process.t_max, process.t_min, self.bound))
        return KarrasRamp((top - bound) / (top - bottom), 1.0)(process, key, n)


FAKES: dict[str, tuple[Fake, int]] = {
    "network": (Auxiliary(stable=False), 256),
    "network, stable targets": (Auxiliary(), 256),
    "its LoRA of rank 4": (Auxiliary(lora=LoRA(4)), 256),
    "point masses": (Delta(), 256),
    **{f"samples, n = {n}": (MultiSample(), n) for n in (16, 64, 256)},
    **{f"samples above σ = {s:g}, network below": (Hybrid(s, below=Auxiliary(Below(s))), 256) for s in SWITCHES},
}


def main(seeds: int = 3, steps: int = 500, out: str | None = None) -> dict:
    """Print the tables. steps: updates of the student."""
    values: dict = {}
    for d in DIMENSIONS:
        world = case(gmm8(d))
        begin = starts(world, seeds, 500, width=64, blocks=2)
        runs = {}
        for name, (fake, size) in FAKES.items():
            every = EVERY if fake.networks(edm(), lambda nets, batch, key: None) else 1
            runs[name] = Distillation(world, published(fake, every=every), steps * every, size=size)

        def one(seed, world=world, begin=begin, runs=runs, d=d):
            row: dict = {}
            for name, run in runs.items():
                started = time.process_time()
                student = run(begin[seed], jax.random.key(seed))
                x = jax.block_until_ready(student(1))
                row["seconds", d, name] = time.process_time() - started
                found = world.judge(x)
                row |= {(what, d, name): found[what] for what in ("sw2", "precision", "recall")}
                row["spread", d, name] = np.nan if found["spread"] is None else found["spread"]
            return row

        found = over_seeds(seeds, one)
        # The first seed's time has the compilation in it.
        values |= {n: v[1:].mean() if n[0] == "seconds" and seeds > 1 else v for n, v in found.items()}
        table(
            f"One step of students of eight modes, d = {d}, {steps} updates",
            ["s_fake", "sw2", "precision", "recall", "width within modes", "CPU s"],
            [
                [n, *(values[w, d, n] for w in ("sw2", "precision", "recall", "spread")),
                 digits(float(np.mean(values["seconds", d, n])), 2)]
                for n in FAKES
            ],
        )  # fmt: skip
    sw2 = {(d, n): float(np.mean(values["sw2", d, n])) for d in DIMENSIONS for n in FAKES}
    wide = {(d, n): float(np.mean(values["spread", d, n])) for d in DIMENSIONS for n in FAKES}
    networks, points, *samples = list(FAKES)[:3], *list(FAKES)[3:7]
    hybrids = list(FAKES)[7:]
    best = {d: min((sw2[d, n], n) for n in networks) for d in DIMENSIONS}
    mixed = {d: min((sw2[d, n], n) for n in hybrids) for d in DIMENSIONS}
    most = samples[-1]
    conclude(
        bool(all(sw2[d, most] < best[d][0] and sw2[d, points] > 2 * sw2[d, most] for d in DIMENSIONS)),
        f"yes, while samples are dense enough: after as many updates the batch's own 256 samples give sw2 "
        f"{sw2[2, most]:.3f} in two dimensions and {sw2[16, most]:.3f} in 16, the best network {best[2][0]:.3f} and "
        f"{best[16][0]:.3f}, at less cost. 64 samples: {sw2[2, samples[1]]:.3f} and {sw2[16, samples[1]]:.3f}; 16: "
        f"{sw2[2, samples[0]]:.3f} and {sw2[16, samples[0]]:.3f}; point masses, that is score distillation, fail: "
        f"{sw2[2, points]:.2f} and {sw2[16, points]:.2f}. With a network below σ* alone, the better of two, it is "
        f"{mixed[2][0]:.3f} and {mixed[16][0]:.3f}. Modes are {wide[2, most]:.2f} and "
        f"{wide[16, most]:.2f} times as wide "
        f"as they should be by samples, {wide[2, best[2][1]]:.2f} and {wide[16, best[16][1]]:.2f} times "
        "by the network.",
    )
    if out:
        picture(
            out,
            *(
                Panel(
                    title, "", "", list(FAKES),
                    {f"d = {d}": [values[what, d, n] for n in FAKES] for d in DIMENSIONS}, log=log, levels=levels,
                )
                for what, title, log, levels in (
                    ("sw2", "sw2", "x", {}), ("spread", "width within modes", "", {"true": 1.0}),
                )
            ),
        )  # fmt: skip
    return values


if __name__ == "__main__":
    command_line(main)
