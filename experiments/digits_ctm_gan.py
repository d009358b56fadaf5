"""Digits, distilled by consistency trajectory models with an adversary."""

import dataclasses

from ddistill import quickstart
from ddistill.config import Experiment
from ddistill.methods import CTM, Adversary


def experiment() -> Experiment:
    return dataclasses.replace(quickstart.experiment(), name="digits_ctm_gan", method=CTM(adversary=Adversary()))
