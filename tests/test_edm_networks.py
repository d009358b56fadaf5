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
from parity import answers, assert_parity, nchw, nhwc, shapes_of, torch_answers, values, weights, with_weights

from ddistill.net import EpsPrecondition, Scaled, from_nnx
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
        dataclasses.replace(SONG, label_dim=0, augment_dim=0, embedding_type="fourier", encoder_type="residual", **WIDE),
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
    module = kind(config, rngs=nnx.Rngs(0), **options)
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param))):
        name = ".".join(map(str, path))
        variable[...] = weights({name: variable.shape})[name]
    return module


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
    assert_parity(case, answers(ours(kind, config), call_with(config), X), answer, request.config.getoption("--record"))
