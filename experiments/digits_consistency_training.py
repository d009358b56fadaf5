"""Digits, distilled by consistency training, without a teacher in the loss."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import ConsistencyTraining


def experiment() -> Experiment:
    return dataclasses.replace(
        quickstart.experiment(), name="digits_consistency_training", method=ConsistencyTraining()
    )
