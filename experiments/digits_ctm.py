"""Digits, distilled by consistency trajectory models."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import CTM


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_ctm", method=CTM())
