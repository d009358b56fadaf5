"""Tensors out of pickles, of which nothing is executed: snapshots of EDM and EDM2, and PyTorch's .pt, .pth and .ckpt.

A pickle is a program that calls whatever functions it names. This reader knows a short list of names and has its own
inert stand-in for each: PyTorch's and NumPy's builders of tensors become arrays, containers become dictionaries, and
the objects of NVlabs' `torch_utils.persistence`, which carry the source code of their classes, become records that
never look at it. Any other name is refused before anything is built from it. PyTorch is not needed.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from numpy.lib.stride_tricks import as_strided

from ddistill.hub.weights import OURS, params_from
from ddistill.net import EDMPrecondition, EpsPrecondition, Net, Preconditioning, PyTree, from_nnx
from ddistill.networks.edm import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig, VEPrecondition
from ddistill.networks.edm2 import EDM2UNet, EDM2UNetConfig
from ddistill.networks.layers import Remat, rngs_of
from ddistill.process import Process, discrete_vp, edm, squared_cosine_betas, vp

MAGIC = 0x1950A86A20F9469CFC6C
"""The number that torch.save wrote first before its files were zip archives."""

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
_DTYPES = {
    **{name: name for name in _STORAGES.values()},
    "half": "float16", "float": "float32", "double": "float64", "int": "int32", "long": "int64",
    "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}  # fmt: skip
_MODULES = ("torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList",
            "torch.nn.modules.container.Sequential")  # fmt: skip
_ACCEPTED = (
    "tensors, storages and sizes of PyTorch, arrays and numbers of NumPy, plain containers, and the records of "
    "NVlabs' torch_utils.persistence"
)


class _Refused(ValueError):
    """A pickle wants more than arrays and containers."""


def _keep(stand_in, state):
    """A __setstate__ for stand-ins: without one, a pickle could set their attributes."""
    raise _Refused(f"sets the state of a {type(stand_in).__name__.strip('_')}, which no tensor needs")


@dataclass(frozen=True)
class Persistent:
    """An object of NVlabs' persistence: the name of its class, what it was made with, and its state. No code."""

    class_name: str
    init_args: tuple
    init_kwargs: dict[str, Any]
    state: dict[str, Any]

    __setstate__ = _keep


def read_pickle(path: Path | str) -> PyTree:
    """What a pickle or a file of torch.save holds: arrays, numbers, texts and containers, executing nothing.

    Tensors are read-only arrays in their own dtype (bfloat16 and float8 are ml_dtypes'), which share memory where the
    tensors did. OrderedDict, EasyDict and Namespace are dictionaries, persistent objects `Persistent`. Raises
    ValueError for anything that a pickle names beside these, and for files that are cut off or damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            return _read(file)
        except _Refused as error:
            raise ValueError(f"{path} {error}") from None
        except Exception as error:
            raise ValueError(
                f"{path} is no whole pickle or file of torch.save ({type(error).__name__}: {error}): it is cut off, "
                "damaged, or in another format"
            ) from error


def edm_snapshot(path: Path | str, network: str = "ema") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a network in a snapshot of EDM or EDM2, and what its preconditioning was made with.

    Tensors by the names of `ddistill.networks.edm` and `.edm2`: those of the UNet alone, without filters, which are
    computed, and EDM2's logvar. The arguments have their class's name as "class_name". Raises ValueError as
    `read_pickle`, and for files without such a network.
    """
    tree = read_pickle(path)
    found = tree.get(network) if isinstance(tree, dict) else tree
    if not isinstance(found, Persistent):
        there = ", ".join(map(str, list(tree)[:8])) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path} has no network {network!r} as snapshots of EDM and EDM2 have, but {there}")
    try:
        tensors = state_dict(found)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} has no modules with tensors as {network!r}: {error}") from error
    inner = "model." if any(name.startswith("model.") for name in tensors) else "unet."
    wanted = {
        name.removeprefix(inner): tensor
        for name, tensor in tensors.items()
        if name.startswith(inner) and not name.endswith(".resample_filter")
    }
    return wanted, {**found.init_kwargs, "class_name": found.class_name}


def state_dict(module: Persistent | Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters and buffers of a pickled torch.nn.Module, by the names of its state_dict()."""
    state = module.state if isinstance(module, Persistent) else module
    transient = state.get("_non_persistent_buffers_set", ())
    own = {**state.get("_parameters", {}), **state.get("_buffers", {})}
    found = {f"{prefix}{k}": v for k, v in own.items() if v is not None and k not in transient}
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            found |= state_dict(child, f"{prefix}{name}.")
    return found


def checkpoint_tensors(path: Path | str, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors by name in a checkpoint of torch.save, such as those of DiT, SiT and guided diffusion.

    entry: where in the file they are; by default "ema", "state_dict" or "model", the first that there is, or the file
    itself. Raises ValueError as `read_pickle`, and for files that have no named tensors there.
    """
    tree = read_pickle(path)
    there = [k for k in ("ema", "state_dict", "model") if isinstance(tree, dict) and isinstance(tree.get(k), dict)]
    entry = next(iter(there), None) if entry is None else entry
    found = tree if entry is None else tree.get(entry) if isinstance(tree, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(v, np.ndarray) for v in found.values()):
        keys = ", ".join(map(str, list(tree)[:8])) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path} has no tensors by name{f' at {entry!r}' if entry else ''}: it has {keys}")
    return dict(found)


def edm_net(path: Path | str, network: str = "ema", *, dtype: jnp.dtype = jnp.float32, remat: Remat = False) -> Net:
    """The denoiser in a snapshot of EDM or EDM2, on its own process (`edm_definition`), that computes in dtype.

    remat: as for the networks. Raises ValueError as `edm_snapshot` and `edm_definition` do, and for tensors that do not
    fit the network, all of them listed.
    """
    tensors, init = edm_snapshot(path, network)
    config, process, precondition = edm_definition(init)
    kind = _NETWORKS[type(config)]
    module = nnx.eval_shape(lambda: kind(config, dtype=dtype, remat=remat, rngs=rngs_of(0)))
    net = from_nnx(module, process, precondition)
    read = params_from(tensors, {**net.params, **net.rest})
    ours = {name: jnp.zeros(p.shape, p.dtype) for name, p in net.params.items() if name.startswith(OURS)}
    params = {name: ours[name] if name in ours else jnp.asarray(read[name]) for name in net.params}
    return net.replace(params=params, rest={name: jnp.asarray(read[name]) for name in net.rest})


EDMConfig = SongUNetConfig | DhariwalUNetConfig | EDM2UNetConfig


def edm_definition(init: Mapping[str, Any]) -> tuple[EDMConfig, Process, Preconditioning]:
    """The network's configuration, process and preconditioning for the arguments that `edm_snapshot` answers.

    Processes range over the noise levels that the network knows, within EDM's sampler's 0.002 … 80 where it knows all.
    What concerns training (label_dropout, use_fp16, logvar_channels) is dropped. Raises ValueError for other classes
    and arguments.
    """
    args = dict(init)
    name = args.pop("class_name", None)
    if name not in _FORMULATIONS:
        raise ValueError(f"networks of EDM and EDM2 are {', '.join(_FORMULATIONS)}; given {name!r}")
    process, precondition = _FORMULATIONS[name](args)
    kind: type = EDM2UNetConfig
    if name != "Precond":
        model, colours = args.pop("model_type", _MODEL[name]), args.pop("img_channels", 3)
        if model not in _UNETS:
            raise ValueError(f"model_type is one of {', '.join(_UNETS)}; given {model!r}")
        kind = _UNETS[model]
        args |= {"in_channels": colours, "out_channels": colours * (2 if name == "iDDPMPrecond" else 1)}
    known = {f.name for f in fields(kind)}
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items() if k not in _TRAINING}
    fixed = kind.FIXED  # type: ignore[attr-defined]
    wrong = [f"{k} = {args[k]!r}" for k in args if k not in known and args[k] not in fixed.get(k, ())]
    if wrong or "img_resolution" not in args:
        wrong = wrong or ["no img_resolution"]
        raise ValueError(f"{kind.__name__} does not support {', '.join(wrong)}; it takes {', '.join(sorted(known))}")
    return kind(**{k: v for k, v in args.items() if k in known}), process, precondition


_NETWORKS: dict[type, Callable[..., nnx.Module]] = {
    SongUNetConfig: SongUNet, DhariwalUNetConfig: DhariwalUNet, EDM2UNetConfig: EDM2UNet
}  # fmt: skip
_TRAINING = ("label_dropout", "use_fp16", "logvar_channels")
_UNETS: dict[str, type] = {"SongUNet": SongUNetConfig, "DhariwalUNet": DhariwalUNetConfig}
_MODEL = {
    "EDMPrecond": "DhariwalUNet", "VPPrecond": "SongUNet", "VEPrecond": "SongUNet", "iDDPMPrecond": "DhariwalUNet"
}  # fmt: skip


def _edm(args: dict) -> tuple[Process, Preconditioning]:
    low, high = args.pop("sigma_min", 0.0), args.pop("sigma_max", float("inf"))
    return edm(max(0.002, low), min(80.0, high)), EDMPrecondition(args.pop("sigma_data", 0.5))


def _ve(args: dict) -> tuple[Process, Preconditioning]:
    return edm(args.pop("sigma_min", 0.02), args.pop("sigma_max", 100.0)), VEPrecondition()


def _vp(args: dict) -> tuple[Process, Preconditioning]:
    low = args.pop("beta_min", 0.1)
    process = vp(low, low + args.pop("beta_d", 19.9), args.pop("epsilon_t", 1e-5))
    return process, EpsPrecondition(args.pop("M", 1000) - 1)


def _iddpm(args: dict) -> tuple[Process, Preconditioning]:
    if (shift := args.pop("C_2", 0.008)) != 0.008:
        raise ValueError(f"iDDPMPrecond is supported with C_2 = 0.008, improved DDPM's; given {shift}")
    betas = squared_cosine_betas(args.pop("M", 1000), 1 - args.pop("C_1", 0.001))
    return discrete_vp(betas.tolist()), EpsPrecondition(time_offset=-1.0)


_FORMULATIONS: dict[str, Callable[[dict], tuple[Process, Preconditioning]]] = {
    "EDMPrecond": _edm, "VPPrecond": _vp, "VEPrecond": _ve, "iDDPMPrecond": _iddpm, "Precond": _edm
}  # fmt: skip
EDM_CLASSES = tuple(_FORMULATIONS)
"""Networks of EDM and EDM2 by the names of their classes."""


class _Call:
    """What a pickle gets for the name of a function."""

    __slots__ = ("_build",)
    __setstate__ = _keep

    def __init__(self, build: Callable[..., Any]):
        self._build = build

    def __call__(self, *args):
        return self._build(*args)


class _DType:
    """A dtype: NumPy's own would take any state, and with it lie about what its bytes are."""

    __slots__ = ("dtype",)

    def __init__(self, name: str):
        if not isinstance(name, str) or name.lstrip("<>|=") not in _NUMPY:
            raise _Refused(f"has an array of dtype {name!r}; numbers and texts alone are read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        order = state[1]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise _Refused(f"has an array with fields, or of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


_NUMPY = (
    *(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)), "b1", "c8", "c16",
    *(f"{kind}{size}" for kind in "SU" for size in range(1, 257)),
)  # fmt: skip


class _Array(np.ndarray):
    """An array that is told its contents afterwards, checked before NumPy believes it."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _DType) or not isinstance(data, bytes):
            raise _Refused("has an array that is no block of bytes")
        if len(data) != kind.dtype.itemsize * _product(shape):
            raise _Refused(f"has an array of shape {shape} with {len(data)} bytes")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), data))  # type: ignore[arg-type]


class _Storage:
    """The memory of tensors."""

    __slots__ = ("array",)
    __setstate__ = _keep

    def __init__(self, array: np.ndarray):
        self.array = array


class _Dict(dict):
    """A dictionary; attributes that were set on it, as a state_dict's _metadata, are dropped."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _State(dict):
    """An object whose attributes are its items."""

    __slots__ = ()

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise _Refused("sets the state of an object to something else than a dictionary")
        self.update(state)


def _product(shape) -> int:
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise _Refused(f"has a tensor of shape {shape!r}")
    return int(np.prod([int(n) for n in shape], dtype=object)) if shape else 1


def _tensor(storage, offset, size, stride, *_) -> np.ndarray:
    """torch._utils._rebuild_tensor and its second version: a window on a storage."""
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0 or _product(stride) < 0:
        raise _Refused("has a tensor without its storage")
    memory, count = storage.array, _product(size)
    if len(size) != len(stride):
        raise _Refused(f"has a tensor of shape {size} with strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and last >= memory.size:
        raise _Refused(f"has a tensor of shape {size} that reaches beyond its {memory.size} numbers")
    if not count:
        return np.empty(size, memory.dtype)
    bytes_ = tuple(step * memory.itemsize for step in stride)
    return as_strided(memory[offset:], size, bytes_, writeable=False)


def _typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> np.ndarray:
    """torch._utils._rebuild_tensor_v3: the storage is bytes, the offset counts numbers."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, _DType):
        raise _Refused("has a tensor without its storage or dtype")
    memory = storage.array.view(np.uint8)
    whole = memory[: memory.size // dtype.dtype.itemsize * dtype.dtype.itemsize]
    return _tensor(_Storage(whole.view(dtype.dtype)), offset, size, stride)


def _scalar(kind, data=None) -> Any:
    if not isinstance(kind, _DType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise _Refused("has a number that is no block of bytes")
    return np.frombuffer(data, kind.dtype)[0]


def _frombuffer(data, kind, shape, order) -> np.ndarray:
    if not isinstance(kind, _DType) or not isinstance(data, bytes | bytearray):
        raise _Refused("has an array that is no block of bytes")
    return np.frombuffer(bytes(data), kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text, coding) -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise _Refused(f"encodes a text as {coding!r}; bytes are written as latin1")
    return text.encode("latin1")


def _bytearray(data=b"", *coding) -> bytearray:
    if coding:
        data = _encode(data, *coding)
    if not isinstance(data, bytes):
        raise _Refused("has a bytearray that is no block of bytes")
    return bytearray(data)


def _persistent(meta) -> Persistent:
    """torch_utils.persistence._reconstruct_persistent_obj, but for the source code in meta, which stays a text."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise _Refused("has a persistent object that is not of a class with a state")
    state = dict(meta["state"])
    args, kwargs = state.pop("_init_args", None) or (), state.pop("_init_kwargs", None) or {}
    return Persistent(str(meta.get("class_name")), tuple(args), dict(kwargs), state)


def _storage_dtype(kind) -> np.dtype:
    if not isinstance(kind, _DType):
        raise _Refused("has a storage of no known kind")
    return kind.dtype


def _torch_dtype(name: str) -> _DType:
    kind = _DType.__new__(_DType)
    kind.dtype = np.dtype(getattr(ml_dtypes, name, name))
    return kind


def _known(name: str, storages_alone: bool) -> Any:
    """The stand-in for a global, new each time. Raises _Refused for names that are not known."""
    *module, last = name.split(".")
    if module in (["torch"], ["torch", "cuda"], ["torch", "storage"]) and last in _STORAGES:
        return _torch_dtype(_STORAGES[last])
    if not storages_alone:
        if module == ["torch"] and last in _DTYPES:
            return _torch_dtype(_DTYPES[last])
        if name in _FUNCTIONS:
            return _Call(_FUNCTIONS[name])
        if name in _CLASSES:
            return _CLASSES[name]
    raise _Refused(
        f"names {name}, and a pickle may call what it names: that could run any code, so nothing was done. Read are "
        f"{_ACCEPTED}"
    )


class _Unpickler(pickle.Unpickler):
    """The only names it finds are known ones, whose stand-ins are all that it can call."""

    def __init__(self, file: IO[bytes], storage: Callable[[Any], _Storage] | None = None, storages_alone: bool = False):
        super().__init__(file)
        self._storage, self._alone = storage, storages_alone

    def find_class(self, module, name):
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        return _known(f"{module}.{name}", self._alone)

    def persistent_load(self, pid):
        if self._storage is None:
            raise _Refused("points to something outside itself, as no snapshot does")
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise _Refused(f"points outside itself to {str(pid)[:80]}, which is no storage")
        return self._storage(pid)


def _load(file: IO[bytes], storage: Callable[[Any], _Storage] | None = None, storages_alone: bool = False) -> Any:
    """The next pickle in a file. Places in its memo are counted first: Python's reader makes room up to any number."""
    start, places = file.tell(), 0
    for code, arg, _ in pickletools.genops(file):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            places += 1
            if isinstance(arg, int) and arg > places:
                raise _Refused(f"uses place {arg} of its memo with {places} in use, as no pickle does")
    file.seek(start)
    return _Unpickler(file, storage, storages_alone).load()


def _read(file: IO[bytes], storages_alone: bool = False) -> Any:
    start = file.tell()
    if file.read(4) == b"PK\x03\x04":
        return _read_zip(file, storages_alone)
    file.seek(start)
    first = _load(file, storages_alone=storages_alone)
    return _read_stream(file, storages_alone) if isinstance(first, int) and first == MAGIC else first


def _read_zip(file: IO[bytes], storages_alone: bool) -> Any:
    """A file of torch.save: a pickle and one entry for each storage, in a zip archive that is not compressed."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("is a zip archive, but none of torch.save: it has no data.pkl")
        folder = pickles[0].partition("/")[0]
        packed = [name for name, info in entries.items() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise _Refused(f"is a zip archive with compressed parts ({packed[0]}), which torch.save does not write")
        little = f"{folder}/byteorder" not in entries or archive.read(f"{folder}/byteorder") == b"little"
        known: dict[str, _Storage] = {}

        def storage(pid) -> _Storage:
            _, kind, key, _, count = pid[:5]
            dtype, name = _storage_dtype(kind), f"{folder}/data/{key}"
            if name not in known:
                if type(count) is not int or name not in entries or entries[name].file_size != count * dtype.itemsize:
                    raise _Refused(f"has no {name} of {count} numbers")
                known[name] = _Storage(_swapped(np.frombuffer(archive.read(name), dtype), little))
            if known[name].array.dtype != dtype:
                raise _Refused(f"has {name} in two dtypes")
            return known[name]

        return _load(io.BytesIO(archive.read(pickles[0])), storage, storages_alone)


def _read_stream(file: IO[bytes], storages_alone: bool) -> Any:
    """What follows the magic number in files of torch.save before 1.6: pickles, then the storages."""
    version, system = (_load(file, storages_alone=True) for _ in range(2))
    if version != 1001 or not isinstance(system, dict):
        raise _Refused(f"is written in version {version} of torch.save, 1001 is read")
    here = file.tell()
    left = file.seek(0, io.SEEK_END) - here
    file.seek(here)
    known: dict[Any, _Storage] = {}

    def storage(pid) -> _Storage:
        _, kind, key, _, count = pid[:5]
        dtype = _storage_dtype(kind)
        if any(part is not None for part in pid[5:]):
            raise _Refused("has a storage that is part of another, as no file since 2017 has")
        if key not in known:
            if type(count) is not int or not 0 <= count * dtype.itemsize <= left:
                raise _Refused(f"has no storage of {count} numbers in its {left} bytes")
            known[key] = _Storage(np.zeros(count, dtype))  # filled below, where the tensors already look
        if known[key].array.dtype != dtype:
            raise _Refused("has a storage in two dtypes")
        return known[key]

    tree = _load(file, storage, storages_alone)
    keys = _load(file, storages_alone=True)
    if not isinstance(keys, list) or set(keys) != set(known):
        raise _Refused("does not list its storages")
    for key in keys:
        array = known[key].array
        (count,) = struct.unpack("<q", _exactly(file, 8))
        if count != array.size:
            raise _Refused(f"has a storage of {count} numbers where {array.size} were announced")
        data = np.frombuffer(_exactly(file, array.nbytes), array.dtype)
        array[...] = _swapped(data, system.get("little_endian", True))
    return tree


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes are missing")
    return data


def _swapped(data: np.ndarray, little: bool) -> np.ndarray:
    return data if little else data.byteswap()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.storage._load_from_bytes": lambda data: _read(io.BytesIO(data), storages_alone=True),
    "torch.Size": lambda size=(): tuple(size),
    "torch.device": lambda *args: ":".join(map(str, args)),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "numpy.dtype": lambda name, *_: _DType(name),
    "numpy.ndarray": lambda *_: None,  # the class alone is named, as what _reconstruct makes
    "numpy.core.multiarray._reconstruct": lambda *_: _Array((0,), np.uint8),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _encode,
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "builtins.bytearray": _bytearray,
    "builtins.complex": lambda *args: complex(*args),
}
_CLASSES: dict[str, type] = {
    "collections.OrderedDict": _Dict,
    "dnnlib.util.EasyDict": _Dict,
    "argparse.Namespace": _State,
    **dict.fromkeys(_MODULES, _State),
}
