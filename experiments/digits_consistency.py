"""Digits, distilled by consistency distillation: the experiment of `ddistill quickstart`."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_consistency")
