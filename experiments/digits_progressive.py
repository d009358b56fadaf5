"""Digits, distilled by progressive distillation, halving from 64 steps to one."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import Progressive


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_progressive", method=Progressive())
