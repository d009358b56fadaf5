"""Consistency on the flow of SiT-XL/2, ImageNet 256 × 256: f(x, t) = x − t û (Yang et al. 2024; Ma et al. 2024).

With Euler steps on 18 intervals, RAdam and EMA .9999 as in consistency distillation on CIFAR-10 (Song et al. 2023,
table 3, with batch 512 and 800 k steps), at the learning rate of SiT, 1e-4, the teacher guided at SiT's 1.5; batch and
steps are ours.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import euler
from ddistill.methods import Consistency, FlowConsistency


def experiment() -> Experiment:
    return Experiment(
        name="imagenet256_sit_flow_consistency",
        network=Imported(Path("teachers/SiT-XL-2-256"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/imagenet256")),
        published=published.sit_xl_2(),
        guidance=1.5,
        method=FlowConsistency(consistency=Consistency(intervals=18, max_intervals=18, solver=euler, ema=0.9999)),
        optimizer=Optimizer(learning_rate=1e-4, warmup=1000, decay=False, rectified=True),
        steps=100_000,
        batch_size=1024,
        fsdp=8,
        checkpoint_every=5000,
    )
