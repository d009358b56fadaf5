"""The experiment of `ddistill quickstart`: scans of digits, a class-conditional teacher, a consistency student."""

from ddistill.config import DigitsData, Experiment, MLPNetwork, Optimizer, Teacher
from ddistill.integrators import heun
from ddistill.losses.times import LogNormal
from ddistill.methods import Consistency, Denoising


def experiment() -> Experiment:
    """Digits to one step in minutes on two CPU cores."""
    return Experiment(
        name="quickstart",
        data=DigitsData(),
        network=MLPNetwork(width=256, blocks=4),
        teacher=Teacher(
            method=Denoising(times=LogNormal(-0.8, 1.4)),
            steps=5000,
            optimizer=Optimizer(learning_rate=4e-3),
        ),
        # Many short intervals with one teacher step in each: half the cost of the defaults, which take few long ones.
        method=Consistency(intervals=10, max_intervals=160, solver=heun, solver_steps=1, ema=0.999),
        steps=3500,
        optimizer=Optimizer(learning_rate=1.5e-3),
        batch_size=128,
    )
