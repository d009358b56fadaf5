"""Digits, distilled by multistep consistency, on intervals of the trajectory."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import MultistepConsistency


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_multistep", method=MultistepConsistency())
