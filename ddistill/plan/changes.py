"""What a plan may change of an experiment."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ddistill.config import Experiment


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with other fields; "remat" is its network's. Raises TypeError for fields that there are not."""
    network: Any = experiment.network
    fields = {name: value for name, value in changes.items() if name != "remat"}
    if "remat" in changes:
        fields["network"] = dataclasses.replace(network, remat=changes["remat"])
    return dataclasses.replace(experiment, **fields)
