"""DiT against diffusers' and against the paper's equations in NumPy, which read the original projects' checkpoints."""

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

from ddistill import published
from ddistill.features import features
from ddistill.hub.configs import config_json
from ddistill.hub.weights import params_from
from ddistill.net import Scaled, VelocityPrecondition, from_nnx, split
from ddistill.networks.conditions import Prompt
from ddistill.networks.dit import DiT, DiTConfig, as_flow, from_original, original_config
from ddistill.networks.layers import rngs_of
from ddistill.networks.tokens import positions
from ddistill.process import flow

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=5,
    out_channels=8,
)
CASES = {
    "dit": TINY,
    "dit_plain": replace(
        TINY, out_channels=None, in_channels=3, attention_bias=False, patch_size=1, sample_size=4, norm_eps=0.1
    ),
}
TIMES = np.array([3.0, 812.5], np.float32)
LABELS = np.array([2, -1])


def make(config, **options):
    return made(lambda: DiT(config, rngs=rngs_of(0), **options))


def images(config):
    return values(0, 2, 8, 8, config.in_channels)


@cache
def ours(case, remat=False):
    module = make(CASES[case], remat=remat)
    return answers(module, lambda m, x: m(x, TIMES, LABELS), images(CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recorded_answers(case):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case, request):
    torch = pytest.importorskip("torch")
    from diffusers import DiTTransformer2DModel

    config = CASES[case]
    model = DiTTransformer2DModel(**{k: v for k, v in vars(config).items() if k not in DiTConfig.OURS})
    labels = torch.from_numpy(np.where(LABELS < 0, config.num_embeds_ada_norm, LABELS))

    def call(model, x):
        return model(x, timestep=torch.from_numpy(TIMES), class_labels=labels).sample[:, : config.in_channels]

    expected = torch_answers(model, call, nchw(images(config)), arrange=nhwc, restore=nhwc)
    assert_parity(case, ours(case), expected, recording=request.config.getoption("--record"))


def test_rematerialisation_changes_nothing():
    assert_close(ours("dit", remat=True), ours("dit"), 1e-5)


def test_bfloat16_stays_near_float32():
    params, rest, code = with_weights(make(TINY, dtype=jnp.bfloat16))
    out = jax.jit(lambda p, x: code(p, rest)(x, TIMES, LABELS))(params, images(TINY))
    expected = ours("dit")["out"]
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - expected).max() / np.abs(expected).max() < 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_a_student_starts_as_its_teacher_and_can_learn_target_and_guidance(shared):
    params, rest, code = with_weights(make(replace(TINY, shared_embedding=shared)))
    x, w = images(TINY), jnp.array([1.0, 7.5])

    @jax.jit
    def run(params):
        def loss(params):
            student = code(params, rest)(x, TIMES, Scaled(LABELS, w), TIMES / 2)
            return jnp.sum(student**2), student

        gradients, student = jax.grad(loss, has_aux=True)(params)
        return code(params, rest)(x, TIMES, LABELS), student, gradients

    teacher, student, gradients = run(params)
    np.testing.assert_array_equal(student, teacher)
    assert np.abs(gradients["target.linear.kernel"]).max() > 1e-3
    assert np.abs(gradients["guidance.linear.kernel"]).max() > 1e-3


def test_no_label_is_told_in_three_ways():
    params, rest, code = with_weights(make(TINY))
    x, call = images(TINY), jax.jit(lambda cond: code(params, rest)(images(TINY), TIMES, cond))
    none = jax.jit(lambda: code(params, rest)(x, TIMES))()
    np.testing.assert_array_equal(call(np.array([-1, -1])), none)
    np.testing.assert_array_equal(call(np.array([5, 5])), none)
    assert np.abs(call(np.array([0, 1])) - none).max() > 0.1


def test_an_untrained_network_answers_zero_and_its_blocks_do_nothing():
    module = DiT(TINY, rngs=nnx.Rngs(0))
    y = values(1, 2, 4, 4, TINY.width)
    out = module.transformer_blocks(y, values(2, 2, 16), values(3, 2, 256), np.array([0, 1]))
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(module.proj_out_2.kernel, 0)


def test_features_are_what_each_block_answers():
    params, rest, code = with_weights(make(TINY))
    net = from_nnx(code(params, rest), flow(), VelocityPrecondition())
    x, t = jnp.asarray(images(TINY)), jnp.array([0.2, 0.9])

    @jax.jit
    def run(x):
        module = code(params, rest)
        given = module.guidance(jnp.zeros(2)), module.waves(t), jnp.asarray([2, 5])
        first = module.transformer_blocks.block(0)(module.pos_embed(x), *given)
        second = module.transformer_blocks.block(1)(first, *given)
        found = features(net, x, t, jnp.asarray(LABELS))
        inside = features(net, x, t, jnp.asarray(LABELS), layers=["transformer_blocks.1.attn1"])
        return found, inside, [first, second], module.transformer_blocks(module.pos_embed(x), *given)

    found, inside, expected, last = run(x)
    assert list(found) == ["transformer_blocks.0", "transformer_blocks.1"]
    for feature, value in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(feature, value, atol=1e-5)
    np.testing.assert_allclose(found["transformer_blocks.1"], last, atol=1e-5)
    assert inside["transformer_blocks.1.attn1"].shape == (2, 4, 4, TINY.width)


SIZES = {  # layers, heads, head size; parameters, in millions in table 1 of the paper
    "S": (12, 6, 64, 32_865_056, 33),
    "B": (12, 12, 64, 130_315_808, 130),
    "L": (24, 16, 64, 457_840_672, 458),
    "XL": (28, 16, 72, 674_834_720, 675),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_published_sizes(size):
    layers, heads, head, expected, millions = SIZES[size]
    config = DiTConfig(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head, out_channels=8, shared_embedding=True
    )
    assert count(config) == expected
    assert round(expected / 1e6) == millions


def test_parameters_of_diffusers_xl():
    # Of DiTTransformer2DModel: 27 more embeddings of time and label than the paper's.
    assert count(DiTConfig(out_channels=8)) == 749_826_464


def count(config):
    shapes = shapes_of(lambda: DiT(config, rngs=rngs_of(0)))
    return sum(np.prod(s) for p, s in shapes.items() if not p.startswith(("target.", "guidance.")))


def original_shapes(width, depth, classes, side, patch, channels):
    def linear(name, out, size):
        return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}

    return {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **{
            name: shape
            for i in range(depth)
            for name, shape in {
                **linear(f"blocks.{i}.attn.qkv", 3 * width, width),
                **linear(f"blocks.{i}.attn.proj", width, width),
                **linear(f"blocks.{i}.mlp.fc1", 4 * width, width),
                **linear(f"blocks.{i}.mlp.fc2", width, 4 * width),
                **linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width),
            }.items()
        },
        **linear("final_layer.linear", patch * patch * 2 * channels, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }


def original(depth=12, width=16, channels=2):
    """A checkpoint of the original projects, of twelve blocks: "10" and "11" stand before "2" in alphabetical order."""
    tensors = weights(original_shapes(width=width, depth=depth, classes=3, side=4, patch=2, channels=channels))
    place = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="xy"), -1).reshape(16, 2, 1)
    angles = place / 10_000.0 ** (np.arange(width // 4) / (width // 4))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    tensors["pos_embed"] = waves.reshape(1, 16, width).astype(np.float32)
    return tensors


def by_the_paper(w, x, t, labels, heads):
    """The first half of the output channels of DiT: x [B, C, H, W], in float64."""
    w = {name: a.astype(np.float64) for name, a in w.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def modulation(name, c, parts):
        return np.split(linear(name, silu(c))[:, None], parts, axis=-1)

    batch, channels, height, _ = x.shape
    kernel = w["x_embedder.proj.weight"]
    width, _, p, _ = kernel.shape
    n = height // p
    cut = x.reshape(batch, channels, n, p, n, p)
    y = np.einsum("bchpwq,dcpq->bhwd", cut, kernel).reshape(batch, n * n, width) + w["x_embedder.proj.bias"]
    y = y + w["pos_embed"]
    angles = t[:, None] / 10_000.0 ** (np.arange(128) / 128)
    c = silu(linear("t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)], -1)))
    c = linear("t_embedder.mlp.2", c) + w["y_embedder.embedding_table.weight"][labels]
    for i in range(sum(name.endswith("qkv.weight") for name in w)):
        b = f"blocks.{i}."
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(b + "adaLN_modulation.1", c, 6)
        qkv = linear(b + "attn.qkv", norm(y) * (1 + scale) + shift).reshape(batch, -1, 3, heads, width // heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads))
        seen = scores / scores.sum(-1, keepdims=True) @ v
        y = y + gate * linear(b + "attn.proj", seen.swapaxes(1, 2).reshape(batch, -1, width))
        h = linear(b + "mlp.fc1", norm(y) * (1 + scale_mlp) + shift_mlp)
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        y = y + gate_mlp * linear(b + "mlp.fc2", h)
    shift, scale = modulation("final_layer.adaLN_modulation.1", c, 2)
    y = linear("final_layer.linear", norm(y) * (1 + scale) + shift).reshape(batch, n, n, p, p, -1)
    return y.transpose(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, height)[:, :channels]


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_of_the_original_projects_answers_what_the_paper_says(shared):
    tensors = original()
    config = original_config(tensors, heads=2, shared_embedding=shared)
    assert config == DiTConfig(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=12,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_eps=1e-6,
        freq_shift=0.0,
        shared_embedding=shared,
    )
    params, rest, code = split(make(config))
    params = params_from(from_original(tensors, shared=shared), params)
    x, t, labels = values(5, 2, 8, 8, 2), np.array([0.25, 700.0], np.float32), np.array([2, 3])
    out = jax.jit(lambda p, x: code(p, rest)(x, t, labels))(params, x)
    expected = nhwc(by_the_paper(tensors, nchw(x).astype(np.float64), t, labels, heads=2))
    np.testing.assert_allclose(out, expected, atol=1e-4 * np.abs(expected).max())


def test_a_sit_estimates_x0_on_the_flow():
    tensors = original(depth=2)
    params, rest, code = split(make(original_config(tensors, heads=2)))
    params = params_from(as_flow(from_original(tensors)), params)
    net = from_nnx(code(params, rest), flow(), VelocityPrecondition())
    x, t, labels = values(5, 2, 8, 8, 2), np.array([0.25, 0.9], np.float32), np.array([2, 3])
    out = jax.jit(lambda x: net(x, t, labels))(x)
    velocity = nhwc(by_the_paper(tensors, nchw(x).astype(np.float64), 1 - t.astype(np.float64), labels, heads=2))
    np.testing.assert_allclose(out, x + t[:, None, None, None] * velocity, atol=1e-4)  # x0 = x_t + t (x0 − ε)


@pytest.mark.torch
def test_original_names_become_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers import DiTTransformer2DModel

    tensors = original(depth=3)
    config = original_config(tensors, heads=2)
    model = DiTTransformer2DModel(**{k: v for k, v in vars(config).items() if k not in DiTConfig.OURS})
    model.load_state_dict({n: torch.from_numpy(a) for n, a in from_original(tensors).items()}, strict=True)


def test_what_is_no_original_checkpoint_is_refused():
    tensors = original(depth=1)
    with pytest.raises(ValueError, match=r"not tensors of a DiT or SiT checkpoint.*: blocks\.0\.cross_attn\.q\.weight"):
        from_original(tensors | {"blocks.0.cross_attn.q.weight": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"pos_embed \[1, 16, 16\] are not the sines and cosines"):
        from_original(tensors | {"pos_embed": tensors["pos_embed"][:, ::-1]})
    with pytest.raises(ValueError, match="width of 16 does not tell the heads"):
        original_config(tensors)
    with pytest.raises(ValueError, match="has pos_embed; this one does not"):
        original_config({name: a for name, a in tensors.items() if name != "pos_embed"})


@pytest.mark.parametrize(
    ("size", "expected"),
    [((8, 384), 6), ((8, 768), 12), ((8, 1024), 16), ((8, 1152), 16)],
)
def test_heads_of_original_checkpoints(size, expected):
    tensors = {
        "x_embedder.proj.weight": np.zeros((size[1], 4, 2, 2)),
        "y_embedder.embedding_table.weight": np.zeros((3, 1)),
        "pos_embed": np.zeros((1, 16, 1)),
        "final_layer.linear.weight": np.zeros((32, 1)),
        "blocks.0.attn.qkv.weight": np.zeros(1),
    }
    assert original_config(tensors).num_attention_heads == expected


def test_the_configuration_of_sit_xl_is_the_published_one():
    shapes = original_shapes(width=1152, depth=28, classes=1000, side=16, patch=2, channels=4)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    tensors["pos_embed"] = np.broadcast_to(np.float32(0), (1, 256, 1152))
    assert original_config(tensors, shared_embedding=True) == published.sit_xl_2().config


def test_wrong_inputs_are_told():
    module = make(TINY)
    x = jnp.zeros((2, 8, 8, 4))
    with pytest.raises(ValueError, match=r"images \[B, H, W, 4\] with sides that 2 divides; given \[2, 7, 8, 4\]"):
        module(x[:, 1:], TIMES)
    with pytest.raises(ValueError, match=r"given \[2, 8, 8, 3\]"):
        module(x[..., 1:], TIMES)
    with pytest.raises(ValueError, match="labels .* given Prompt"):
        module(x, TIMES, Prompt(jnp.zeros((2, 3, 4))))
    with pytest.raises(ValueError, match="out_channels = 3 leave no output for each of in_channels = 4"):
        DiTConfig(out_channels=3)
    with pytest.raises(ValueError, match="a width that 4 divides; given 6"):
        positions(2, 2, 6, base=2)


def test_diffusers_config_holds_what_its_class_can():
    assert set(config_json(TINY)) == {"_class_name", *vars(TINY)} - set(DiTConfig.OURS)
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel cannot hold.*freq_shift is 0\.0, there always 1\.0"):
        config_json(replace(TINY, freq_shift=0.0))
