"""Consistency distillation of an imported latent teacher with low-rank adapters (Luo et al. 2023, LCM-LoRA).

    ddistill distill experiments/latent_lora.py --network.folder teacher --data.folder latents

teacher: what `ddistill import` wrote; latents: what `ddistill encode` made with its autoencoder. The defaults are for
the small teacher of experiments/latent_pipeline.py.
"""

from pathlib import Path

from ddistill import Experiment
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.integrators import ddim
from ddistill.lora import LoRA
from ddistill.methods import Adapted, Consistency


def experiment() -> Experiment:
    return Experiment(
        name="latent_lora",
        data=LatentFolder("latents"),
        network=Imported(Path("teacher")),
        method=Adapted(Consistency(intervals=10, max_intervals=40, solver=ddim), LoRA(rank=16)),
        optimizer=Optimizer(learning_rate=1e-3),
        steps=600,
        batch_size=64,
    )
