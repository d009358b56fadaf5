"""Digits, distilled by rectified flow, two rounds of reflow, and its distillation."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import Reflow


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_reflow", method=Reflow(count=40_000))
