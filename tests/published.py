"""Other people's implementations in PyTorch, where they are installed: pytorch-fid, lpips, clean-fid and the like.

They may stand apart from the environment, in a folder that DDISTILL_PUBLISHED names (pip install --no-deps --target).
"""

import importlib
import importlib.util
import os
import sys
from functools import cache

import pytest


def published(name):
    """The module of that name; skips the test where it is not installed."""
    pytest.importorskip("torch")
    apart = os.environ.get("DDISTILL_PUBLISHED")
    if apart and apart not in sys.path:
        sys.path.append(apart)
    for needed in ("torchvision", name.partition(".")[0]):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # wheels with CUDA code cannot load it beside torch's CPU build
        _operators()
    return importlib.import_module(name)


@cache
def _operators():
    """torchvision's import names two operators of its compiled part, which none of its classifiers uses."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library
