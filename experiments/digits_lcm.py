"""Digits, distilled by latent consistency, straight from the guided teacher."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import LatentConsistency


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_lcm", method=LatentConsistency())
