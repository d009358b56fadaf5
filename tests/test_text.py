"""Text encoders against transformers': states of any layer, pooled states, gradients, parameter counts."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import answers, assert_close, assert_parity, made, shapes_of, torch_answers, values, weights, with_weights

from ddistill.hub.weights import params_from, tensors_of
from ddistill.net import split
from ddistill.networks.layers import rngs_of
from ddistill.networks.text import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    buckets,
    clip_tensors,
    t5_tensors,
)

CLIP = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "projection_dim": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
}
T5 = {
    "vocab_size": 19,
    "d_model": 8,
    "d_kv": 6,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
# 18 ends a text where the largest number does (the legacy rule, eos_token_id == 2); where 7 ends it, 18 is a word.
TOKENS = np.asarray([[17, 3, 18, 7, 18, 1, 7], [17, 4, 9, 11, 7, 0, 18]])
LONG = np.arange(40).reshape(2, 20) % 19
MASK = np.arange(20) < np.asarray([[20], [11]])
CASES = {
    "text_clip": (CLIPTextModel, CLIPTextConfig(**CLIP, eos_token_id=2), {}),
    "text_clip_skip": (CLIPTextModel, CLIPTextConfig(**CLIP, eos_token_id=7), {"skip": 2}),
    "text_clip_projection": (
        CLIPTextModelWithProjection,
        CLIPTextConfig(**CLIP, hidden_act="gelu", eos_token_id=7),
        {"skip": 1, "norm": False},
    ),
    "text_t5": (T5EncoderModel, T5Config(**T5, feed_forward_proj="gated-gelu"), {}),
    "text_t5_relu_mask": (T5EncoderModel, T5Config(**T5, feed_forward_proj="relu"), {"mask": MASK.astype(np.int32)}),
}


def is_t5(case):
    return CASES[case][0] is T5EncoderModel


def make(case, **options):
    module, config, _ = CASES[case]
    return made(lambda: module(config, rngs=rngs_of(0), **options), ours=())


def x_of(case):
    # Tokens have no gradient: x multiplies the answer, which is states and, of CLIP, one row more, the pooled state.
    return values(1, 2, 20, 8) if is_t5(case) else values(1, 2, TOKENS.shape[1] + 1, 8)


def answer(case):
    def call(module, x):
        prompt = module(LONG if is_t5(case) else TOKENS, **CASES[case][2])
        return x * (prompt.states if is_t5(case) else jnp.concatenate([prompt.states, prompt.pooled[:, None]], axis=1))

    return call


@cache
def ours(case):
    return answers(make(case), answer(case), x_of(case))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recorded_answers(case):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, request):
    torch = pytest.importorskip("torch")
    import transformers

    module, config, how = CASES[case]
    kind = transformers.T5Config if is_t5(case) else transformers.CLIPTextConfig
    theirs = getattr(transformers, module.__name__)(kind(**vars(config)))

    def t5(model, x):
        mask = torch.from_numpy(how["mask"]) if "mask" in how else None
        return x * model.encoder(inputs_embeds=model.shared(torch.from_numpy(LONG)), attention_mask=mask)[0]

    def clip(model, x):
        out = model(torch.from_numpy(TOKENS), output_hidden_states=True)
        states = out.hidden_states[-1 - how.get("skip", 0)]
        if how.get("norm", True):
            states = getattr(model, "text_model", model).final_layer_norm(states)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return x * torch.cat([states, pooled[:, None]], dim=1)

    if is_t5(case):
        theirs.encoder.embed_tokens = None  # the second name of the same tensor
    expected = torch_answers(theirs, t5 if is_t5(case) else clip, x_of(case))
    assert_parity(case, ours(case), expected, recording=request.config.getoption("--record"))


def test_a_token_sees_none_after_it_in_clip_and_none_masked_anywhere():
    for case, tokens in (("text_clip", TOKENS), ("text_t5", LONG)):
        params, rest, code = with_weights(make(case))
        states = jax.jit(lambda p, tokens, mask: code(p, rest)(tokens, mask).states)
        mask = np.ones_like(tokens)
        mask[:, 3] = 0
        other = tokens.copy()
        other[:, 3] = 5
        same = states(params, tokens, mask) == states(params, other, mask)
        assert np.all(np.delete(same, 3, axis=1)) and not np.all(same[:, 3])
        changed = np.any(
            states(params, tokens, np.ones_like(mask)) != states(params, other, np.ones_like(mask)), (0, 2)
        )
        assert list(changed[:3]) == [case == "text_t5"] * 3 and np.all(changed[3:])


def test_buckets_widen_by_a_constant_factor():
    # T5's 32 buckets to distance 128: single offsets below 8, then edges at 8 · 16^(k/8), exact in integers
    offset = np.arange(-200, 201)
    away = np.abs(offset)
    wide = 8 + sum((away**8 >= 8**8 * 16**k).astype(int) for k in range(1, 8))
    expected = np.where(away < 8, away, wide) + np.where(offset > 0, 16, 0)
    np.testing.assert_array_equal(buckets(offset, 32, 128), expected)


@pytest.mark.torch
def test_buckets_equal_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = np.arange(-700, 701)
    for count, distance in ((32, 128), (8, 12), (6, 40)):
        theirs = T5Attention._relative_position_bucket(torch.from_numpy(offset), True, count, distance)
        np.testing.assert_array_equal(buckets(offset, count, distance), theirs.numpy())


def test_bfloat16_stays_near_float32_and_remat_changes_nothing():
    for case in ("text_clip_projection", "text_t5"):
        params, rest, code = with_weights(make(case, dtype=jnp.bfloat16))
        out = jax.jit(lambda p, x: answer(case)(code(p, rest), x))(params, x_of(case))
        assert out.dtype == jnp.float32
        exact = ours(case)["out"]
        assert 1e-4 < np.abs(out - exact).max() / np.abs(exact).max() < 0.05
    assert_close(answers(make("text_t5", remat=True), answer("text_t5"), x_of("text_t5")), ours("text_t5"), 1e-5)


def test_files_of_every_age_have_the_same_names_in_the_end():
    shapes = {
        t.name: t.shape for p, a in split(make("text_clip_projection"))[0].items() for t in tensors_of(p, a.shape)
    }
    assert "text_model.encoder.layers.2.self_attn.q_proj.weight" in shapes and "text_projection.weight" in shapes
    now = weights(shapes)
    bare = {name.removeprefix("text_model."): w for name, w in now.items() if name != "text_projection.weight"}
    old = {f"text_model.{name}": w for name, w in bare.items()} | {"text_model.embeddings.position_ids": np.arange(9)}
    head = {"text_projection.weight": now["text_projection.weight"]}
    assert clip_tensors(now, True).keys() == clip_tensors(bare | head, True).keys() == now.keys()
    assert clip_tensors(old, False).keys() == clip_tensors(bare, False).keys() == bare.keys()
    params_from(clip_tensors(old | head, True), split(make("text_clip_projection"))[0])
    params_from(clip_tensors(old, False), split(make("text_clip"))[0])

    shapes = {t.name: t.shape for p, a in split(make("text_t5"))[0].items() for t in tensors_of(p, a.shape)}
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in shapes
    now = weights(shapes)
    twice = now | {"encoder.embed_tokens.weight": now["shared.weight"], "decoder.final_layer_norm.weight": np.ones(8)}
    once = {name.replace("shared", "encoder.embed_tokens"): w for name, w in now.items()}
    for file in (now, twice, once):
        assert t5_tensors(file).keys() == now.keys()


def test_twelve_blocks_are_read_in_their_order():
    config = CLIPTextConfig(**CLIP | {"num_hidden_layers": 12, "hidden_size": 2, "intermediate_size": 2})
    params, _, _ = with_weights(made(lambda: CLIPTextModel(config, rngs=rngs_of(0)), ours=()))
    for i in range(12):
        name = f"encoder.layers.{i}.mlp.fc1.weight"
        np.testing.assert_array_equal(params["encoder.layers.stack.mlp.fc1.kernel"][i].T, weights({name: (2, 2)})[name])


# Parameter counts of the published models: sum(p.numel()) of transformers' on the meta device.
OPEN_CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280, hidden_act="gelu",
)  # fmt: skip
XXL = T5Config(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
)  # fmt: skip
PUBLISHED = {
    "CLIP-L": (CLIPTextModel, CLIP_L, 123_060_480),
    "CLIP-L of SD3": (CLIPTextModelWithProjection, CLIP_L, 123_650_304),
    "OpenCLIP-G": (CLIPTextModelWithProjection, OPEN_CLIP_G, 694_659_840),
    "T5-v1.1-XXL": (T5EncoderModel, XXL, 4_762_310_656),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    module, config, count = PUBLISHED[name]
    shapes = shapes_of(lambda: module(config, rngs=rngs_of(0)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_bad_inputs_are_told():
    module = make("text_clip")
    with pytest.raises(ValueError, match=r"L up to 9; given \[1, 10\]"):
        module(jnp.zeros((1, 10), int))
    with pytest.raises(ValueError, match="skip = 4: this text model has 3 layers"):
        module(jnp.zeros((1, 5), int), skip=4)
    with pytest.raises(ValueError, match=r"tokens \[B, L\]; given \[5\]"):
        make("text_t5")(jnp.zeros(5, int))
    with pytest.raises(ValueError, match="'quick_gelu' or 'gelu'"):
        CLIPTextConfig(hidden_act="silu")
    with pytest.raises(ValueError, match=r"eos_token_id = \[1, 2\]"):
        CLIPTextConfig(eos_token_id=[1, 2])
    with pytest.raises(ValueError, match="does not split into 7"):
        CLIPTextConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match="'gated-gelu'"):
        T5Config(feed_forward_proj="gated-silu")
