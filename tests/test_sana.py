"""Sana against diffusers': outputs, gradients, parameter counts; linear attention against attention's definition."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import (
    answers,
    assert_close,
    assert_parity,
    made,
    nchw,
    nhwc,
    shapes_of,
    torch_answers,
    values,
    weights,
    with_weights,
)

from ddistill.net import Scaled
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import rngs_of
from ddistill.networks.sana import DepthwiseConv, Sana, SanaConfig, linear_attention

TINY = SanaConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=6,
    cross_attention_dim=16,
    caption_channels=10,
    sample_size=8,
)
CASES = {
    "sana": (TINY, (6, 8)),  # not square
    "sana_sprint": (
        replace(TINY, guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0, out_channels=None),
        (4, 4),
    ),
    "sana_positions": (
        replace(TINY, interpolation_scale=2, patch_size=2, attention_bias=True, mlp_ratio=1.3, norm_eps=0.1),
        (8, 12),
    ),
}
TIMES = np.array([3.0, 812.5], np.float32)
SCALES = np.array([4.5, 1.0], np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
PROMPT = Prompt(values(7, 2, 5, 10), mask=MASK)


def make(config, **options):
    return made(lambda: Sana(config, rngs=rngs_of(0), **options))


def images(case):
    return values(0, 2, *CASES[case][1], 4)


@cache
def ours(case, remat=False):
    config = CASES[case][0]
    cond = Scaled(PROMPT, SCALES) if config.guidance_embeds else PROMPT
    return answers(make(config, remat=remat), lambda m, x: m(x, TIMES, cond), images(case))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recorded_answers(case):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case, request):
    torch = pytest.importorskip("torch")
    from diffusers import SanaTransformer2DModel

    config = CASES[case][0]
    guidance = torch.from_numpy(SCALES) * config.guidance_embeds_scale if config.guidance_embeds else None

    def call(model, x):
        out = model(
            x,
            encoder_hidden_states=torch.from_numpy(PROMPT.states),
            timestep=torch.from_numpy(TIMES),
            guidance=guidance,
            encoder_attention_mask=torch.from_numpy(MASK),
        )
        return out.sample

    model = SanaTransformer2DModel(**vars(config))
    expected = torch_answers(model, call, nchw(images(case)), arrange=nhwc, restore=nhwc)
    assert_parity(case, ours(case), expected, recording=request.config.getoption("--record"))


def test_rematerialisation_changes_nothing():
    assert_close(ours("sana", remat=True), ours("sana"), 1e-5)


def test_bfloat16_stays_near_float32():
    params, rest, code = with_weights(make(TINY, dtype=jnp.bfloat16))
    out = jax.jit(lambda p, x: code(p, rest)(x, TIMES, PROMPT))(params, images("sana"))
    expected = ours("sana")["out"]
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - expected).max() / np.abs(expected).max() < 0.05


@pytest.mark.parametrize("case", ["sana", "sana_sprint"])
def test_a_student_starts_as_its_teacher_and_can_learn_what_it_reads(case):
    params, rest, code = with_weights(make(CASES[case][0]))

    @jax.jit
    def run(params):
        def loss(params):
            student = code(params, rest)(images(case), TIMES, Scaled(PROMPT, SCALES), TIMES / 2)
            return jnp.sum(student**2), student

        return jax.grad(loss, has_aux=True)(params)

    gradients, student = run(params)
    np.testing.assert_allclose(student, ours(case)["out"], atol=1e-6)
    reads = "guidance" if case == "sana" else "time_embed.guidance_embedder.linear_1"
    assert ("guidance.linear.kernel" in params) == (case == "sana")
    assert np.abs(gradients["target.linear.kernel"]).max() > 1e-3
    assert np.abs(gradients["guidance.linear.kernel" if case == "sana" else f"{reads}.kernel"]).max() > 1e-3


def test_linear_attention_is_attention_with_a_product_of_rectified_features():
    q, k, v = (values(i, 2, 7, 3, 4).astype(np.float64) for i in range(3))
    scores = np.einsum("blhd,bmhd->bhlm", np.maximum(q, 0), np.maximum(k, 0))
    expected = np.einsum("bhlm,bmhd->blhd", scores / (scores.sum(-1, keepdims=True) + 1e-15), v)
    np.testing.assert_allclose(linear_attention(*map(jnp.asarray, (q, k, v))), expected, rtol=1e-4, atol=1e-5)


def test_each_channel_is_convolved_by_itself():
    conv = DepthwiseConv(3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = values(1, 2, 5, 4, 3)
    expected = jax.lax.conv_general_dilated(
        x, conv.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


def test_twelve_blocks_load_in_their_order():
    params, _, _ = with_weights(make(replace(TINY, num_layers=12)))
    for i, block in enumerate(params["transformer_blocks.stack.ff.conv_inverted.kernel"]):
        name = f"transformer_blocks.{i}.ff.conv_inverted.weight"
        there = weights({name: (*block.shape[:1:-1], 1, 1)})[name]
        np.testing.assert_array_equal(block[0, 0], there[:, :, 0, 0].T)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SanaConfig(), 1_604_462_752),  # 1.6 B
        (SanaConfig(guidance_embeds=True, qk_norm="rms_norm_across_heads"), 1_610_237_472),  # Sprint, 1.6 B
        (
            SanaConfig(
                num_layers=28,
                num_attention_heads=36,
                num_cross_attention_heads=16,
                cross_attention_head_dim=72,
                cross_attention_dim=1152,
            ),
            591_747_872,  # 0.6 B
        ),
    ],
)
def test_parameters_of_the_published_networks(config, expected):
    # Counted in SanaTransformer2DModel on the meta device; 1.6 B and 0.6 B are the names that the paper gives them.
    shapes = shapes_of(lambda: Sana(config, rngs=rngs_of(0)))
    assert sum(np.prod(s) for p, s in shapes.items() if not p.startswith(("target.", "guidance."))) == expected


def test_wrong_inputs_are_told():
    module, x = make(CASES["sana_sprint"][0]), jnp.zeros((2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"guidance_embeds\) reads a guidance scale: cond = Scaled\(prompt, w\)"):
        module(x, TIMES, PROMPT)
    with pytest.raises(ValueError, match=r"Sana is conditioned on a text"):
        module(x, TIMES)
    with pytest.raises(ValueError, match=r"images \[B, H, W, 4\]; given \[2, 4, 4, 3\]"):
        module(x[..., 1:], TIMES, Scaled(PROMPT, SCALES))


def test_wrong_options_are_told():
    with pytest.raises(ValueError, match="cross_attention_dim = 24 must be the width"):
        replace(TINY, cross_attention_dim=24)
    with pytest.raises(ValueError, match="qk_norm = 'layer_norm' is not supported"):
        replace(TINY, qk_norm="layer_norm")
    with pytest.raises(ValueError, match="out_channels = 8 must be in_channels = 4"):
        replace(TINY, out_channels=8)
