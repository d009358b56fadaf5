"""Consistency distillation of EDM on ImageNet 64 × 64: FID 6.20 in one step, 4.70 in two (Song et al. 2023, table 2).

Table 3 and openai/consistency_models: RAdam at 8e-6 without warm-up, batch 2048, 600 k steps, target EMA .95, EMA
.999943, Heun, no dropout. Its N = 40 are nodes, which end at .002; here a 40th interval leads from there to 0. Its FIDs
are of LPIPS and of a teacher of its own; here the distance is its ℓ2, which needs no weights, and the teacher NVIDIA's.
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
        name="imagenet64_consistency",
        network=Imported(Path("teachers/edm-imagenet-64x64-cond-adm"), bfloat16=True, remat=True, dropout=0.0),
        data=ImageFolder(Path("data/imagenet/train"), size=64, enlarge=True),
        published=published.edm_imagenet64(),
        method=Consistency(
            intervals=40, max_intervals=40, solver=heun, between=False, distance=L2(), weighted=False,
            target_ema=0.95, ema=0.999943,
        ),
        optimizer=Optimizer(learning_rate=8e-6, warmup=0, decay=False, rectified=True),
        steps=600_000,
        batch_size=2048,
        checkpoint_every=10_000,
    )  # fmt: skip
