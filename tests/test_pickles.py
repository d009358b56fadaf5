"""Pickles are read without being run: what is in them is bit-exact, and what else they try is refused, undone."""

import builtins
import dataclasses
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ddistill.hub.pickles import (
    MAGIC,
    Persistent,
    checkpoint_tensors,
    edm_definition,
    edm_net,
    edm_snapshot,
    read_pickle,
)
from ddistill.hub.weights import tensors_from
from ddistill.net import EDMPrecondition, EpsPrecondition, split
from ddistill.networks.edm import DhariwalUNetConfig, SongUNet, SongUNetConfig, VEPrecondition
from ddistill.networks.edm2 import EDM2UNetConfig
from ddistill.networks.layers import rngs_of

STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage", "complex64": "ComplexFloatStorage",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Raw:
    """A piece of a pickle's program."""

    code: bytes


def piece(tree):
    """The program that leaves a tree on the stack, whose leaves may be programs."""
    if isinstance(tree, Raw):
        return tree.code
    if isinstance(tree, dict):
        return b"}(" + b"".join(piece(k) + piece(v) for k, v in tree.items()) + b"u"
    if isinstance(tree, tuple):
        return b"(" + b"".join(map(piece, tree)) + b"t"
    if isinstance(tree, list):
        return b"](" + b"".join(map(piece, tree)) + b"e"
    return pickle.dumps(tree, 4)[2:-1] if not isinstance(tree, bytes | str) else pickle.dumps(tree, 3)[2:-1]


def program(tree):
    return b"\x80\x04" + piece(tree) + b"."


def name(path):
    module, _, last = path.rpartition(".")
    return Raw(f"c{module}\n{last}\n".encode())


def call(path, *args):
    return Raw(piece(name(path)) + piece(args) + b"R")


def made(path, state):
    """An object without its constructor, with a state."""
    return Raw(piece(name(path)) + b")\x81" + piece(state) + b"b")


def stored(kind, key, count):
    return Raw(piece(("storage", name(f"torch.{kind}"), key, "cpu", count)) + b"Q")


def old_file(tree, arrays):
    """torch.save's format before 1.6, from its description in torch/serialization.py."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, system))
    data = b"".join(struct.pack("<q", a.size) + a.tobytes() for a in arrays.values())
    return head + program(tree) + pickle.dumps(list(arrays), 2) + data


def zip_file(tree, arrays, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program(tree))
        archive.writestr("archive/byteorder", "little")
        for key, array in arrays.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return file.getvalue()


def window(storage, shape, strides, offset=0):
    return call(
        "torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, call("collections.OrderedDict")
    )


def inline(array):
    """A tensor as pickle.dump writes it: its storage is a file of torch.save within the pickle."""
    kind = STORAGES[array.dtype.name]
    data = old_file(stored(kind, "0", array.size), {"0": array})
    strides = tuple(s // array.itemsize for s in np.empty(array.shape, array.dtype).strides)
    return window(call("torch.storage._load_from_bytes", data), array.shape, strides)


def some(dtype, *shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize)).astype(np.uint8)
    return (noise[..., 0] % 2 == 1) if dtype == "bool" else noise.view(dtype)[..., 0]


def same(here, there):
    assert here.dtype == there.dtype and here.shape == there.shape
    assert here.tobytes() == there.tobytes()


def read(tmp_path, data):
    path = tmp_path / f"{len(os.listdir(tmp_path))}.pkl"  # waits for no old one to reach the disk
    path.write_bytes(data)
    return read_pickle(path)


@pytest.mark.parametrize("dtype", STORAGES)
def test_tensors_of_every_dtype_come_back_bit_for_bit(dtype, tmp_path):
    dtype = getattr(ml_dtypes, dtype, dtype)
    a = some(dtype, 3, 4)
    same(read(tmp_path, program({"a": inline(a)}))["a"], a)
    storage = stored(STORAGES[np.dtype(dtype).name], "7", a.size)
    tree = [window(storage, (3, 4), (4, 1)), window(storage, (2, 3), (1, 4), 1), window(storage, (0, 4), (4, 1))]
    for form in (old_file, zip_file):
        whole, part, empty = read(tmp_path, form(tree, {"7": a}))
        same(whole, a)
        same(part, a.T[1:3])
        assert empty.shape == (0, 4) and np.shares_memory(whole, part) and not whole.flags.writeable


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_plain_containers_are_what_pickle_wrote(protocol, tmp_path):
    tree = {
        "arrays": [np.arange(6.0).reshape(2, 3).T, np.array(["a", "bc"]), np.array([1 + 2j]), np.ones(3, dtype=">i4")],
        "numbers": (np.float64(0.5), np.float32(1.5), np.int64(-3), np.bool_(True), 3, None, True, 1 + 2j),
        "sets": [{1, 2}, frozenset("ab")], "bytes": [b"\xff\x00", bytearray(b"xy")],
    }  # fmt: skip
    out = read(tmp_path, pickle.dumps(tree, protocol))
    for here, there in zip(out["arrays"], tree["arrays"], strict=True):
        assert here.dtype.newbyteorder("=") == there.dtype.newbyteorder("=")
        assert np.array_equal(here, there)
    assert out["numbers"] == tree["numbers"] and out["sets"] == tree["sets"] and out["bytes"] == tree["bytes"]


def persistent(class_name, state, source):
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return call("torch_utils.persistence._reconstruct_persistent_obj", meta)


def as_module(tensors, buffers, source, **state):
    """Nested modules with these tensors, as EDM pickles them."""
    own = {k: inline(v) for k, v in tensors.items() if "." not in k}
    trained = {k: v for k, v in own.items() if k not in buffers}
    half = call("numpy.core.multiarray.scalar", call("numpy.dtype", "f8", False, True), struct.pack("<d", 0.5))
    children = {k.partition(".")[0] for k in tensors if "." in k}
    modules = {}
    for child in sorted(children):
        below = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{child}.")}
        modules[child] = as_module(below, buffers, source)
    parts = {
        "training": False,
        "_parameters": {k: call("torch._utils._rebuild_parameter", v, False, {}) for k, v in trained.items()},
        "_buffers": {k: v for k, v in own.items() if k in buffers},
        "_non_persistent_buffers_set": call("builtins.set", []),
        "_modules": modules,
        "skip_scale": half,
        **state,
    }  # fmt: skip
    if "enc" not in children and any("x" in child for child in children):
        return made("torch.nn.modules.container.ModuleDict", parts)
    return persistent("Some", parts, source)


SONG = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 4, "augment_dim": 3, "use_fp16": True, "dropout": 0.13,
    "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 2, "num_blocks": 1,
    "attn_resolutions": [4], "embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "standard",
    "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A snapshot of a small network, and the tensors in it; its source code would leave a file behind if it ran."""
    folder = tmp_path_factory.mktemp("snapshot")
    config = edm_definition({**SONG, "class_name": "EDMPrecond"})[0]
    params, rest, _ = split(nnx.eval_shape(lambda: SongUNet(config, rngs=rngs_of(0))))
    shapes = {**params, **rest}
    tensors = dict(tensors_from({p: some("int8", *a.shape).astype(np.float16) for p, a in shapes.items()}))
    saved = {f"model.{k}": v for k, v in tensors.items()}
    saved["model.enc.4x4_down.conv0.resample_filter"] = np.ones((1, 1, 4, 4), np.float16)
    source = f"open({str(folder / 'ran')!r}, 'w')"
    kwargs = {"_init_args": (), "_init_kwargs": Raw(piece(name("dnnlib.util.EasyDict")) + b")\x81(" + piece(SONG)[2:])}
    module = as_module(saved, ("freqs", "resample_filter"), source, **kwargs)
    whole = Raw(module.code.replace(piece("Some"), piece("EDMPrecond")))
    path = folder / "network-snapshot.pkl"
    path.write_bytes(
        program({"ema": whole, "loss_fn": persistent("EDMLoss", {"P_mean": -1.2}, source), "augment_pipe": None})
    )
    return path, tensors


def test_a_snapshot_is_read_to_a_denoiser(snapshot):
    path, tensors = snapshot
    found, init = edm_snapshot(path)
    assert set(found) == set(tensors) and init == {**SONG, "class_name": "EDMPrecond"}
    for key, tensor in tensors.items():
        same(found[key], tensor)
    net = edm_net(path)
    for path_, array in {**net.params, **net.rest}.items():
        assert array.dtype == jnp.float32, path_
    back = dict(tensors_from({**net.params, **net.rest}))
    assert set(back) == set(tensors) and all(np.array_equal(back[k], tensors[k]) for k in tensors)
    assert net.rest["map_noise.freqs"].shape == (8,)
    assert not (path.parent / "ran").exists()
    loss = read_pickle(path)["loss_fn"]
    assert loss == Persistent("EDMLoss", (), {}, {"P_mean": -1.2})


def test_a_file_without_a_network_is_refused(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(program({"ema": persistent("EDMPrecond", {"_modules": 3}, ""), "net": {}}))
    for network, words in (("ema", "no modules with tensors"), ("net", "no network 'net'"), ("other", "but ema, net")):
        with pytest.raises(ValueError, match=words):
            edm_snapshot(path, network)


def test_arguments_become_a_configuration_a_process_and_a_preconditioning():
    config, process, precondition = edm_definition({**SONG, "class_name": "EDMPrecond"})
    assert config == SongUNetConfig(
        8, label_dim=4, augment_dim=3, model_channels=8, channel_mult=(1, 2), channel_mult_emb=2, num_blocks=1,
        attn_resolutions=(4,), embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
        resample_filter=(1, 3, 3, 1), dropout=0.13,
    )  # fmt: skip
    assert (process.t_min, process.t_max) == (0.002, 80) and precondition == EDMPrecondition(0.5)
    size = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}
    config, process, precondition = edm_definition({**size, "class_name": "iDDPMPrecond"})
    assert config == DhariwalUNetConfig(64, out_channels=6, label_dim=1000)
    assert process.t_max == 1000 and precondition == EpsPrecondition(time_offset=-1)
    config, process, precondition = edm_definition({**size, "class_name": "VPPrecond", "M": 100, "beta_d": 9.9})
    assert precondition == EpsPrecondition(99) and process.schedule.beta_max == 10
    assert edm_definition({**size, "class_name": "VEPrecond", "sigma_max": 50})[1:] == (
        dataclasses.replace(edm_definition({**size, "class_name": "VEPrecond"})[1], t_max=50), VEPrecondition()
    )  # fmt: skip
    config, _, precondition = edm_definition(
        {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "use_fp16": True, "model_channels": 128,
         "sigma_data": 0.4, "class_name": "Precond", "logvar_channels": 128}
    )  # fmt: skip
    assert config == EDM2UNetConfig(64, 4, 1000, model_channels=128) and precondition == EDMPrecondition(0.4)
    with pytest.raises(ValueError, match="no img_resolution"):
        edm_definition({"class_name": "EDMPrecond"})
    for bad, words in (
        ({"class_name": "Mystery"}, "given 'Mystery'"), ({"decoder_type": "skip"}, "does not support decoder_type"),
        ({"colour": 1}, "colour = 1"), ({"model_type": "UNet"}, "model_type is one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            edm_definition({**SONG, "class_name": "EDMPrecond", **bad})


def test_checkpoints_of_torch_have_their_tensors_by_name(tmp_path):
    a = some("float32", 2, 3)
    window_ = window(stored("FloatStorage", "0", 6), (2, 3), (3, 1))
    metadata = Raw(
        piece(call("collections.OrderedDict", [("w", window_)])) + piece({"_metadata": {"version": 1}}) + b"b"
    )
    path = tmp_path / "x.pt"
    path.write_bytes(
        zip_file({"model": metadata, "ema": metadata, "args": made("argparse.Namespace", {"lr": 0.1})}, {"0": a})
    )
    for entry in (None, "model"):
        same(checkpoint_tensors(path, entry)["w"], a)
    assert read_pickle(path)["args"] == {"lr": 0.1}
    with pytest.raises(ValueError, match="no tensors by name at 'args'"):
        checkpoint_tensors(path, "args")


EVIL = {
    "a command": call("os.system", "touch {ran}"),
    "a command by its own name": call("posix.system", "touch {ran}"),
    "builtins": call("builtins.eval", "open({ran!r}, 'w')"),
    "attributes": call("builtins.getattr", call("builtins.set"), "__class__"),
    "an import": call("importlib.import_module", "antigravity"),
    "a process": call("subprocess.Popen", ["touch", "{ran}"]),
    "a dotted name": Raw(piece("collections") + piece("OrderedDict.fromkeys") + b"\x93" + piece(([1],)) + b"R"),
    "a class of PyTorch": made("torch.nn.modules.linear.Linear", {}),
    "a script module": call("torch.jit._pickle.restore_type_tag", 1),
    "a partial": call("functools.partial", 1),
    "an old instance": Raw(b"(" + piece("touch {ran}") + b"ios\nsystem\n"),
    "a number called": Raw(piece(3) + piece(()) + b"R"),
    "a stand-in changed": Raw(piece(name("torch._utils._rebuild_tensor_v2")) + piece((None, {"_build": 1})) + b"b"),
    "a class changed": Raw(piece(name("collections.OrderedDict")) + piece((None, {"keys": 1})) + b"b"),
    "a storage changed": Raw(piece(stored("FloatStorage", "0", 4)) + piece((None, {"array": 1})) + b"b"),
    "a dtype of objects": call("numpy.dtype", "O8", False, True),
    "a dtype with fields": Raw(
        piece(call("numpy.dtype", "f8", False, True)) + piece((3, "<", None, ("a",), {}, -1, -1, 63)) + b"b"
    ),
    "an array with a short text": Raw(
        piece(call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), (0,), b"b"))
        + piece((1, (4,), call("numpy.dtype", "f8", False, True), False, b"12345678")) + b"b"
    ),
    "a storage that runs code": call("torch.storage._load_from_bytes", program(call("os.system", "touch {ran}"))),
    "a window beyond its storage": window(stored("FloatStorage", "0", 4), (2, 3), (2, 1)),
    "a window that begins late": window(stored("FloatStorage", "0", 4), (4,), (1,), 1),
    "a window before its storage": window(stored("FloatStorage", "0", 4), (2,), (-1,), 1),
    "another shape of storage": window(stored("FloatStorage", "0", 5), (5,), (1,)),
    "a memo of gigabytes": Raw(piece(1) + b"r\xff\xff\xff\xff"),
    "a memo of gigabytes in digits": Raw(piece(1) + b"p4294967295\n"),
    "a pointer elsewhere": Raw(piece(("module", "m", "x", "y", "z")) + b"Q"),
}  # fmt: skip


@pytest.mark.parametrize("what", EVIL)
def test_what_is_no_tensor_is_refused_and_nothing_ran(what, tmp_path, monkeypatch):
    ran = tmp_path / "ran"

    def never(*_):
        raise AssertionError("executed")

    for where, function in ((os, "system"), (builtins, "eval"), (subprocess, "Popen")):
        monkeypatch.setattr(where, function, never)
    code = EVIL[what].code
    for form in (
        lambda c, _: program(Raw(c)), old_file, zip_file, lambda c, _: program([Raw(c), inline(np.ones(2, "f4"))])
    ):  # fmt: skip
        given = code if form is not old_file and form is not zip_file else Raw(code)
        with pytest.raises(ValueError, match=r"\d+.pkl (names|is|has|sets|uses|points)") as error:
            read(tmp_path, form(given, {"0": np.ones(4, np.float32)}))
        assert "executed" not in str(error.value)
    assert not ran.exists() and "antigravity" not in sys.modules


def test_a_refused_name_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"names os.system, and a pickle may call what it names"):
        read(tmp_path, program(call("os.system", "true")))


def test_an_evil_file_does_execute_for_pickle_itself(tmp_path):
    """The files above are no blanks."""
    pickle.loads(program(call("os.mkdir", str(tmp_path / "ran"))))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("form", ["plain", "old", "zip"])
def test_files_that_are_cut_off_or_compressed_are_refused(form, tmp_path):
    a = some("float32", 4)
    tree = window(stored("FloatStorage", "0", 4), (4,), (1,))
    data = {
        "plain": program({"a": inline(a), "b": [1.5, "text"]}),
        "old": old_file(tree, {"0": a}),
        "zip": zip_file(tree, {"0": a}),
    }[form]
    read(tmp_path, data)
    for cut in {0, 1, 3, *range(5, len(data), max(1, len(data) // 40)), len(data) - 1}:
        with pytest.raises(ValueError, match=r"\d+.pkl (names|is|has|sets|uses|points)"):
            read(tmp_path, data[:cut])
    with pytest.raises(ValueError, match="compressed parts"):
        read(tmp_path, zip_file(tree, {"0": a}, zipfile.ZIP_DEFLATED))
    if form == "zip":
        damaged = data.replace(a.tobytes(), bytes(16))
        with pytest.raises(ValueError, match="CRC"):
            read(tmp_path, damaged)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False, None])
def test_files_that_torch_wrote_come_back_bit_for_bit(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    names = (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "complex64",
    )
    tree = {n: base.mul(9).to(getattr(torch, n)) for n in names}
    tree |= {"transposed": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3)}
    tree["parameter"] = torch.nn.Parameter(base)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    dtypes = (torch.uint16, torch.float8_e4m3fn)
    extra = [base[:1].abs().to(d) for d in dtypes] if zipped else []
    path = tmp_path / "x.pt"
    if zipped is None:
        path.write_bytes(pickle.dumps({"tree": tree, "layer": layer, "extra": extra, "size": base.shape}))
    else:
        data = {"tree": tree, "layer": layer, "extra": extra, "size": base.shape}
        torch.save(data, path, _use_new_zipfile_serialization=zipped)
    out = read_pickle(path)
    assert out["size"] == (4, 6)
    for there, here in (
        (tree, out["tree"]),
        (layer, out["layer"]),
        (dict(enumerate(extra)), dict(enumerate(out["extra"]))),
    ):
        assert list(there) == list(here)
        for key, tensor in there.items():
            assert str(tensor.dtype).removeprefix("torch.") == here[key].dtype.name and here[key].shape == tensor.shape
            expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert here[key].tobytes() == expected.tobytes(), key
    with pytest.raises(ValueError, match=r"names torch.nn.modules.linear.Linear"):
        torch.save(torch.nn.Linear(2, 2), path)
        read_pickle(path)
