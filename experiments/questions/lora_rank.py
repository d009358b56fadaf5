"""Research direction: "localised integration", a student that differs from its teacher in a small part of the weights.

One-step students by knowledge distillation, of a small network on 25 modes. (1) LoRA of every kernel at rank r, and
what is left of the fully trained student's own update when it is cut to rank r afterwards. (2) One group of layers
trained whole, the others frozen: where do the weights matter? (3) Those groups at rank 4.
"""

import jax
import numpy as np
from common import Distillation, case, command_line, conclude, over_seeds, starts, table

from ddistill import lora
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
USED = ("time.*", "embed.*", "inward.*", "outward.*", "blocks.*")


def main(seeds: int = 3, steps: int = 1000) -> dict[str, dict[str, np.ndarray]]:
    """Print the tables."""
    problem = case(Mixture.load("grid25"))
    nets = starts(problem, seeds, 1000)
    size = sum(w.size for path, w in nets[0].params.items() if not path.startswith(("target", "guidance")))

    def judged(x):
        return {"endpoint": problem.endpoint(x), "sw2": problem.sw2(x)}

    def trained(config):
        distil = Distillation(problem, config, steps)
        return [distil(nets[seed], jax.random.key(seed)) for seed in range(seeds)]

    def adapter(name, **patterns):
        config = LoRA(**patterns)
        students = trained(Adapted(KD(), config))
        share = sum(a.size for a in lora.adapt(nets[0], config, jax.random.key(0)).params.values()) / size
        rows[name] = {"share": np.asarray(share), **over_seeds(seeds, lambda seed: judged(students[seed](1)))}

    rows: dict[str, dict[str, np.ndarray]] = {}
    full = trained(KD())
    for rank in RANKS:
        adapter(f"rank {rank}", rank=rank, layers=tuple(p + "kernel" for p in USED))
    rows["all weights"] = {"share": np.asarray(1.0), **over_seeds(seeds, lambda seed: judged(full[seed](1)))}
    deltas = [lora.difference(student.net, net) for student, net in zip(full, nets, strict=True)]
    for rank in (*RANKS, 32):

        def cut(seed, rank=rank):
            net = lora.add(nets[seed], (1.0, lora.truncate(deltas[seed], rank)))
            return judged(type(full[seed])(net, full[seed].process, full[seed].method, problem)(1))

        rows[f"cut to rank {rank}"] = over_seeds(seeds, cut)
    for name, patterns in GROUPS.items():
        adapter(f"{name}, whole", layers=(), whole=patterns)
        kernels = tuple(p.rstrip("*") + "kernel" for p in patterns)
        adapter(f"{name}, rank 4", rank=4, layers=kernels)

    header = ["trained", "share of the weights", "endpoint", "sw2", "update cut to this rank: endpoint"]
    lines = [
        [name, row["share"], row["endpoint"], row["sw2"], rows.get(f"cut to {name}", {}).get("endpoint", "")]
        for name, row in rows.items()
        if name.startswith("rank") or name == "all weights"
    ]
    table("One-step KD students of grid25: LoRA of every kernel", header, lines)
    lines = [
        [
            name,
            *(rows[f"{name}, whole"][k] for k in ("share", "endpoint", "sw2")),
            *(rows[f"{name}, rank 4"][k] for k in ("share", "endpoint")),
        ]
        for name in GROUPS
    ]
    header = ["group of layers", "share, whole", "endpoint", "sw2", "share, rank 4", "endpoint"]
    table("One group of layers trained, the others frozen", header, lines)
    end = {name: float(row["endpoint"].mean()) for name, row in rows.items()}
    ordered = [end[f"rank {rank}"] for rank in RANKS]
    best = min(GROUPS, key=lambda name: end[f"{name}, whole"])
    conclude(
        ordered[0] > ordered[2] > ordered[4],
        f"errors fall with the rank, from {ordered[0]:.2f} at rank 1 to {ordered[4]:.2f} at rank 16 "
        f"(all weights: {end['all weights']:.2f}), and the update of a full training is of no low rank (cut to 16: "
        f"{end['cut to rank 16']:.2f}): an adapter must be trained as one. Of the groups, {best} goes furthest alone "
        f"({end[f'{best}, whole']:.2f} with {100 * float(rows[f'{best}, whole']['share']):.0f} % of the weights).",
    )
    return rows


if __name__ == "__main__":
    command_line(main)
