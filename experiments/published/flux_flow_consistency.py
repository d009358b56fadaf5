"""Consistency on the flow of FLUX.1 dev with an adapter of rank 64: f(x, t) = x − t û (Yang et al. 2024).

The teacher embeds its guidance, held at dev's 3.5, so that one call is a guided one. Euler steps on 50 intervals,
pseudo-Huber, AdamW at 1e-4 as LCM-LoRA has it (Luo et al. 2023); rank, batch and steps are ours. Nobody published
numbers for it.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import euler
from ddistill.lora import LoRA
from ddistill.methods import Adapted, Consistency, FlowConsistency


def experiment() -> Experiment:
    consistency = Consistency(intervals=50, max_intervals=50, solver=euler, ema=0.99)
    return Experiment(
        name="flux_flow_consistency",
        network=Imported(Path("teachers/FLUX.1-dev"), bfloat16=True, remat=True, guidance=3.5),
        data=LatentFolder(Path("data/flux")),
        published=published.flux_dev(),
        method=Adapted(FlowConsistency(consistency=consistency), LoRA(rank=64, layers=("*_blocks.*.kernel",))),
        optimizer=Optimizer(learning_rate=1e-4, warmup=500, decay=False, weight_decay=0.01),
        steps=10_000,
        batch_size=32,
        fsdp=16,
    )
