"""Distribution matching distillation of an imported latent teacher to one step (Yin et al. 2024).

    ddistill distill experiments/latent_dmd.py --network.folder teacher --data.folder latents

teacher: what `ddistill import` wrote; latents: what `ddistill encode` made with its autoencoder, of which the method
takes the labels alone. The defaults are for the small teacher of experiments/latent_pipeline.py.
"""

from pathlib import Path

from ddistill import Experiment
from ddistill.config import Imported, Optimizer
from ddistill.datasets import LatentFolder
from ddistill.methods import DMD


def experiment() -> Experiment:
    return Experiment(
        name="latent_dmd",
        data=LatentFolder("latents"),
        network=Imported(Path("teacher")),
        method=DMD(),
        optimizer=Optimizer(learning_rate=1e-3),
        steps=600,
        batch_size=64,
    )
