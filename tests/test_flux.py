"""FLUX beside diffusers' network and pipeline: outputs, gradients, packing, guidance, students, sizes, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import answers, assert_parity, made, nchw, torch_answers, values, weights, with_weights

from ddistill.hub.weights import params_from, tensors_of
from ddistill.net import Scaled, split
from ddistill.networks.conditions import Prompt
from ddistill.networks.flux import Flux, FluxConfig, pack, unpack
from ddistill.networks.layers import rngs_of

TINY = FluxConfig(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(4, 8, 4),
)  # fmt: skip
CASES = {"flux": TINY, "flux_guided": FluxConfig(**{**vars(TINY), "guidance_embeds": True})}
X, TIME = values(0, 2, 8, 6, 4), np.array([0.017, 0.8], np.float32)
STATES, POOLED, SCALE = values(1, 2, 3, 6), values(2, 2, 5), np.array([1.5, 3.5], np.float32)
PROMPT = Prompt(jnp.asarray(STATES), pooled=jnp.asarray(POOLED))
COND = {"flux": PROMPT, "flux_guided": Scaled(PROMPT, jnp.asarray(SCALE))}


def ours(case):
    return lambda module, x: module(x, jnp.asarray(TIME), COND[case])


@pytest.fixture(scope="module")
def modules():
    def make(case):
        return Flux(CASES[case], remat=case == "flux_guided", rngs=rngs_of(0))

    return {case: made(partial(make, case)) for case in CASES}


@pytest.fixture(scope="module")
def answered(modules):
    return {case: answers(module, ours(case), X) for case, module in modules.items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_record_of_diffusers(answered, case):
    assert_parity(case, answered[case])


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_with_its_pipelines_packing(answered, request, case):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pipeline = diffusers.FluxPipeline
    model = diffusers.FluxTransformer2DModel(**vars(CASES[case]))

    def call(model, x):
        b, c, h, w = x.shape
        out = model(
            pipeline._pack_latents(x, b, c, h, w), encoder_hidden_states=torch.from_numpy(STATES),
            pooled_projections=torch.from_numpy(POOLED), timestep=torch.from_numpy(TIME),
            guidance=torch.from_numpy(SCALE) if CASES[case].guidance_embeds else None,
            img_ids=pipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(STATES.shape[1], 3),
        ).sample  # fmt: skip
        return pipeline._unpack_latents(out, h, w, 1)

    def nhwc(a):
        return a.permute(0, 2, 3, 1) if torch.is_tensor(a) else a.transpose(0, 2, 3, 1)

    theirs = torch_answers(model, call, nchw(X), nhwc, nhwc)
    assert_parity(case, answered[case], theirs, request.config.getoption("--record"))


def test_packing_goes_channel_by_channel():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    packed = pack(x)
    for channel, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        np.testing.assert_array_equal(
            packed[:, 1, 2, 4 * channel + 2 * row + column], x[:, 2 + row, 4 + column, channel]
        )
    np.testing.assert_array_equal(unpack(packed), x)


@pytest.fixture(scope="module")
def student(modules):
    """Students with the weights of names, and gradients by params as functions of (params, s, w)."""

    def made(case):
        params, rest, code = with_weights(modules[case])

        @jax.jit
        def run(params, s, w):
            def loss(params):
                out = code(params, rest)(jnp.asarray(X), jnp.asarray(TIME), Scaled(PROMPT, w), s)
                return jnp.sum(out * values(99, *X.shape)), out

            return jax.grad(loss, has_aux=True)(params)

        return params, run

    return {case: made(case) for case in CASES}


def test_a_student_starts_as_its_teacher_and_learns_s_and_w(student, answered):
    params, run = student["flux"]
    for s, w in (([0.0, 0.5], [1.0, 8.0]), ([0.9, 0.3], [0.0, 3.0])):
        gradients, out = run(params, jnp.asarray(s), jnp.asarray(w))
        np.testing.assert_array_equal(out, run(params, jnp.asarray(TIME), jnp.ones(2))[1])
        np.testing.assert_allclose(out, answered["flux"]["out"], atol=1e-5)
        for name in ("target", "guidance"):
            assert jnp.linalg.norm(gradients[f"{name}.linear.kernel"]) > 1e-3


def test_guidance_that_a_teacher_embeds_is_the_students_too(student, answered):
    params, run = student["flux_guided"]
    assert not [name for name in params if name.startswith("guidance.")]
    gradients, out = run(params, jnp.asarray([0.2, 0.1]), jnp.asarray(SCALE))
    np.testing.assert_allclose(out, answered["flux_guided"]["out"], atol=1e-5)
    assert jnp.linalg.norm(gradients["target.linear.kernel"]) > 1e-3
    assert jnp.linalg.norm(gradients["time_text_embed.guidance_embedder.linear_1.kernel"]) > 1e-3
    assert jnp.abs(out - run(params, jnp.asarray([0.2, 0.1]), jnp.asarray(SCALE) + 1)[1]).max() > 1e-3


def test_twelve_blocks_load_in_order():
    config = FluxConfig(**{**vars(TINY), "num_layers": 12, "num_single_layers": 12})
    params, _, _ = split(nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0))))
    named = weights({t.name: t.shape for p, a in params.items() for t in tensors_of(p, a.shape)})
    arrays = params_from(named, params, ())
    for kind, layer in (("transformer_blocks", "ff.net.0.proj"), ("single_transformer_blocks", "proj_mlp")):
        for number in (1, 2, 10, 11):
            expected = named[f"{kind}.{number}.{layer}.weight"].T
            np.testing.assert_array_equal(arrays[f"{kind}.stack.{layer}.kernel"][number], expected)


def test_bfloat16_stays_near_float32(modules, answered):
    params, rest, _ = with_weights(modules["flux"])
    code = split(nnx.eval_shape(lambda: Flux(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))[2]
    out = jax.jit(lambda params, x: ours("flux")(code(params, rest), x))(params, jnp.asarray(X))
    assert out.dtype == jnp.float32
    expected = answered["flux"]["out"]
    assert 0 < np.abs(out - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "size"), [({"guidance_embeds": True}, 11_901_408_320), ({}, 11_891_178_560)], ids=["dev", "schnell"]
)
def test_published_sizes(options, size):
    params, rest, _ = split(nnx.eval_shape(lambda: Flux(FluxConfig(**options), rngs=nnx.Rngs(0))))
    assert sum(a.size for path, a in params.items() if not path.startswith(("target.", "guidance."))) == size
    assert not rest


def test_inputs_that_are_refused(modules):
    x, t = jnp.asarray(X), jnp.asarray(TIME)
    with pytest.raises(ValueError, match=r"Flux takes latents \[B, H, W, 4\] with even sides; given \[2, 7, 6, 4\]"):
        modules["flux"](x[:, 1:], t, PROMPT)
    with pytest.raises(ValueError, match="Flux is conditioned on a text, cond = Prompt.* given NoneType"):
        modules["flux"](x, t)
    with pytest.raises(ValueError, match=r"was trained with guidance: cond = Scaled\(Prompt"):
        modules["flux_guided"](x, t, PROMPT)
    with pytest.raises(ValueError, match=r"takes an image as a condition \(FLUX.1 Fill, Depth, Canny\)"):
        FluxConfig(in_channels=384, out_channels=64)
    with pytest.raises(ValueError, match=r"three even numbers that sum to attention_head_dim = 128; given \(8, 8, 8\)"):
        FluxConfig(axes_dims_rope=(8, 8, 8))
