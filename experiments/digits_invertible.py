"""Digits, distilled by invertible consistency distillation, which also encodes."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import Invertible


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_invertible", method=Invertible())
