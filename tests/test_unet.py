"""diffusers' UNets: equal to PyTorch's in value and derivative, for every block and option that checkpoints use."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import answers, assert_parity, made, nchw, nhwc, shapes_of, torch_answers, values, weights, with_weights

from ddistill.features import features
from ddistill.hub.weights import params_from, tensors_of
from ddistill.net import EpsPrecondition, Scaled, from_nnx, split
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import GroupNorm, TimestepEmbedding, rngs_of
from ddistill.networks.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig, guidance_waves
from ddistill.networks.unet_attention import Attention, Transformer, TransformerBlock
from ddistill.networks.unet_blocks import Resnet, Style
from ddistill.process import vp

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
    states = values(seed, B, tokens, config.encoder_hid_dim or 6)
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


# What else checkpoints use, in answers alone: (config, what is beside the text or the label, height and width).
OPTIONS = {
    "unet_fourier": (
        UNet2DConfig(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            time_embedding_type="fourier",
            class_embed_type="timestep",
            add_attention=False,
            out_channels=6,
        ),
        np.float32([2.5, 17.0]),
        (4, 6),
    ),
    "unet_learned": (
        UNet2DConfig(
            block_out_channels=(8,),
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
            attn_norm_num_groups=2,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="learned",
            num_train_timesteps=1000,
            time_embedding_dim=12,
        ),
        None,
        (4, 4),
    ),
    # Distilled relatives of XL: layers and depths that differ between the ways, no attention in the middle; labels.
    "unet_uneven": (
        UNet2DConditionConfig(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=(1, 2),
            norm_num_groups=4,
            cross_attention_dim=6,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, (1, 2)),
            reverse_transformer_layers_per_block=((2, 1, 1), 1),
            use_linear_projection=True,
            encoder_hid_dim=5,
            encoder_hid_dim_type="text_proj",
            num_class_embeds=3,
        ),
        np.array([2, 0]),
        (7, 5),
    ),
    "unet_projection": (
        UNet2DConditionConfig(
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=(6,),
            attention_head_dim=2,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="projection",
            projection_class_embeddings_input_dim=7,
        ),
        values(8, B, 7),
        (4, 4),
    ),
}


def lists(option):
    """Tuples of a config as JSON has them."""
    return [lists(o) for o in option] if isinstance(option, tuple) else option


def torch_model(config, name):
    """diffusers' model of a config of ours."""
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(**{k: lists(v) for k, v in vars(config).items()})


def torch_pixels(config, labels, x):
    import torch

    times = torch.from_numpy(TIMES)
    times = times.long() if config.time_embedding_type == "learned" else times
    labels = None if labels is None else torch.from_numpy(labels)

    def call(model, x):
        return model(x, times, class_labels=labels).sample

    return torch_answers(torch_model(config, "UNet2DModel"), call, nchw(x), arrange=nhwc, restore=nhwc)


def torch_texts(config, given, x, w=None, labels=None):
    import torch
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    states, mask, pooled, sizes = (
        None if a is None else torch.from_numpy(np.asarray(a, np.float32))
        for a in (given.states, given.mask, given.pooled, given.sizes)
    )
    labels = None if labels is None else torch.from_numpy(labels)
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

    return torch_answers(torch_model(config, "UNet2DConditionModel"), call, nchw(x), arrange=nhwc, restore=nhwc)


@cache
def ask(case):
    """Module, condition and input of a case; two of the modules keep less for the backward pass."""
    x = values(1, B, SIDE, SIDE, 3 if case in PIXELS else 4)
    if case in PIXELS:
        config, cond = PIXELS[case]
        return made(lambda: UNet2D(config, remat=case == "unet_consistency", rngs=rngs_of(0))), cond, x
    config = TEXTS[case]
    cond = prompt(config, mask=case == "unet_sd")
    cond = Scaled(cond, SCALES) if config.time_cond_proj_dim else cond
    return made(lambda: UNet2DCondition(config, remat=case == "unet_sdxl", rngs=rngs_of(0))), cond, x


@pytest.fixture(scope="module")
def ours():
    """Our answers by case, each computed once."""
    known = {}

    def find(case):
        if case not in known:
            module, cond, x = ask(case)
            known[case] = answers(module, lambda module, x: module(x, TIMES, cond), x)
        return known[case]

    return find


@pytest.mark.parametrize("case", [*PIXELS, *TEXTS])
def test_values_and_derivatives_are_the_recorded_ones_of_diffusers(case, ours):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", [*PIXELS, *TEXTS])
def test_values_and_derivatives_are_those_of_diffusers(case, ours, request):
    pytest.importorskip("diffusers")
    _, cond, x = ask(case)
    if case in PIXELS:
        theirs = torch_pixels(PIXELS[case][0], cond, x)
    else:
        theirs = torch_texts(TEXTS[case], *((cond.cond, x, cond.w) if isinstance(cond, Scaled) else (cond, x)))
    assert_parity(case, ours(case), theirs, request.config.getoption("--record"))


@pytest.fixture(scope="module")
def option():
    """Our answer, what was asked in parts, by case."""
    known = {}

    def find(case):
        config, beside, size = OPTIONS[case]
        x = values(1, B, *size, config.in_channels)
        if case not in known:
            cond, make = beside, UNet2D
            if isinstance(config, UNet2DConditionConfig):
                labels = config.num_class_embeds is not None
                cond, make = prompt(config), UNet2DCondition
                cond = Prompt(cond.states, **({"sizes": beside[:, None]} if labels else {"pooled": beside}))
            params, rest, code = with_weights(made(lambda: make(config, rngs=rngs_of(0))))
            known[case] = jax.jit(lambda params, x: code(params, rest)(x, TIMES, cond))(params, x)
        return {"out": np.asarray(known[case])}, x

    return find


@pytest.mark.parametrize("case", OPTIONS)
def test_options_give_the_recorded_values_of_diffusers(case, option):
    assert_parity(case, option(case)[0])


@pytest.mark.torch
@pytest.mark.parametrize("case", OPTIONS)
def test_options_give_the_values_of_diffusers(case, option, request):
    pytest.importorskip("diffusers")
    config, beside, _ = OPTIONS[case]
    out, x = option(case)
    if isinstance(config, UNet2DConfig):
        theirs = torch_pixels(config, beside, x)
    else:
        theirs = torch_texts(config, prompt(config), x, labels=beside)
    there = theirs["out"][..., : config.in_channels]  # the rest is a learned variance
    assert_parity(case, out, {"out": there}, request.config.getoption("--record"))


@pytest.mark.parametrize("case", ["unet_ddpm", "unet_sd"])
def test_a_student_starts_as_its_teacher_and_learns_its_target_and_scale(case, ours):
    module, cond, x = ask(case)
    params, rest, code = with_weights(module)
    new = {path: p for path, p in params.items() if path.startswith(("target.", "guidance."))}
    assert len(new) == 2 and not any(np.any(p) for p in new.values())

    @jax.jit
    def run(new, s, w):
        out, back = jax.vjp(lambda new: code({**params, **new}, rest)(x, TIMES, Scaled(cond, w), s), new)
        return out, back(jnp.ones_like(out))[0]

    for s, w in (((0.0, 300.0), (7.5, 1.0)), ((3.0, 711.0), (0.0, 2.0))):
        out, gradients = run(new, jnp.array(s), jnp.array(w))
        np.testing.assert_allclose(out, ours(case)["out"], atol=1e-5)
        assert all(np.linalg.norm(g) > 1e-3 for g in gradients.values())


def test_the_guidance_embedding_of_lcm_starts_at_nothing_and_learns():
    config = UNet2DConditionConfig(block_out_channels=(32,) * 4, time_cond_proj_dim=8)
    paths = shapes_of(lambda: UNet2DCondition(config, rngs=rngs_of(0)))
    assert "time_embedding.cond_proj.kernel" in paths and not any(path.startswith("guidance.") for path in paths)
    embedding = TimestepEmbedding(8, 16, condition=4, rngs=nnx.Rngs(0))
    t, w = guidance_waves(jnp.array([3.0, 4.0]), 8), guidance_waves(jnp.array([1.5, 8.0]), 4)
    np.testing.assert_array_equal(embedding(t, w), embedding(t))
    params, rest, code = split(embedding)
    gradient = jax.grad(lambda params: code(params, rest)(t, w).sum())(params)["cond_proj.kernel"]
    assert np.linalg.norm(gradient) > 1e-3


def test_no_label_adds_nothing():
    config = UNet2DConfig(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    params, rest, code = with_weights(made(lambda: UNet2D(config, rngs=rngs_of(0))))
    x = np.repeat(values(0, 1, 4, 4, 3), 5, axis=0)

    @jax.jit
    def call(params, labels):
        return code(params, rest)(x, jnp.full(5, 9.0), labels)

    given = call(params, jnp.array([-1, 3, 0, 1, 2]))
    without = call({**params, "class_embedding.embedding": jnp.zeros((3, 32))}, jnp.array([0, 1, 2, 0, 1]))
    np.testing.assert_allclose(given[:2], without[:2], atol=1e-6)
    assert min(np.abs(given[i] - given[j]).max() for i in range(2, 5) for j in range(1, i)) > 1e-3


def test_dropout_has_the_network_without_it_as_its_mean():
    style = Style(embedding=6, groups=4, epsilon=1e-5, scale_shift=False, dropout=0.3, dtype=jnp.float32, remat=True)
    params, rest, code = with_weights(made(lambda: Resnet(4, 8, style, rngs=rngs_of(0))))
    x, embedding = values(1, 1, 3, 3, 4), values(2, 1, 6)

    @jax.jit
    def draws(keys):
        return jax.vmap(lambda key: code(params, rest)(x, embedding, nnx.Rngs(dropout=key)))(keys)

    outs = np.asarray(draws(jax.random.split(jax.random.key(0), 4000)))
    sharp = code(params, rest)(x, embedding)
    spread = outs.std(axis=0)  # conv2 is linear: the mean over masks is its answer to the mean mask, 1
    assert spread.min() > 0.01
    assert np.abs((outs.mean(axis=0) - sharp) / spread).max() < 5 / math.sqrt(len(outs))


def test_twelve_transformer_blocks_are_loaded_in_their_order():
    options = {"dtype": jnp.float32, "rngs": rngs_of(0)}
    make = lambda: Transformer(8, 2, 6, 12, groups=4, linear=True, remat=False, **options)  # noqa: E731
    params, rest, code = with_weights(made(make))
    x, context = values(1, B, 2, 2, 8), values(2, B, 3, 6)
    shapes = {t.name: t.shape for path, p in params.items() for t in tensors_of(path, p.shape)}
    tensors = weights(shapes)
    block, block_rest, block_code = split(TransformerBlock(8, 2, 6, **options))
    run = jax.jit(lambda params, tokens: block_code(params, block_rest)(tokens, context, None))
    norm = GroupNorm(8, 4, 1e-6)
    norm.scale[...], norm.bias[...] = tensors["norm.weight"], tensors["norm.bias"]
    tokens = norm(x).reshape(B, 4, 8) @ tensors["proj_in.weight"].T + tensors["proj_in.bias"]
    for i in range(12):
        name = f"transformer_blocks.{i}."
        own = {n.removeprefix(name): tensor for n, tensor in tensors.items() if n.startswith(name)}
        tokens = run(params_from(own, block), tokens)
    out = x + (tokens @ tensors["proj_out.weight"].T + tensors["proj_out.bias"]).reshape(x.shape)
    np.testing.assert_allclose(jax.jit(lambda p: code(p, rest)(x, context))(params), out, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_float32(ours):
    module, cond, x = ask("unet_sd")
    params, _, _ = with_weights(module)
    _, rest, code = split(made(lambda: UNet2DCondition(TEXTS["unet_sd"], dtype=jnp.bfloat16, rngs=rngs_of(0))))
    out = jax.jit(lambda params: code(params, rest)(x, TIMES, cond))(params)
    there = ours("unet_sd")["out"]
    assert out.dtype == jnp.float32
    assert 1e-5 < np.linalg.norm(out - there) / np.linalg.norm(there) < 0.05


def test_blocks_are_features():
    module, cond, x = ask("unet_sd")
    inner = ["down_blocks.0.resnets.0", "mid_block.attentions.0"]

    def find(net, x):
        return features(net, x, 0.5, cond), features(net, x, 0.5, cond, layers=inner)

    found, more = jax.eval_shape(find, from_nnx(module, vp(), EpsPrecondition()), x)
    assert [*found] == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert found["down_blocks.0"].shape == (B, SIDE // 2, SIDE // 2, 8)
    assert found["up_blocks.0"].shape == (B, SIDE, SIDE, 16)
    assert [f.shape[-1] for f in more.values()] == [8, 16]


def test_remat_keeps_less_for_the_backward_pass():
    module, cond, x = ask("unet_consistency")
    kept = []
    for remat in (True, False):
        other = nnx.eval_shape(lambda remat=remat: UNet2D(module.config, remat=remat, rngs=rngs_of(0)))
        params, rest, code = split(other)
        back = jax.eval_shape(lambda p, r, code=code: jax.vjp(lambda p: code(p, r)(x, TIMES, cond), p)[1], params, rest)
        kept.append(
            sum(math.prod(a.shape) for a in jax.tree.leaves(back)) - sum(math.prod(p.shape) for p in params.values())
        )
    assert kept[0] < kept[1] / 4


XL = UNet2DConditionConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REFINER = UNet2DConditionConfig(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=1280,
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
)
CIFAR10 = UNet2DConfig(
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
)
IMAGENET64 = UNet2DConfig(
    block_out_channels=(192, 384, 576, 768),
    down_block_types=("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
    up_block_types=(*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    layers_per_block=3,
    attention_head_dim=64,
    attn_norm_num_groups=32,
    resnet_time_scale_shift="scale_shift",
    downsample_type="resnet",
    upsample_type="resnet",
    num_class_embeds=1000,
)
PUBLISHED = {
    "stable-diffusion-v1-5": (UNet2DConditionConfig(cross_attention_dim=768), 859_520_964),
    "stable-diffusion-2-1": (
        UNet2DConditionConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        865_910_724,
    ),
    "stable-diffusion-xl-base-1.0": (XL, 2_567_463_684),
    "stable-diffusion-xl-refiner-1.0": (REFINER, 2_259_526_660),
    "ddpm-cifar10-32": (CIFAR10, 35_746_307),
    "diffusers-cd_imagenet64_l2": (IMAGENET64, 295_899_267),
}


@cache
def published(name):
    """Names and shapes of the tensors of a published network, as ours has them."""
    config, _ = PUBLISHED[name]
    make = UNet2D if isinstance(config, UNet2DConfig) else UNet2DCondition
    shapes = shapes_of(lambda: make(config, rngs=rngs_of(0)))
    parts = [t for p, s in shapes.items() if not p.startswith(("target.", "guidance.")) for t in tensors_of(p, s)]
    return {t.name: t.shape for t in parts}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_number_of_parameters(name):
    assert sum(map(math.prod, published(name).values())) == PUBLISHED[name][1]


@pytest.mark.torch
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_names_and_shapes_of_diffusers(name):
    torch = pytest.importorskip("torch")
    config, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = torch_model(config, "UNet2DModel" if isinstance(config, UNet2DConfig) else "UNet2DConditionModel")
    assert published(name) == {n: tuple(p.shape) for n, p in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (UNet2DConfig, {"down_block_types": ("SkipDownBlock2D",) * 4}, r"\['SkipDownBlock2D'\]; UNet2DConfig supports"),
        (UNet2DConfig, {"up_block_types": ("UpBlock2D",) * 3}, "3 entries for 4 block_out_channels"),
        (UNet2DConfig, {"time_embedding_type": "learned"}, "num_train_timesteps"),
        (UNet2DConfig, {"class_embed_type": "identity"}, "class_embed_type is 'identity'"),
        (UNet2DConfig, {"resnet_time_scale_shift": "spatial"}, "'spatial'.*'scale_shift'"),
        (UNet2DConditionConfig, {"in_channels": 9}, "9 channels in and 4 out"),
        (UNet2DConditionConfig, {"down_block_types": ("AttnDownBlock2D",) * 4}, "supports .*CrossAttnDownBlock2D"),
        (UNet2DConditionConfig, {"attention_head_dim": (5, 10)}, "attention_head_dim has 2 entries for 4 levels"),
        (UNet2DConditionConfig, {"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        (UNet2DConditionConfig, {"addition_embed_type": "image"}, "'text_time'"),
        (UNet2DConditionConfig, {"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
        (UNet2DConditionConfig, {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
    ],
)
def test_configs_that_are_not_built_are_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options)


def test_inputs_that_do_not_fit_are_refused():
    def call(case, x=None, cond=None):
        module, right, image = ask(case)
        x = image if x is None else x
        jax.eval_shape(lambda: module(x, TIMES, right if cond is None else cond))

    with pytest.raises(ValueError, match=r"takes images \[B, H, W, 3\]; given \[2, 3, 8, 8\]"):
        call("unet_ddpm", x=np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match="halves images 2 times: H and W must be divisible by 4"):
        call("unet_consistency", x=np.zeros((2, 6, 8, 3)))
    with pytest.raises(ValueError, match="no classes"):
        call("unet_ddpm", cond=np.array([1, 2]))
    with pytest.raises(ValueError, match="UNet2DCondition is conditioned on a text.*given ndarray"):
        call("unet_sd", cond=np.array([1, 2]))
    with pytest.raises(ValueError, match="texts of 6 channels; given states of 7"):
        call("unet_sd", cond=Prompt(values(0, B, 3, 7)))
    text = prompt(TEXTS["unet_sdxl"])
    with pytest.raises(ValueError, match="Prompt without pooled"):
        call("unet_sdxl", cond=Prompt(text.states))
    with pytest.raises(ValueError, match="time ids .*Prompt.sizes, which is None"):
        call("unet_sdxl", cond=Prompt(text.states, pooled=text.pooled))
    with pytest.raises(ValueError, match="vectors of 30 numbers, this UNet2DCondition reads 34"):
        call("unet_sdxl", cond=Prompt(text.states, pooled=text.pooled, sizes=text.sizes[:, :5]))
    with pytest.raises(ValueError, match="10 channels do not split into 3 attention heads"):
        Attention(10, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
