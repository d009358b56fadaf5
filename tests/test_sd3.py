"""SD3 beside diffusers' network: outputs, gradients, names, students, published sizes, inputs that are refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import answers, assert_parity, made, nchw, nhwc, torch_answers, values, weights, with_weights

from ddistill.hub.weights import params_from, tensors_from, tensors_of
from ddistill.net import Scaled, split
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import rngs_of
from ddistill.networks.sd3 import SD3, SD3Config

TINY = SD3Config(
    sample_size=8, num_layers=4, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=6,
    caption_projection_dim=16, pooled_projection_dim=5, pos_embed_max_size=6, in_channels=4, out_channels=4,
)  # fmt: skip
CASES = {
    "sd3": TINY,
    "sd3_dual": SD3Config(**{**vars(TINY), "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}),
}
X, TIME = values(0, 2, 8, 6, 4), np.array([17.0, 800.0], np.float32)
STATES, POOLED = values(1, 2, 3, 6), values(2, 2, 5)
PROMPT = Prompt(jnp.asarray(STATES), pooled=jnp.asarray(POOLED))


def ours(module, x):
    return module(x, jnp.asarray(TIME), PROMPT)


@pytest.fixture(scope="module")
def modules():
    def make(name):
        return SD3(CASES[name], remat=name == "sd3_dual", rngs=rngs_of(0))

    return {name: made(partial(make, name)) for name in CASES}


@pytest.fixture(scope="module")
def answered(modules):
    return {name: answers(module, ours, X) for name, module in modules.items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_record_of_diffusers(answered, case):
    assert_parity(case, answered[case])


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(answered, request, case):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(**vars(CASES[case]))

    def call(model, x):
        given = {"encoder_hidden_states": torch.from_numpy(STATES), "pooled_projections": torch.from_numpy(POOLED)}
        return model(x, timestep=torch.from_numpy(TIME), **given).sample

    theirs = torch_answers(model, call, nchw(X), nhwc, nhwc)
    assert_parity(case, answered[case], theirs, request.config.getoption("--record"))


@pytest.mark.torch
def test_positions_are_diffusers_until_a_checkpoint_brings_its_own():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SD3Transformer2DModel(**vars(TINY)).pos_embed.pos_embed.numpy()
    rest = split(SD3(TINY, rngs=nnx.Rngs(0)))[1]
    assert set(rest) == {"pos_embed.pos_embed"}
    np.testing.assert_allclose(rest["pos_embed.pos_embed"], theirs, atol=1e-6)


@pytest.fixture(scope="module")
def student(modules):
    """A student with random weights, and its gradients by params as a function of (params, s, w)."""
    params, rest, code = with_weights(modules["sd3_dual"])

    @jax.jit
    def run(params, s, w):
        def loss(params):
            out = code(params, rest)(jnp.asarray(X), jnp.asarray(TIME), Scaled(PROMPT, w), s)
            return jnp.sum(out * values(99, *X.shape)), out

        return jax.grad(loss, has_aux=True)(params)

    return params, run


def test_a_student_starts_as_its_teacher_and_learns_s_and_w(student, answered):
    params, run = student
    for s, w in (([0.0, 500.0], [1.0, 8.0]), ([900.0, 3.0], [0.0, 3.0])):
        gradients, out = run(params, jnp.asarray(s), jnp.asarray(w))
        np.testing.assert_array_equal(out, run(params, jnp.asarray(TIME), jnp.ones(2))[1])
        np.testing.assert_allclose(out, answered["sd3_dual"]["out"], atol=1e-5)
        for name in ("target", "guidance"):
            assert jnp.linalg.norm(gradients[f"{name}.linear.kernel"]) > 1e-3
    moved = {n: p + 0.1 if n.startswith(("target", "guidance")) else p for n, p in params.items()}
    outs = [run(moved, jnp.asarray([s, s]), jnp.asarray([w, w]))[1] for s, w in ((0.0, 1.0), (500.0, 1.0), (0.0, 8.0))]
    assert all(jnp.abs(out - outs[0]).max() > 1e-3 for out in outs[1:])


def test_blocks_of_three_kinds_load_in_order():
    """Fourteen blocks, the second to the fifth with two attentions: every number reaches its place in its stack."""
    config = SD3Config(**{**vars(TINY), "num_layers": 14, "dual_attention_layers": (1, 2, 3, 4)})
    params, _, _ = split(nnx.eval_shape(lambda: SD3(config, rngs=nnx.Rngs(0))))
    stacks = {path: a.shape[0] for path, a in params.items() if path.endswith("stack.attn.to_q.kernel")}
    assert stacks == {f"transformer_blocks.{first}.stack.attn.to_q.kernel": n for first, n in
                      ((0, 1), (1, 4), (5, 8), (13, 1))}  # fmt: skip
    named = weights({t.name: t.shape for p, a in params.items() for t in tensors_of(p, a.shape)})
    arrays = params_from(named, params, ())
    for number, first in ((4, 1), (5, 5), (12, 5), (13, 13)):
        kernel = arrays[f"transformer_blocks.{first}.stack.ff.net.0.proj.kernel"][number - first]
        np.testing.assert_array_equal(kernel, named[f"transformer_blocks.{number}.ff.net.0.proj.weight"].T)
    back = dict(tensors_from(arrays, ()))
    assert set(back) == set(named) and all(np.array_equal(back[n], named[n]) for n in named)


def test_bfloat16_stays_near_float32(modules, answered):
    params, rest, _ = with_weights(modules["sd3"])
    code = split(nnx.eval_shape(lambda: SD3(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))[2]
    out = jax.jit(lambda params, x: ours(code(params, rest), x))(params, jnp.asarray(X))
    assert out.dtype == jnp.float32
    expected = answered["sd3"]["out"]
    assert 0 < np.abs(out - expected).max() < 0.05 * np.abs(expected).max()


MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
RMS = {"qk_norm": "rms_norm"}


@pytest.mark.parametrize(
    ("options", "trained", "saved"),
    [
        (MEDIUM, 2_028_328_000, 2_084_951_104),  # SD3 medium
        ({**MEDIUM, **RMS, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}, 2_243_171_520,
         2_469_663_936),  # SD3.5 medium
        ({**LARGE, **RMS}, 8_056_627_520, 8_146_280_768),  # SD3.5 large
    ],
)  # fmt: skip
def test_published_sizes(options, trained, saved):
    """Of diffusers' networks on the meta device: their parameters, and with the table of positions that is saved."""
    params, rest, _ = split(nnx.eval_shape(lambda: SD3(SD3Config(**options), rngs=nnx.Rngs(0))))
    count = sum(a.size for path, a in params.items() if not path.startswith(("target.", "guidance.")))
    assert (count, count + sum(a.size for a in rest.values())) == (trained, saved)


def test_inputs_that_are_refused(modules):
    module, t = modules["sd3"], jnp.asarray(TIME)
    with pytest.raises(ValueError, match=r"sides that 2 divides, at most 12; given \[2, 14, 6, 4\]"):
        module(jnp.zeros((2, 14, 6, 4)), t, PROMPT)
    with pytest.raises(ValueError, match=r"SD3 is conditioned on a text, .*pooled=.*given a Prompt without pooled"):
        module(jnp.asarray(X), t, Prompt(PROMPT.states))
    with pytest.raises(ValueError, match=r"SD3 takes, for 2 images, .* pooled \[2, 5\]; given .* \[2, 7\]"):
        module(jnp.asarray(X), t, Prompt(PROMPT.states, pooled=jnp.zeros((2, 7))))
    with pytest.raises(ValueError, match="caption_projection_dim is the width of the tokens, 18 heads of 64; given 9"):
        SD3Config(caption_projection_dim=9)
    with pytest.raises(ValueError, match=r"dual_attention_layers \[18\] are not among 18 layers"):
        SD3Config(dual_attention_layers=(3, 18))
    with pytest.raises(ValueError, match="qk_norm is None or 'rms_norm'; given 'layer_norm'"):
        SD3Config(qk_norm="layer_norm")
