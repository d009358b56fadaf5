"""Consistency distillation of DiT-XL/2 on ImageNet 256 × 256, as latent consistency models do it (Luo et al. 2023).

From the teacher guided at 1.5 (Peebles & Xie 2022, table 4, who guide three of the four channels; here all), with a
DDIM step over 1/50 of the grid, the pseudo-Huber distance, AdamW; learning rate and batch are those of consistency
distillation on ImageNet 64 × 64 (Song et al. 2023, table 3). Nobody published numbers for it.
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import ddim
from ddistill.methods import Consistency


def experiment() -> Experiment:
    return Experiment(
        name="imagenet256_dit_consistency",
        network=Imported(Path("teachers/DiT-XL-2-256"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/imagenet256")),
        published=published.dit_xl_2(),
        guidance=1.5,
        method=Consistency(intervals=50, max_intervals=50, solver=ddim, target_ema=0.95, ema=0.9999),
        optimizer=Optimizer(learning_rate=8e-6, warmup=1000, decay=False, weight_decay=0.01),
        steps=200_000,
        batch_size=2048,
        fsdp=8,
        checkpoint_every=5000,
    )
