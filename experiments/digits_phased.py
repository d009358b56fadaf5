"""Digits, distilled by phased consistency, on intervals of the trajectory."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import PhasedConsistency


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_phased", method=PhasedConsistency())
