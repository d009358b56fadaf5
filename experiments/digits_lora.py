"""Digits, distilled by consistency distillation of low-rank adapters."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import Adapted


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_lora", method=Adapted())
