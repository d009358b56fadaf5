"""diffusers' UNets: equal to PyTorch's in value and derivative, for every block and option that checkpoints use."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import answers, assert_close, assert_parity, nchw, nhwc, shapes_of, torch_answers, values, with_weights

from ddistill.features import features
from ddistill.net import EpsPrecondition, Net, Scaled, from_nnx, split
from ddistill.networks.conditions import Prompt
from ddistill.networks.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from ddistill.process import VP

B, SIDE = 2, 8
TIMES = np.array([3.0, 711.0], np.float32)

PIXELS = {
    # DDPM's: attention on one level, padding after the image, sines first.
    "unet_ddpm": (
        UNet2DConfig(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=None,
            norm_num_groups=4,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        ),
        None,
    ),
    # Consistency models': the resolution changes inside residual blocks, time scales and shifts, labels.
    "unet_consistency": (
        UNet2DConfig(
            block_out_channels=(8, 16, 16),
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=4,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
            num_class_embeds=5,
        ),
        np.array([4, 0]),
    ),
}


def prompt(config, seed=5, tokens=5, ids=6, mask=False):
    """A prompt of all that a network of this config reads."""
    width = config.encoder_hid_dim or config.cross_attention_dim
    states = values(seed, B, tokens, width)
    seen = (np.arange(tokens) < np.array([[tokens], [2]])) * np.ones((B, 1)) if mask else None
    if config.addition_embed_type is None:
        return Prompt(states, seen)
    pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
    return Prompt(states, seen, values(seed + 1, B, pooled), np.float32([[64, 48, 0, 8, 32, 32], [8, 8, 1, 2, 8, 9]]))


TEXTS = {
    # Stable Diffusion 1: convolutions as maps in and out, heads by number; a masked text.
    "unet_sd": UNet2DConditionConfig(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=2,
    ),
    # XL: linear maps, depths and heads by level, pooled text and sizes; LCM's guidance embedding.
    "unet_sdxl": UNet2DConditionConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 3),
        use_linear_projection=True,
        upcast_attention=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        time_cond_proj_dim=8,
    ),
}
SCALES = np.array([1.5, 1.0], np.float32)


def lists(option):
    """Tuples of a config as JSON has them."""
    return [lists(o) for o in option] if isinstance(option, tuple) else option


def torch_model(config, name):
    """diffusers' model of a config of ours."""
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(**{k: lists(v) for k, v in vars(config).items()})


def torch_pixels(config, labels, x, answer=torch_answers):
    import torch

    labels = None if labels is None else torch.from_numpy(np.asarray(labels))

    def call(model, x):
        return model(x, torch.from_numpy(TIMES), class_labels=labels).sample

    return answer(torch_model(config, "UNet2DModel"), call, nchw(x), arrange=nhwc, restore=nhwc)


def torch_texts(config, given, x, w=None, labels=None, answer=torch_answers):
    import torch
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    states, mask, pooled, sizes = (
        None if a is None else torch.from_numpy(np.asarray(a, np.float32))
        for a in (given.states, given.mask, given.pooled, given.sizes)
    )
    guidance = None
    if w is not None:
        guidance = Pipeline.get_guidance_scale_embedding(None, torch.from_numpy(w - 1), config.time_cond_proj_dim)

    def call(model, x):
        return model(
            x,
            torch.from_numpy(TIMES),
            states,
            class_labels=labels,
            timestep_cond=guidance,
            encoder_attention_mask=mask,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample

    return answer(torch_model(config, "UNet2DConditionModel"), call, nchw(x), arrange=nhwc, restore=nhwc)


@pytest.fixture(scope="module")
def ours():
    """Our answers by case, each computed once."""
    known = {}

    def find(case):
        if case not in known:
            known[case] = answers(*ask(case))
        return known[case]

    return find


def ask(case):
    """Module, call and input of a case."""
    if case in PIXELS:
        config, cond = PIXELS[case]
        module = UNet2D(config, rngs=nnx.Rngs(0))
    else:
        config = TEXTS[case]
        module = UNet2DCondition(config, rngs=nnx.Rngs(0))
        cond = prompt(config, mask=case == "unet_sd")
        cond = Scaled(cond, SCALES) if config.time_cond_proj_dim else cond
    return module, lambda module, x: module(x, TIMES, cond), values(1, B, SIDE, SIDE, config.in_channels)


@pytest.mark.parametrize("case", [*PIXELS, *TEXTS])
def test_values_and_derivatives_are_the_recorded_ones_of_diffusers(case, ours):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", [*PIXELS, *TEXTS])
def test_values_and_derivatives_are_those_of_diffusers(case, ours, request):
    pytest.importorskip("diffusers")
    x = ask(case)[2]
    if case in PIXELS:
        theirs = torch_pixels(*PIXELS[case], x)
    else:
        config = TEXTS[case]
        theirs = torch_texts(
            config, prompt(config, mask=case == "unet_sd"), x, SCALES if config.time_cond_proj_dim else None
        )
    assert_parity(case, ours(case), theirs, request.config.getoption("--record"))
