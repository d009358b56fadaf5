"""Digits, taught as a rectified flow: 1-RF, whose paths are still curved, which a single step shows."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import RectifiedFlow


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_rectified_flow", method=RectifiedFlow())
