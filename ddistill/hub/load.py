"""Networks of diffusers as teachers: read tensor by tensor, each straight to where it lies on the devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddistill import sharding
from ddistill.hub.configs import Kind, diffusion_of, kind_of, kind_with, network_config, read_json, with_dropout
from ddistill.hub.pickles import EDM_CLASSES, edm_definition
from ddistill.hub.tensors import StoredTensor, open_tensors
from ddistill.hub.weights import OURS, Tensor, check, tensors_of, to_ours
from ddistill.net import Net, Preconditioning, from_nnx, split
from ddistill.networks.autoencoder import current_name
from ddistill.networks.layers import Remat, rngs_of
from ddistill.process import Process

_UNREAD = ("caption_projection.y_embedding",)  # PixArt-α's empty prompt for training, which diffusers ignores as well

PARTS = ("unet", "transformer")
"""What pipelines call the folder of their denoiser."""


class Parts(NamedTuple):
    """Where the parts of a teacher are in a folder; scheduler is None where there is none.

    Both are the folder itself for the oldest pipelines, such as google/ddpm-cifar10-32.
    """

    network: Path
    scheduler: Path | None


def parts_of(folder: Path | str) -> Parts:
    """The denoiser and the scheduler of a pipeline's or a model's folder. Raises FileNotFoundError for others."""
    folder = Path(folder)
    what = "give a pipeline's folder (model_index.json) or a model's (config.json)"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}; {what}")
    scheduler = folder / "scheduler"
    beside = scheduler if scheduler.is_dir() else folder if (folder / "scheduler_config.json").is_file() else None
    networks = [folder / name for name in PARTS if (folder / name).is_dir()]
    if len(networks) == 1:
        return Parts(networks[0], beside)
    if networks:
        raise ValueError(f"{folder} has both {' and '.join(PARTS)}: give the folder of one of them")
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder} holds {there}, no model of diffusers; {what}")
    outside = folder.parent / "scheduler"
    return Parts(folder, beside or (outside if folder.name in PARTS and outside.is_dir() else None))


def open_config(folder: Path | str) -> tuple[Kind, Any]:
    """The kind and the configuration of the network in a folder; raises as `network_config` and `edm_definition`."""
    config = _config_json(parts_of(folder).network)
    if config.get("_class_name") in EDM_CLASSES:
        inner = edm_definition(_arguments(config))[0]
        return kind_with(inner), inner
    return kind_of(config), network_config(config)


def open_diffusion(folder: Path | str) -> tuple[Process, Preconditioning]:
    """The process of a folder's teacher and what its network outputs, by its scheduler; raises as `diffusion_of`.

    The networks of EDM and EDM2 have none: their configuration says it.
    """
    network, scheduler = parts_of(folder)
    model = _config_json(network)
    if model.get("_class_name") in EDM_CLASSES:
        return edm_definition(_arguments(model))[1:]
    if scheduler is None:
        raise FileNotFoundError(
            f"{folder} has no scheduler/, which tells the noise process: give the pipeline's folder, or process and "
            "precondition"
        )
    config = read_json(scheduler / "scheduler_config.json", "the configuration of a scheduler")
    return diffusion_of(config, kind_of(model).time_scale)


def _config_json(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", "the configuration of a model")


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_name": config["_class_name"], **{k: v for k, v in config.items() if not k.startswith("_")}}


def open_weights(folder: Path | str, variant: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of the denoiser in a folder, attention's old names as today's; raises as `open_tensors`."""
    tensors = open_tensors(parts_of(folder).network, variant)
    return {current_name(name): tensor for name, tensor in tensors.items() if name not in _UNREAD}


def load_network(
    folder: Path | str,
    process: Process | None = None,
    precondition: Preconditioning | None = None,
    *,
    mesh: Mesh | None = None,
    rule: sharding.Rule = sharding.Rule(),  # noqa: B008
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = False,
    variant: str | None = None,
    dropout: float | None = None,
) -> Net:
    """The denoiser of a pipeline's or model's folder as a teacher.

    process, precondition: by default as the folder's scheduler says. mesh: parameters lie on it by the rule; by default
    on one device. The network computes in dtype; its parameters are
    float32, whatever the file holds. variant: of the file, "fp16" for example. The host never holds more than one
    parameter. What only students read (the embeddings of their target and guidance) starts as a new network's, at 0.
    dropout: in place of the configuration's, as `with_dropout` has it.

    Raises ValueError that lists all tensors that are missing, not expected or of another shape, FileNotFoundError for
    missing files, and as `network_config` and `diffusion_of`.
    """
    kind, config = open_config(folder)
    config = with_dropout(config, dropout)
    if process is None or precondition is None:
        process, precondition = open_diffusion(folder)

    def make() -> nnx.Module:
        return kind.network(config, dtype=dtype, remat=remat, rngs=rngs_of(0))

    return network_from(open_weights(folder, variant), make, process, precondition, mesh, rule)


def network_from(
    tensors: Mapping[str, StoredTensor | np.ndarray],
    make: Callable[[], nnx.Module],
    process: Process,
    precondition: Preconditioning,
    mesh: Mesh | None = None,
    rule: sharding.Rule = sharding.Rule(),  # noqa: B008
) -> Net:
    """A teacher of the module that make() gives, which is never allocated, with its parameters read from tensors."""
    abstract = from_nnx(nnx.eval_shape(make), process, precondition)
    read, kept = plan(tensors, abstract)
    new = _extras(make, kept)
    shapes = {path: abstract.params[path] for path in abstract.params}
    params = {
        path: _read(path, shapes[path], read[path], tensors, where)
        if path in read
        else jax.device_put(new[path], where)
        for path, where in _places(shapes, mesh, rule).items()
    }
    rest = {path: _buffer(path, leaf, tensors) if path in read else new[path] for path, leaf in abstract.rest.items()}
    return abstract.replace(params=params, rest=rest)


def read_params(
    tensors: Mapping[str, StoredTensor | np.ndarray],
    params: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """Parameters of these paths, shapes and dtypes, each read straight to where it lies on the devices.

    For networks that are no denoisers. mesh: as for `load_network`. Raises ValueError that lists every tensor that is
    missing, not expected or of another shape.
    """
    wanted = {path: tensors_of(path, leaf.shape) for path, leaf in params.items()}
    check({t.name: t.shape for ts in wanted.values() for t in ts}, {n: np.shape(a) for n, a in tensors.items()})
    return {
        path: _read(path, params[path], wanted[path], tensors, where) for path, where in _places(params, mesh).items()
    }


def plan(tensors: Mapping[str, Any], net: Net) -> tuple[dict[str, list[Tensor]], set[str]]:
    """Which tensors make up which leaves of a network (abstract or not), and which leaves stay as they are.

    Buffers are read where the tensors have them. Raises ValueError that lists all that does not fit.
    """
    wanted = {path: tensors_of(path, p.shape) for path, p in net.params.items()}
    buffers = {path: tensors_of(path, p.shape) for path, p in net.rest.items() if hasattr(p, "shape")}
    read = {path: parts for path, parts in wanted.items() if not _left_out(path, parts, tensors)}
    read |= {path: parts for path, parts in buffers.items() if any(part.name in tensors for part in parts)}
    check({t.name: t.shape for parts in read.values() for t in parts}, {n: np.shape(a) for n, a in tensors.items()})
    odd = [f"{n} is {a.dtype}" for n, a in tensors.items() if not jnp.issubdtype(jnp.dtype(a.dtype), jnp.floating)]
    if odd:
        raise ValueError(f"weights should be floating-point numbers: {'; '.join(odd[:8])}")
    return read, {path for path in (*net.params, *net.rest) if path not in read}


def _places(
    params: Mapping[str, Any], mesh: Mesh | None, rule: sharding.Rule = sharding.Rule()  # noqa: B008
) -> dict[str, jax.sharding.Sharding]:  # fmt: skip
    """Where each parameter lies: on the mesh, or without one on one device."""
    if mesh is None:
        return dict.fromkeys(params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return sharding.state_shardings(mesh, dict(params), rule)


def _left_out(path: str, parts: list[Tensor], tensors: Mapping[str, Any]) -> bool:
    return path.startswith(OURS) and not any(part.name in tensors for part in parts)


def _extras(make: Callable[[], nnx.Module], kept: set[str]) -> dict[str, Any]:
    """Leaves of a new module, computed without its others."""

    def build():
        params, rest, _ = split(make())
        return {path: leaf for path, leaf in {**params, **rest}.items() if path in kept}

    return jax.jit(build)()


def _read(path: str, leaf, parts: list[Tensor], tensors: Mapping[str, Any], where) -> jax.Array:
    """A parameter, each device's part read from the file by itself."""

    def part(index) -> np.ndarray:
        size = tuple(len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True))
        if parts[0].block is None:
            return _ours(path, tensors[parts[0].name], index).astype(leaf.dtype)
        out = np.empty(size, leaf.dtype)
        for row, block in enumerate(range(*index[0].indices(leaf.shape[0]))):
            out[row] = _ours(path, tensors[parts[block].name], index[1:])
        return out

    return jax.make_array_from_callback(leaf.shape, where, part)


def _ours(path: str, tensor, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter, in our layout, of a tensor in PyTorch's."""
    if path.endswith(".kernel"):
        index = (index[-1], index[-2], *index[:-2])
    return to_ours(path, np.asarray(tensor[index]))


def _buffer(path: str, leaf, tensors: Mapping[str, Any]) -> jax.Array:
    (part,) = tensors_of(path, leaf.shape)
    return jnp.asarray(to_ours(path, np.asarray(tensors[part.name])), leaf.dtype)
