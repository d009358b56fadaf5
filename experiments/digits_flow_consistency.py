"""Digits, distilled by consistency on the flow of the teacher."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import FlowConsistency


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_flow_consistency", method=FlowConsistency())
