"""Consistency on the flow of Stable Diffusion 3 medium: f(x, t) = x − t û (Yang et al. 2024).

Euler steps of the guided teacher on 50 intervals, pseudo-Huber, AdamW at 5e-6 (learning rate and guidance of 5 are
ours; PCM's script of SD3, Wang et al. 2024, is phased and adversarial besides).
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import euler
from ddistill.methods import Consistency, FlowConsistency


def experiment() -> Experiment:
    return Experiment(
        name="sd3_flow_consistency",
        network=Imported(Path("teachers/stable-diffusion-3-medium"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/sd3")),
        published=published.sd3_medium(),
        guidance=5.0,
        method=FlowConsistency(consistency=Consistency(intervals=50, max_intervals=50, solver=euler, ema=0.99)),
        optimizer=Optimizer(learning_rate=5e-6, warmup=500, decay=False, weight_decay=0.01),
        steps=20_000,
        batch_size=64,
        fsdp=8,
    )
