"""Digits, distilled by distillation of guidance, then progressive distillation."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import GuidanceDistillation


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_guidance", method=GuidanceDistillation())
