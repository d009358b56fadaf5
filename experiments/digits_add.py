"""Digits, distilled by adversarial diffusion distillation."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import ADD


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_add", method=ADD())
