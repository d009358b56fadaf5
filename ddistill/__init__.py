"""Diffusion distillation in JAX: a slow teacher becomes a student that samples in one to four steps.

The public names; each module is imported when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddistill import grids as grids
    from ddistill import integrators as integrators
    from ddistill.config import Experiment as Experiment
    from ddistill.methods import METHODS as METHODS
    from ddistill.methods import Method as Method
    from ddistill.methods import particles as particles
    from ddistill.methods import sds_gradient as sds_gradient
    from ddistill.mixture import Mixture as Mixture
    from ddistill.net import Net as Net
    from ddistill.net import from_nnx as from_nnx
    from ddistill.net import guided as guided
    from ddistill.net import retime as retime
    from ddistill.process import Process as Process
    from ddistill.process import cosine as cosine
    from ddistill.process import discrete_vp as discrete_vp
    from ddistill.process import edm as edm
    from ddistill.process import flow as flow
    from ddistill.process import sub_vp as sub_vp
    from ddistill.process import trig as trig
    from ddistill.process import ve as ve
    from ddistill.process import vp as vp
    from ddistill.process import vp_cosine as vp_cosine
    from ddistill.runs import distil as distil
    from ddistill.runs import load_experiment as load_experiment
    from ddistill.runs import open_run as open_run
    from ddistill.stages import Stage as Stage
    from ddistill.stages import run as run
    from ddistill.train import make_trainer as make_trainer

# The function `sample` stays in its module: a package attribute has room for one of the two.
_MODULES = ("grids", "integrators", "sample")
_NAMES = {
    "config": ("Experiment",),
    "methods": ("METHODS", "Method", "particles", "sds_gradient"),
    "mixture": ("Mixture",),
    "net": ("Net", "from_nnx", "guided", "retime"),
    "process": ("Process", "cosine", "discrete_vp", "edm", "flow", "sub_vp", "trig", "ve", "vp", "vp_cosine"),
    "runs": ("distil", "load_experiment", "open_run"),
    "stages": ("Stage", "run"),
    "train": ("make_trainer",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ddistill.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ddistill' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ddistill.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
