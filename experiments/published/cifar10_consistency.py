"""Consistency distillation of EDM on CIFAR-10: FID 3.55 in one step, 2.93 in two (Song et al. 2023, tables 1 and 3).

Table 3 and openai/consistency_models_cifar10: RAdam at 4e-4 without warm-up, batch 512, 800 k steps, EMA .9999, no
dropout, Heun; the target is the student itself. Its N = 18 are nodes, which end at .002; here an 18th interval leads
from there to 0. Its FIDs are of LPIPS and of a teacher of its own, a VE network; here the distance is its ℓ2, which
needs no weights, and the teacher NVIDIA's.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import ImageFolder
from ddistill.integrators import heun
from ddistill.losses.distances import L2
from ddistill.methods import Consistency


def experiment() -> Experiment:
    return Experiment(
        name="cifar10_consistency",
        network=Imported(Path("teachers/edm-cifar10-32x32-uncond-vp"), dropout=0.0),
        data=ImageFolder(Path("data/cifar10"), size=32, classes=False),
        published=published.edm_cifar10(classes=False),
        method=Consistency(
            intervals=18, max_intervals=18, solver=heun, between=False, distance=L2(), weighted=False, ema=0.9999
        ),
        optimizer=Optimizer(learning_rate=4e-4, warmup=0, decay=False, rectified=True),
        steps=800_000,
        batch_size=512,
        checkpoint_every=10_000,
    )
