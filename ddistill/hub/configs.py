"""config.json as a network's configuration, scheduler_config.json as a process and what its network outputs.

Times of diffusers' discrete schedulers count from 0, those of `DiscreteVP` from 1: a network sees t − 1. Flow-matching
networks see 1000 t, or as FLUX's t itself, and those of consistency models 1000 · ¼ log σ.
"""

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from ddistill import process as processes
from ddistill.net import (
    BoundaryPrecondition,
    DataPrecondition,
    EDMPrecondition,
    EpsPrecondition,
    Preconditioning,
    VelocityPrecondition,
    VPrecondition,
)
from ddistill.process import EDM, DiscreteVP, Process


@dataclass(frozen=True)
class Kind:
    """A class of diffusers that there is a network for.

    module, name: where the network is, with its configuration, `name`Config. time_scale: what a flow's time t is
    multiplied by before the network sees it.
    """

    module: str
    name: str
    time_scale: float = 1000.0

    @property
    def folder(self) -> str:
        """What a pipeline calls its folder."""
        return "unet" if self.module == "unet" else "transformer"

    @property
    def config(self) -> type:
        """The configuration's class."""
        return getattr(self._module, f"{self.name}Config")

    @property
    def network(self) -> Callable[..., nnx.Module]:
        """The network's class: network(config, dtype=, remat=, rngs=)."""
        return getattr(self._module, self.name)

    @property
    def _module(self) -> types.ModuleType:
        return importlib.import_module(f"ddistill.networks.{self.module}")


KINDS = {
    "UNet2DModel": Kind("unet", "UNet2D"),
    "UNet2DConditionModel": Kind("unet", "UNet2DCondition"),
    "DiTTransformer2DModel": Kind("dit", "DiT"),
    "PixArtTransformer2DModel": Kind("pixart", "PixArt"),
    "SanaTransformer2DModel": Kind("sana", "Sana"),
    "SD3Transformer2DModel": Kind("sd3", "SD3"),
    "FluxTransformer2DModel": Kind("flux", "Flux", time_scale=1.0),
}
"""Networks by the `_class_name` of diffusers' config.json."""

ORIGINALS = {"DiT": Kind("dit", "DiT"), "SiT": Kind("dit", "DiT", time_scale=1.0)}
"""Networks of the DiT and SiT projects, which no class of diffusers holds, by the `_class_name` that we give them."""

_KNOWN = {**KINDS, **ORIGINALS}

_OLD = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What a Transformer2DModel, as DiT and PixArt were called once, is today, by its norm_type."""

_DDPM = (1e-4, 0.02, "linear")
_SCHEDULERS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        [
            "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
            "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
        ],
        _DDPM,
    ),
    **dict.fromkeys(
        ["HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"],
        (0.00085, 0.012, "linear"),
    ),
    **dict.fromkeys(["LCMScheduler", "TCDScheduler"], (0.00085, 0.012, "scaled_linear")),
}  # fmt: skip
"""Schedulers of discrete processes with their defaults of beta_start, beta_end and beta_schedule."""

_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_CONSISTENCY = "CMStochasticIterativeScheduler"
_BETAS = {
    "linear": processes.linear_betas,
    "scaled_linear": processes.scaled_linear_betas,
    "squaredcos_cap_v2": lambda steps, start, end: processes.squared_cosine_betas(steps),
}
_OUTPUTS: dict[str, Callable[..., Preconditioning]] = {
    "epsilon": EpsPrecondition,
    "v_prediction": VPrecondition,
    "sample": DataPrecondition,
}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError or ValueError, which say `what` it should be."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, {what}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): it should be {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what}, a JSON object, but a {type(value).__name__}")
    return value


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The network that a config.json is of. Raises ValueError for a class there is no network for."""
    return _KNOWN[_class_of(config)]


def kind_with(config: Any) -> Kind:
    """The kind whose network a configuration is of."""
    return Kind(type(config).__module__.rpartition(".")[2], type(config).__name__.removesuffix("Config"))


def network_config(config: Mapping[str, Any]) -> Any:
    """A config.json as the configuration of its network.

    Raises ValueError that lists every option that is unknown, missing, of another type, or set to something that the
    network does not do.
    """
    name = _class_of(config)
    return parsed(_KNOWN[name].config, name, config)


def parsed(kind: type, name: str, config: Mapping[str, Any]) -> Any:
    """A config.json as a configuration of the class `kind`, of `name` in diffusers; raises as `network_config`."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    hints, fixed = typing.get_type_hints(kind), dict(getattr(kind, "FIXED", {}))
    given = {key: _tuples(value) for key, value in config.items() if not key.startswith("_")}
    if config["_class_name"] == "Transformer2DModel":  # has options of all its kin, unset
        given = {k: v for k, v in given.items() if k in fields or k in fixed or v not in (None, False, "default")}
    wrong = []
    for key, value in given.items():
        if key in fields:
            if not _fits(hints[key], value):
                wrong.append(f"{key} = {_shown(value)} should be {_type_name(hints[key])}")
        elif key not in fixed and key not in getattr(kind, "UNREAD", ()):
            wrong.append(f"{key} = {_shown(value)} is an option that is not known")
        elif key in fixed and value not in [_tuples(v) for v in fixed[key]]:
            wrong.append(f"{key} = {_shown(value)} is not supported, only {' or '.join(map(_shown, fixed[key]))}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in given:
            wrong.append(f"{key} is missing")
    if wrong:
        raise ValueError(f"{name} cannot be built from this config.json:\n  " + "\n  ".join(wrong))
    return kind(**{key: value for key, value in given.items() if key in fields})


def with_dropout(config: Any, rate: float | None) -> Any:
    """A network's configuration with another rate of dropout; None leaves it as it is.

    Raises ValueError for rates outside [0, 1), and for one above 0 where the network has no dropout.
    """
    if rate is None:
        return config
    if not 0 <= rate < 1:
        raise ValueError(f"dropout = {rate} must be a rate in [0, 1)")
    if hasattr(config, "dropout"):
        return dataclasses.replace(config, dropout=rate)
    if rate:
        raise ValueError(f"dropout = {rate}: {type(config).__name__.removesuffix('Config')} has none; leave it out")
    return config


def config_json(config: Any) -> dict[str, Any]:
    """A network's configuration as config.json: the way back. Raises ValueError for one of no class of diffusers."""
    for name, kind in KINDS.items():
        if type(config).__name__ == f"{kind.name}Config":
            values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
            built_in = getattr(config, "OURS", {})
            other = [f"{key} is {values[key]}, there always {v}" for key, v in built_in.items() if values[key] != v]
            if other:
                raise ValueError(f"diffusers' {name} cannot hold this network: {'; '.join(other)}")
            return {"_class_name": name, **{key: v for key, v in values.items() if key not in built_in}}
    raise ValueError(
        f"{type(config).__name__} is no network that diffusers has: students of imported teachers can be exported, and "
        f"those whose network is, as a class of ddistill/networks, {', '.join(KINDS)}"
    )


def scheduler_json(process: Process, precondition: Preconditioning) -> dict[str, Any]:
    """A scheduler_config.json of which `diffusion_of` gives the process and preconditioning: the way back.

    Raises ValueError for those that no supported scheduler is of.
    """
    schedule = process.schedule
    outputs = [name for name, kind in _OUTPUTS.items() if precondition == kind(time_offset=-1.0)]
    if isinstance(schedule, DiscreteVP) and outputs:
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": len(schedule.betas),
            "trained_betas": list(schedule.betas),
            "prediction_type": outputs[0],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        }
    if process == processes.flow() and isinstance(precondition, VelocityPrecondition):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    if isinstance(schedule, EDM) and isinstance(precondition, EDMPrecondition | BoundaryPrecondition):
        ends = {"sigma_min": process.t_min, "sigma_max": process.t_max, "sigma_data": precondition.sigma_data}
        if precondition == BoundaryPrecondition(precondition.sigma_data, 1000.0):
            return {"_class_name": _CONSISTENCY, "num_train_timesteps": 40, "clip_denoised": False, **ends}
        if precondition == EDMPrecondition(precondition.sigma_data):
            return {"_class_name": _EDMS[0], **ends}
    raise ValueError(
        f"no scheduler of diffusers is of {type(schedule).__name__} with {precondition}; those supported are of a "
        "discrete process with time_offset = -1, of flow, and of EDM with its own preconditioning or the boundary one "
        "with time_scale = 1000"
    )


def diffusion_of(scheduler: Mapping[str, Any], time_scale: float = 1000.0) -> tuple[Process, Preconditioning]:
    """The process of a scheduler_config.json and what its network outputs.

    time_scale: of flows, `Kind.time_scale`. What belongs to a sampler, the spacing of its steps, clipping and the shift
    of a flow's grid, is left out. Raises ValueError for schedulers, tables and outputs that are not supported.
    """
    name, kind = scheduler.get("_class_name"), _output_of(scheduler)
    if scheduler.get("timestep_type") not in (None, "discrete"):
        raise ValueError(
            f"{name} with timestep_type = {scheduler['timestep_type']!r} is not supported, only 'discrete': such a "
            "network sees ¼ log σ in place of a step's number"
        )
    flows = kind == "flow_prediction" and scheduler.get("use_flow_sigmas", False)
    if name in _FLOWS or (name in _SCHEDULERS and flows):
        return processes.flow(), VelocityPrecondition(time_scale)
    if name in (*_EDMS, _CONSISTENCY):
        process = processes.edm(scheduler.get("sigma_min", 0.002), scheduler.get("sigma_max", 80.0))
        sigma_data = scheduler.get("sigma_data", 0.5)
        if name == _CONSISTENCY:
            return process, BoundaryPrecondition(sigma_data, 1000.0)
        if kind != "epsilon":
            raise ValueError(f"{name} with prediction_type = {kind!r} is not supported, only 'epsilon' (EDM's F)")
        return process, EDMPrecondition(sigma_data)
    if name not in _SCHEDULERS:
        known = [*_SCHEDULERS, *_FLOWS, *_EDMS, _CONSISTENCY]
        raise ValueError(f"scheduler_config.json is of {name}; supported are {', '.join(known)}")
    if kind not in _OUTPUTS:
        raise ValueError(f"{name} with prediction_type = {kind!r} is not supported, only {', '.join(_OUTPUTS)}")
    return processes.discrete_vp(_betas(scheduler)), _OUTPUTS[kind](time_offset=-1.0)


def _output_of(scheduler: Mapping[str, Any]) -> str:
    """What the network outputs. Old configurations say it by predict_epsilon, false being x0."""
    kind = scheduler.get("prediction_type")
    if scheduler.get("predict_epsilon") is not False:
        return kind or "epsilon"
    if kind not in (None, "sample"):
        raise ValueError(
            f"scheduler_config.json says both prediction_type = {kind!r} and predict_epsilon = false, which is "
            "'sample': leave out the one that is wrong"
        )
    return "sample"


def table_of(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a discrete scheduler that make its table of betas, those it leaves to its class's defaults too."""
    start, end, law = _SCHEDULERS[scheduler["_class_name"]]
    return {
        "beta_start": scheduler.get("beta_start", start),
        "beta_end": scheduler.get("beta_end", end),
        "beta_schedule": scheduler.get("beta_schedule", law),
        "trained_betas": scheduler.get("trained_betas"),
        "rescale_betas_zero_snr": scheduler.get("rescale_betas_zero_snr", False),
    }


def _betas(scheduler: Mapping[str, Any]) -> list[float]:
    table = table_of(scheduler)
    law = table["beta_schedule"]
    if table["trained_betas"] is not None:
        betas = [float(beta) for beta in table["trained_betas"]]
    elif law in _BETAS:
        steps = scheduler.get("num_train_timesteps", 1000)
        betas = list(_BETAS[law](steps, table["beta_start"], table["beta_end"]))
    else:
        raise ValueError(f"beta_schedule = {law!r} is not supported, only {', '.join(_BETAS)} and trained_betas")
    return list(processes.zero_terminal_snr(betas)) if table["rescale_betas_zero_snr"] else betas


def _class_of(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    if name is None:
        raise ValueError(f"config.json has no _class_name: it is no model of diffusers (known are {', '.join(KINDS)})")
    name = _OLD.get(config.get("norm_type", ""), name) if name == "Transformer2DModel" else name
    if name not in _KNOWN:
        raise ValueError(
            f"config.json is of the class {name}, for which there is no network; known are {', '.join(KINDS)}"
        )
    return name


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value of JSON is of a type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple or hint is tuple:
        if not isinstance(value, tuple):
            return False
        if not parts:
            return True
        each = [parts[0]] * len(value) if len(parts) == 2 and parts[1] is Ellipsis else parts
        return len(each) == len(value) and all(map(_fits, each, value))
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, hint | int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
