"""NNX network definitions and nothing else."""

from ddistill.networks.mlp import MLP

__all__ = ["MLP"]
