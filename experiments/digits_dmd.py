"""Digits, distilled by distribution matching with a regression on teacher pairs."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods.dmd import dmd_with_regression


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_dmd", method=dmd_with_regression())
