"""Digits, distilled by score distillation: each digit falls into one mode."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import SDS


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_sds", method=SDS())
