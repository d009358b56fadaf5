"""The UNets of EDM and EDM2 against NVlabs' own code.

Their licence keeps that code out of this repository: references are what it answered. Where it is checked out, it is
asked anew, and records: NVLABS_EDM=<folder> NVLABS_EDM2=<folder> pytest --record tests/test_edm_networks.py
"""

import dataclasses
import importlib
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import answers, assert_parity, made, nchw, nhwc, shapes_of, torch_answers, values, with_weights

from ddistill.features import features
from ddistill.net import EDMPrecondition, EpsPrecondition, Scaled, from_nnx, split
from ddistill.networks.edm import (
    DhariwalUNet,
    DhariwalUNetConfig,
    SongUNet,
    SongUNetConfig,
    VEPrecondition,
    downsample,
    upsample,
)
from ddistill.networks.edm2 import EDM2UNet, EDM2UNetConfig, normalised
from ddistill.networks.layers import rngs_of
from ddistill.process import discrete_vp, edm, squared_cosine_betas, vp

SONG = SongUNetConfig(
    8, label_dim=4, augment_dim=3, model_channels=8, channel_mult=(1, 2), channel_mult_emb=2, num_blocks=1,
    attn_resolutions=(4,),
)  # fmt: skip
WIDE = {"resample_filter": (1, 3, 3, 1), "channel_mult_noise": 2}
CASES = {
    "edm_ddpmpp": (SongUNet, SONG),
    "edm_ncsnpp": (
        SongUNet,
        dataclasses.replace(
            SONG, label_dim=0, augment_dim=0, embedding_type="fourier", encoder_type="residual", **WIDE
        ),
    ),
    "edm_adm": (
        DhariwalUNet,
        DhariwalUNetConfig(
            8, out_channels=6, label_dim=4, augment_dim=3, model_channels=32, channel_mult=(1, 4), channel_mult_emb=1,
            num_blocks=1, attn_resolutions=(4,),
        ),
    ),
}  # fmt: skip
EDM2 = EDM2UNetConfig(
    8, label_dim=4, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16,
    res_balance=0.4, label_balance=0.6, resample_filter=(1, 3, 3, 1),
)  # fmt: skip
CASES["edm2"] = EDM2UNet, EDM2
X, LABELS = values(0, 2, 8, 8, 3), np.array([1, -1])
C_NOISE = np.array([-0.7, 0.9], np.float32)


def theirs(variable, name):
    """A module of NVlabs' code in the folder that the variable names, None without it."""
    folder = os.environ.get(variable)
    if folder is None:
        return None
    for module in [m for m in sys.modules if m.partition(".")[0] in ("training", "torch_utils", "dnnlib")]:
        del sys.modules[module]  # both projects call their packages so
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def their_answers(network, cond):
    import torch

    for module in network.modules():  # filters are computed
        module._non_persistent_buffers_set.update({"resample_filter"} & set(module._buffers))
    one_hot = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]]) if cond else None

    def call(network, x):
        return network(x, torch.from_numpy(C_NOISE), one_hot)

    return torch_answers(network, call, nchw(X), arrange=lambda out: nhwc(out)[..., :3], restore=nhwc)


def ours(kind, config, **options):
    """A network of ours; what is saved but not trained has the values of its name too."""
    return made(lambda: kind(config, rngs=rngs_of(0), **options))


def call_with(config):
    cond = LABELS if config.label_dim else None
    return lambda module, x: module(x, C_NOISE, cond)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_edm(case, request):
    kind, config = CASES[case]
    project = ("NVLABS_EDM2", "training.networks_edm2") if kind is EDM2UNet else ("NVLABS_EDM", "training.networks")
    answer, code = None, theirs(*project)
    if code is not None:
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
        name = kind.__name__.removeprefix("EDM2")
        answer = their_answers(getattr(code, name)(**arguments), config.label_dim)
    module = ours(kind, config, remat=case in ("edm_adm", "edm2"))
    assert_parity(case, answers(module, call_with(config), X), answer, request.config.getoption("--record"))


KINDS = {kind.__name__: (kind, config) for kind, config in CASES.values() if config.label_dim}


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """A network with weights of its names: parameters, and its output as a compiled function of them and its inputs."""
    kind, config = KINDS[request.param]
    params, rest, code = with_weights(ours(kind, config))
    params = {path: jnp.ones(()) if path.endswith("gain") else p for path, p in params.items()}

    @jax.jit
    def run(params, cond, s_noise):
        return code(params, rest)(X, C_NOISE, cond, s_noise)

    return kind, config, params, run


def near(a, b, tolerance=1e-5):
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_a_student_starts_as_its_teacher_and_learns_where_it_goes(small):
    _, _, params, run = small
    teacher = run(params, LABELS, None)
    s_noise, w = np.array([-1.9, 0.3], np.float32), np.array([2.0, 7.5], np.float32)
    started = run(params, Scaled(LABELS, w), s_noise)
    assert near(started, teacher)
    assert np.array_equal(run(params, Scaled(LABELS, 3 * w), -s_noise), started)
    extra = {name: params[name] for name in ("target.linear.kernel", "guidance.linear.kernel")}
    slopes = jax.grad(lambda extra: jnp.sum(run({**params, **extra}, Scaled(LABELS, w), s_noise) ** 2))(extra)
    assert all(jnp.linalg.norm(slope) > 1e-3 for slope in slopes.values())
    moved = {**params, **slopes}
    assert not near(run(moved, Scaled(LABELS, w), -s_noise), run(moved, Scaled(LABELS, w), s_noise), 1e-3)
    assert not near(run(moved, Scaled(LABELS, 3 * w), s_noise), run(moved, Scaled(LABELS, w), s_noise), 1e-3)


def test_no_label_is_minus_one_or_the_number_of_classes(small):
    _, config, params, run = small
    none = run(params, np.array([-1, -1]), None)
    assert np.array_equal(run(params, np.array([config.label_dim] * 2), None), none)
    assert not near(run(params, np.array([1, 1]), None), none, 1e-2)


def test_sixteen_bits_stay_near_and_dropout_needs_a_key(small):
    kind, config, params, run = small
    full = run(params, LABELS, None)
    _, rest, code = split(ours(kind, dataclasses.replace(config, dropout=0.3), dtype=jnp.bfloat16))
    low = jax.jit(lambda p: code(p, rest)(X, C_NOISE, LABELS))(params)
    assert low.dtype == jnp.float32 and not near(low, full, 1e-4) and near(low, full, 0.06)
    if kind is not DhariwalUNet:  # its blocks are SongUNet's
        half = jax.jit(lambda p, key: code(p, rest)(X, C_NOISE, LABELS, rngs=nnx.Rngs(dropout=key)))
        first, again, other = (half(params, jax.random.key(seed)) for seed in (0, 0, 1))
        assert np.array_equal(first, again) and not near(first, other, 0.01) and not near(first, low, 0.01)


def test_recomputed_blocks_are_features_too():
    kind, config = CASES["edm_ddpmpp"]
    net = from_nnx(ours(kind, config, remat=True), edm(), EDMPrecondition())
    layers = ["dec.8x8_block0", "enc.4x4_down"]
    shown = jax.jit(lambda net: features(net, X, 0.5, LABELS, layers=layers))(net)
    assert [shown[layer].shape for layer in layers] == [(2, 8, 8, 8), (2, 4, 4, 8)]
    assert all(jnp.std(a) > 1e-3 for a in shown.values())


SIZES = {
    "cifar10-32x32-cond-vp": (
        SongUNet, SongUNetConfig(32, label_dim=10, augment_dim=9, channel_mult=(2, 2, 2), dropout=0.13), 55_735_299
    ),
    "cifar10-32x32-cond-ve": (
        SongUNet,
        SongUNetConfig(
            32, label_dim=10, augment_dim=9, channel_mult=(2, 2, 2), embedding_type="fourier", encoder_type="residual",
            **WIDE,
        ),
        56_400_643,
    ),
    "imagenet-64x64-cond-adm": (DhariwalUNet, DhariwalUNetConfig(64, label_dim=1000), 295_899_267),
    "edm2-img64-s": (EDM2UNet, EDM2UNetConfig(64, label_dim=1000), 280_209_253),
    "edm2-img512-xs": (EDM2UNet, EDM2UNetConfig(64, 4, 1000, model_channels=128), 124_713_125),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_networks_have_their_number_of_parameters(name):
    """Counted from NVlabs' code; without EDM2's 128 of logvar."""
    kind, config, count = SIZES[name]
    shapes = shapes_of(lambda: kind(config, rngs=rngs_of(0)))
    assert sum(math.prod(s) for p, s in shapes.items() if not p.startswith(("target.", "guidance."))) == count


def test_resampling_is_that_of_torch():
    """Against the definition: filter with zeros between or around, every second value."""
    x = values(3, 1, 6, 4, 2)
    for taps in ((1, 1), (1, 3, 3, 1), (1, 2, 5, 4)):
        f, pad = np.array(taps) / sum(taps), len(taps) // 2 - 1
        down, up = np.zeros((1, 3, 2, 2)), np.zeros((1, 12, 8, 2))
        for i, a in enumerate(f):
            for j, b in enumerate(f):
                for h in range(6):
                    for w in range(4):
                        m, n = divmod(h + pad - i, 2), divmod(w + pad - j, 2)
                        if m[1] == n[1] == 0 and 0 <= m[0] < 3 and 0 <= n[0] < 2:
                            down[:, m[0], n[0]] += a * b * x[:, h, w]
                        y, z = 2 * h + i - pad, 2 * w + j - pad
                        if 0 <= y < 12 and 0 <= z < 8:
                            up[:, y, z] += 4 * a * b * x[:, h, w]
        assert np.allclose(downsample(x, taps), down, atol=1e-6) and np.allclose(upsample(x, taps), up, atol=1e-5)


def coefficients(process, precondition, t):
    """σ and EDM's coefficients (c_skip, c_out, c_in, c_noise) of x/α, of ours for x."""
    t = jnp.asarray(t, jnp.float32)
    alpha = process.alpha(t)
    c_skip, c_out, c_in, c_noise = precondition(process, t)
    return tuple(np.asarray(c, np.float64) for c in (process.rho(t), c_skip * alpha, c_out, c_in * alpha, c_noise))


def test_preconditionings_are_those_of_edms_table(x64):
    """Karras et al. 2022, table 1."""
    sigma, *ours_ = coefficients(vp(0.1, 20.0), EpsPrecondition(999), [0.01, 0.4, 1.0])
    time = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(sigma**2 + 1)) - 0.1) / 19.9
    for c, expected in zip(ours_, (1, -sigma, 1 / np.sqrt(sigma**2 + 1), 999 * time), strict=True):
        assert np.allclose(c, expected, rtol=1e-4)
    sigma, *ours_ = coefficients(edm(0.02, 100), VEPrecondition(), [0.02, 3.0, 100.0])
    for c, expected in zip(ours_, (1, sigma, 1, np.log(sigma / 2)), strict=True):
        assert np.allclose(c, expected, rtol=1e-5)
    at_same_noise = coefficients(vp(), VEPrecondition(), vp().time_of(-np.log(np.array([3.0]))))
    assert np.allclose(np.stack(at_same_noise), np.array([[3], [1], [3], [1], [np.log(1.5)]]), rtol=1e-4)
    levels = [0.0]
    bar = np.sin(np.pi / 2 * np.arange(1001) / 1000 / 1.008) ** 2
    for j in range(1000, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1))
    times = np.array([1, 2, 500, 1000])
    process = discrete_vp(squared_cosine_betas(1000))
    sigma, *ours_ = coefficients(process, EpsPrecondition(time_offset=-1), times)
    assert np.allclose(sigma, np.array(levels)[times], rtol=2e-3)
    for c, expected in zip(ours_, (1, -sigma, 1 / np.sqrt(sigma**2 + 1), times - 1), strict=True):
        assert np.allclose(c, expected, rtol=1e-4)


def test_forced_normalisation_leaves_what_the_network_computes():
    kind, config = CASES["edm2"]
    params, rest, code = with_weights(ours(kind, config))
    large = {p: 3 * w if p.endswith("kernel") else w for p, w in params.items()}
    forced = normalised(large)
    for path, w in forced.items():
        if path.startswith(("target.", "guidance.")) or not path.endswith("kernel"):
            assert np.array_equal(w, large[path]), path
        else:
            size = np.sqrt(np.mean(np.square(w), axis=tuple(range(w.ndim - 1))))
            assert np.allclose(size, 1, atol=3e-3), path  # but for EDM2's ε of 10⁻⁴ beside weights of 10⁻¹
    run = jax.jit(lambda p: code(p, rest)(X, C_NOISE, LABELS))
    assert np.allclose(run(forced), run(large), rtol=2e-2, atol=2e-3 * float(jnp.abs(run(large)).max()))


def test_bad_inputs_are_told():
    for bad, words in (
        ({"embedding_type": "none"}, "embedding_type is one of positional, fourier"),
        ({"img_resolution": 9}, "halve images 1 times; 9 pixels"),
        ({"resample_filter": (1, 2, 1)}, "even number of taps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(SONG, **bad)
    with pytest.raises(ValueError, match="10 channels do not split into 2 groups|do not split"):
        nnx.eval_shape(lambda: SongUNet(dataclasses.replace(SONG, model_channels=9), rngs=rngs_of(0)))
    for kind, config in KINDS.values():
        plain = nnx.eval_shape(lambda: kind(dataclasses.replace(config, label_dim=0), rngs=rngs_of(0)))
        graph, state = nnx.split(plain)
        for x, cond, words in (
            (X, LABELS, f"this {kind.__name__} was built without classes"), (X[:, :7], None, "multiples of 2"),
            (X[..., :2], None, r"\[B, H, W, 3\]"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x, C_NOISE, cond), state, x)
