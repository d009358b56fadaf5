"""Digits, distilled by naive knowledge distillation: a one-step student from pairs that the teacher makes."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment, Optimizer
from ddistill.methods import KD


def experiment() -> Experiment:
    return dataclasses.replace(
        quickstart.experiment(),
        name="digits_kd",
        method=KD(pairs=40_000, teacher_steps=32),
        optimizer=Optimizer(learning_rate=1e-3),
        steps=6000,
    )
