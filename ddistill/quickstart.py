"""The experiment of `ddistill quickstart`: scans of digits, a class-conditional teacher, a consistency student."""

from ddistill.config import DigitsData, Experiment, MLPNetwork, Optimizer, Teacher
from ddistill.losses.times import LogNormal
from ddistill.methods import Consistency, Denoising


def experiment() -> Experiment:
    """Two minutes on two CPU cores."""
    return Experiment(
        name="quickstart",
        data=DigitsData(),
        network=MLPNetwork(width=256, blocks=4),
        teacher=Teacher(
            method=Denoising(times=LogNormal(-0.8, 1.4)),
            steps=4000,
            optimizer=Optimizer(learning_rate=4e-3),
        ),
        method=Consistency(growth_steps=3000),
        steps=3000,
        optimizer=Optimizer(learning_rate=1e-3),
        batch_size=128,
    )
