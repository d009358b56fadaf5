"""PixArt against diffusers': outputs, gradients, parameter counts; what it reads of a text and of an image's size."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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

from ddistill.hub.weights import tensors_of
from ddistill.net import Scaled
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import rngs_of
from ddistill.networks.pixart import PixArt, PixArtConfig

TINY = PixArtConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=8,
    caption_channels=10,
    use_additional_conditions=True,
    interpolation_scale=2,
)
CASES = {
    "pixart_alpha": (TINY, (8, 12)),  # not square, not of sample_size
    "pixart_sigma": (replace(TINY, use_additional_conditions=None, interpolation_scale=None), (8, 8)),
    "pixart_bare": (
        replace(
            TINY,
            out_channels=None,
            attention_bias=False,
            cross_attention_dim=10,
            caption_channels=None,
            use_additional_conditions=False,
            sample_size=128,
            norm_eps=0.1,
            interpolation_scale=None,
        ),
        (8, 8),
    ),
}
TIMES = np.array([3.0, 812.5], np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
SIZES = np.array([[512, 768, 512 / 768], [64, 32, 2]], np.float32)
PROMPT = Prompt(values(7, 2, 5, 10), mask=MASK, sizes=SIZES)


def make(config, **options):
    return made(lambda: PixArt(config, rngs=rngs_of(0), **options))


def images(case):
    return values(0, 2, *CASES[case][1], 4)


@cache
def ours(case, remat=False):
    module = make(CASES[case][0], remat=remat)
    return answers(module, lambda m, x: m(x, TIMES, PROMPT), images(case))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recorded_answers(case):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case, request):
    torch = pytest.importorskip("torch")
    from diffusers import PixArtTransformer2DModel

    config = CASES[case][0]
    sizes = torch.from_numpy(SIZES)
    added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]} if config.use_additional_conditions else None

    def call(model, x):
        out = model(
            x,
            encoder_hidden_states=torch.from_numpy(PROMPT.states),
            timestep=torch.from_numpy(TIMES),
            added_cond_kwargs=added,
            encoder_attention_mask=torch.from_numpy(MASK),
        )
        return out.sample[:, :4]

    model = PixArtTransformer2DModel(**vars(config))
    expected = torch_answers(model, call, nchw(images(case)), arrange=nhwc, restore=nhwc)
    assert_parity(case, ours(case), expected, recording=request.config.getoption("--record"))


def test_rematerialisation_changes_nothing():
    assert_close(ours("pixart_sigma", remat=True), ours("pixart_sigma"), 1e-5)


def test_bfloat16_stays_near_float32():
    params, rest, code = with_weights(make(TINY, dtype=jnp.bfloat16))
    out = jax.jit(lambda p, x: code(p, rest)(x, TIMES, PROMPT))(params, images("pixart_alpha"))
    expected = ours("pixart_alpha")["out"]
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - expected).max() / np.abs(expected).max() < 0.05


def test_a_student_starts_as_its_teacher_and_can_learn_target_and_guidance():
    params, rest, code = with_weights(make(TINY))
    x, w = images("pixart_alpha"), jnp.array([1.0, 7.5])

    @jax.jit
    def run(params):
        def loss(params):
            student = code(params, rest)(x, TIMES, Scaled(PROMPT, w), TIMES / 2)
            return jnp.sum(student**2), student

        return jax.grad(loss, has_aux=True)(params)

    gradients, student = run(params)
    np.testing.assert_allclose(student, ours("pixart_alpha")["out"], atol=1e-6)
    assert np.abs(gradients["target.linear.kernel"]).max() > 1e-3
    assert np.abs(gradients["guidance.linear.kernel"]).max() > 1e-3


def test_tokens_that_the_mask_hides_are_not_read():
    params, rest, code = with_weights(make(TINY))
    call = jax.jit(lambda prompt: code(params, rest)(images("pixart_alpha"), TIMES, prompt))
    out, other = call(PROMPT), call(replace(PROMPT, states=np.where(MASK[..., None] == 1, PROMPT.states, 9.0)))
    np.testing.assert_allclose(other, out, atol=1e-6)
    seen = call(replace(PROMPT, mask=np.ones_like(MASK)))
    np.testing.assert_allclose(seen[0], out[0], atol=1e-6)
    assert np.abs(seen[1] - out[1]).max() > 0.01


def test_twelve_blocks_load_in_their_order():
    params, _, _ = with_weights(make(replace(TINY, num_layers=12)))
    table = params["transformer_blocks.stack.scale_shift_table"]
    names = [t.name for t in tensors_of("transformer_blocks.stack.scale_shift_table", table.shape)]
    assert names[11] == "transformer_blocks.11.scale_shift_table"
    for i, name in enumerate(names):
        np.testing.assert_array_equal(table[i], weights({name: table.shape[1:]})[name])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PixArtConfig(caption_channels=4096), 611_349_152),  # α at 1024 pixels
        (PixArtConfig(caption_channels=4096, sample_size=64), 610_856_096),  # α at 512 and 256
        (PixArtConfig(caption_channels=4096, use_additional_conditions=False), 610_856_096),  # Σ at 1024
    ],
)
def test_parameters_of_the_published_networks(config, expected):
    # Counted in PixArtTransformer2DModel on the meta device; 0.6 B in table 2 of the paper.
    shapes = shapes_of(lambda: PixArt(config, rngs=rngs_of(0)))
    assert sum(np.prod(s) for p, s in shapes.items() if not p.startswith(("target.", "guidance."))) == expected


def test_wrong_inputs_are_told():
    module = make(TINY)
    x = jnp.zeros((2, 8, 8, 4))
    with pytest.raises(ValueError, match=r"PixArt is conditioned on a text, cond = Prompt\(states\); given NoneType"):
        module(x, TIMES)
    with pytest.raises(ValueError, match=r"PixArt takes a text of states \[B, L, 10\]; given \[2, 5, 7\]"):
        module(x, TIMES, replace(PROMPT, states=jnp.zeros((2, 5, 7))))
    with pytest.raises(ValueError, match=r"the mask of states \[2, 5, 10\] is \[2, 5\]; given \[2, 4\]"):
        module(x, TIMES, replace(PROMPT, mask=MASK[:, 1:]))
    with pytest.raises(ValueError, match=r"height, width and height/width in pixels.*given none"):
        module(x, TIMES, replace(PROMPT, sizes=None))
    with pytest.raises(ValueError, match=r"sizes=\[B, 3\]\); given \[2, 2\]"):
        module(x, TIMES, replace(PROMPT, sizes=SIZES[:, :2]))
    with pytest.raises(ValueError, match="sides that 2 divides"):
        module(x[:, 1:], TIMES, PROMPT)


def test_wrong_options_are_told():
    with pytest.raises(ValueError, match="cross_attention_dim = 16 must be the width"):
        replace(TINY, cross_attention_dim=16)
    with pytest.raises(ValueError, match="the width 16 must be divisible by 3"):
        replace(TINY, attention_head_dim=8, cross_attention_dim=16)
    with pytest.raises(ValueError, match="out_channels = 3 leave no output"):
        replace(TINY, out_channels=3)
