"""Research direction: "localised integration", a student that differs from its teacher in a small part of the weights.

One-step students by knowledge distillation, of a small network on 25 modes. (1) LoRA of every kernel at rank r, and
what is left of the fully trained student's own update when it is cut to rank r afterwards. (2) One group of layers
trained whole, the others frozen: where do the weights matter?
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import Training, case, command_line, conclude, draw, over_seeds, starts, table

from ddistill import lora
from ddistill.data.pairs import teacher_pairs
from ddistill.lora import LoRA
from ddistill.methods import KD
from ddistill.methods.lora import Adapted
from ddistill.mixture import Mixture

RANKS = (1, 2, 4, 8, 16)
GROUPS = {
    "embedding of the time": ("time.*", "embed.*"),
    "modulations": ("blocks.*.modulation.*",),
    "inward (reads x)": ("inward.*",),
    "outward": ("outward.*",),
    "blocks' first kernels": ("blocks.*.expand.*",),
    "blocks' second kernels": ("blocks.*.contract.*",),
}
USED = ("time.kernel", "embed.kernel", "inward.kernel", "outward.kernel", "blocks.*.kernel")


def main(seeds: int = 3, steps: int = 800) -> dict[str, dict[str, np.ndarray]]:
    """Print the tables."""
    problem = case(Mixture.load("grid25"))
    process, nets = problem.process, starts(problem, seeds, 800)
    size = sum(w.size for path, w in nets[0].params.items() if not path.startswith(("target", "guidance")))
    pairs = teacher_pairs(problem.teacher, process, jax.random.key(5), 20_000, (2,), batch_size=20_000)
    pairs = {name: jnp.asarray(array) for name, array in pairs.items()}

    def batches(key, store):
        rows = jax.random.randint(key, (256,), 0, len(store["x"]))
        return {name: array[rows] for name, array in store.items()}

    def judged(net):
        x = draw(net, process, jnp.asarray([process.t_max, 0.0]), problem.noise, jax.random.key(0), 0.0)
        return {"endpoint": problem.endpoint(x), "sw2": problem.sw2(x)}

    def trained(config):
        train = Training(config(process), batches, steps)
        return [train(net, problem.teacher, jax.random.key(seed), pairs) for seed, net in enumerate(nets)]

    def adapted(config):
        students = trained(Adapted(KD(steps=(1,)), config))
        count = sum(a.size for a in lora.adapt(nets[0], config, jax.random.key(0)).params.values())
        return {"share": np.asarray(count / size), **over_seeds(seeds, lambda seed: judged(students[seed]))}

    whole = trained(KD(steps=(1,)))
    deltas = [lora.difference(student, net) for student, net in zip(whole, nets, strict=True)]
    rows = {f"rank {rank}": adapted(LoRA(rank, USED)) for rank in RANKS}
    rows["all weights"] = {"share": np.asarray(1.0), **over_seeds(seeds, lambda seed: judged(whole[seed]))}
    for rank in (*RANKS, 32):
        cut = [lora.add(net, (1.0, lora.truncate(d, rank))) for net, d in zip(nets, deltas, strict=True)]
        rows[f"cut to rank {rank}"] = over_seeds(seeds, lambda seed, cut=cut: judged(cut[seed]))
    for name, patterns in GROUPS.items():
        rows[name] = adapted(LoRA(layers=(), whole=patterns))

    lines = [
        [name, rows[name]["share"], rows[name]["endpoint"], rows[name]["sw2"], rows[f"cut to {name}"]["endpoint"]]
        for name in (f"rank {rank}" for rank in RANKS)
    ]
    last = ["all weights", *rows["all weights"].values(), ""]
    header = ["trained", "share of the weights", "endpoint", "sw2", "whole update cut to this rank: endpoint"]
    table("One-step students of grid25: LoRA of every kernel", header, [*lines, last])
    header = ["trained whole, all others frozen", "share of the weights", "endpoint", "sw2"]
    table("One group of layers", header, [[name, *rows[name].values()] for name in GROUPS])

    end = {name: float(row["endpoint"].mean()) for name, row in rows.items()}
    best = min(GROUPS, key=lambda name: end[name])
    conclude(
        end["rank 1"] > end["rank 4"] > end["rank 16"] and end["cut to rank 4"] > 1.5 * end["rank 4"],
        f"few weights go far: endpoint {end['rank 1']:.3f} at rank 1, {end['rank 4']:.3f} at 4, {end['rank 16']:.3f} "
        f"at 16, against {end['all weights']:.3f} with all weights. The update that a full training finds is not of "
        f"low rank (cut to 4 it errs by {end['cut to rank 4']:.3f}): an adapter has to be trained as one. Of single "
        f"groups, '{best}' goes furthest, {end[best]:.3f} at {100 * float(rows[best]['share']):.0f} % of the weights; "
        f"the embedding of the time alone does not help ({end['embedding of the time']:.3f}).",
    )
    return rows


if __name__ == "__main__":
    command_line(main)
