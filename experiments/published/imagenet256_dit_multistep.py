"""Multistep consistency of DiT-XL/2 on ImageNet 256 × 256, in 1, 2, 4 and 8 steps (Heek et al. 2024).

Their recipe for ImageNet: Adam at 1e-4, EMA .9999, N from 64 to 1280 intervals, 200 k steps, batch 2048. Their N grows
evenly in log N over 100 k steps and stays; here it doubles at six equal spans, the last of 1280. They trained UViTs on
pixels; this is the same on DiT's latents, one student for all numbers of steps, at a guidance of 1.5 (Peebles & Xie
2022, table 4, who guide three of the four channels; here all).
"""

from pathlib import Path

from ddistill import Experiment, published
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import ddim
from ddistill.methods import MultistepConsistency
from ddistill.methods.intervals import Segments


def experiment() -> Experiment:
    return Experiment(
        name="imagenet256_dit_multistep",
        network=Imported(Path("teachers/DiT-XL-2-256"), bfloat16=True, remat=True),
        data=LatentFolder(Path("data/imagenet256")),
        published=published.dit_xl_2(),
        guidance=1.5,
        method=MultistepConsistency(
            segments=Segments(phases=(1, 2, 4, 8), intervals=64, max_intervals=1280, solver=ddim), ema=0.9999
        ),
        optimizer=Optimizer(learning_rate=1e-4, warmup=1000, decay=False),
        steps=200_000,
        batch_size=2048,
        fsdp=8,
        checkpoint_every=5000,
    )
