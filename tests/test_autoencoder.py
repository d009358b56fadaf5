"""Autoencoders against diffusers': outputs, gradients, parameter counts; latents in a denoiser's scale; slices."""

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
    with_weights,
)

from ddistill.hub.configs import parsed
from ddistill.net import split
from ddistill.networks.autoencoder import (
    DOWN,
    UP,
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderTiny,
    AutoencoderTinyConfig,
    Posterior,
    current_name,
    to_latents,
    to_pictures,
)
from ddistill.networks.layers import rngs_of


def kl_config(widths, **fields):
    blocks = {"down_block_types": (DOWN,) * len(widths), "up_block_types": (UP,) * len(widths)}
    return AutoencoderKLConfig(block_out_channels=widths, **blocks, **fields)


BARE = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
CASES = {
    "autoencoder_kl": (AutoencoderKL, kl_config((4, 8), norm_num_groups=2)),
    "autoencoder_kl_bare": (
        AutoencoderKL,
        kl_config((4, 8), layers_per_block=2, norm_num_groups=4, latent_channels=3, shift_factor=0.1, **BARE),
    ),
    "autoencoder_tiny": (
        AutoencoderTiny,
        AutoencoderTinyConfig(
            encoder_block_out_channels=(6, 6, 6),
            decoder_block_out_channels=(6, 6),
            num_encoder_blocks=(1, 2, 1),
            num_decoder_blocks=(2, 1),
        ),
    ),
}
PICTURES = values(0, 2, 8, 12, 3)


def make(case, **options):
    module, config = CASES[case]
    return made(lambda: module(config, rngs=rngs_of(0), **options))


def there_and_back(module, x):
    """One array that every weight acts on: the log-variance's channels reach it too."""
    z = module.encode(x)
    return module.decode(z.mean + 0.1 * z.log_variance if isinstance(z, Posterior) else z)


@cache
def ours(case):
    return answers(make(case), there_and_back, PICTURES)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recorded_answers(case):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case, request):
    pytest.importorskip("torch")
    import diffusers

    def call(model, x):
        z = model.encode(x)
        z = z.latents if hasattr(z, "latents") else z.latent_dist.mean + 0.1 * z.latent_dist.logvar
        return model.decode(z).sample

    module, config = CASES[case]
    theirs = getattr(diffusers, module.__name__)(**vars(config))
    expected = torch_answers(theirs, call, nchw(PICTURES), arrange=nhwc, restore=nhwc)
    assert_parity(case, ours(case), expected, recording=request.config.getoption("--record"))


MOMENTS = 20 * values(3, 2, 3, 4, 8)  # log-variances beyond the clip on both sides


def posterior():
    module = make("autoencoder_kl")
    module.encoder, module.quant_conv = (lambda x: jnp.asarray(MOMENTS)), None
    return module.encode(jnp.zeros((2, 6, 8, 3)))


def test_log_variances_are_clipped():
    assert MOMENTS[..., 4:].max() > 20 and MOMENTS[..., 4:].min() < -30
    np.testing.assert_array_equal(posterior().mode(), MOMENTS[..., :4])
    np.testing.assert_array_equal(posterior().log_variance, np.clip(MOMENTS[..., 4:], -30, 20))


@pytest.mark.torch
def test_the_posterior_equals_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    theirs = DiagonalGaussianDistribution(torch.from_numpy(nchw(MOMENTS)))
    np.testing.assert_allclose(posterior().log_variance, nhwc(theirs.logvar.numpy()), rtol=1e-6)
    np.testing.assert_allclose(posterior().kl(), theirs.kl().numpy(), rtol=1e-5)


def test_a_draw_has_the_posterior_s_mean_and_variance():
    shape = (64, 16, 16, 4)
    draw = Posterior(jnp.full(shape, 0.5), jnp.full(shape, np.log(0.09))).sample(jax.random.key(0))
    assert abs(draw.mean() - 0.5) < 5 * 0.3 / np.sqrt(draw.size)
    assert abs(draw.var() / 0.09 - 1) < 5 * np.sqrt(2 / draw.size)


def test_latents_are_shifted_and_scaled_and_pictures_come_back():
    params, rest, code = with_weights(make("autoencoder_kl_bare"))
    key = jax.random.key(1)

    @jax.jit
    def run(params, x):
        module = code(params, rest)
        posterior = module.encode(x)
        mean, drawn = to_latents(module, x), to_latents(module, x, key)
        back = module.decode(posterior.mean), to_pictures(module, mean, clip=False), to_pictures(module, 100 * mean)
        return posterior, mean, drawn, back, to_latents(module, x, key, at_once=1)

    posterior, mean, drawn, (decoded, back, far), sliced = run(params, PICTURES)
    np.testing.assert_allclose(mean, (posterior.mean - 0.1) * 0.18215, rtol=1e-6)
    np.testing.assert_allclose(drawn, (posterior.sample(key) - 0.1) * 0.18215, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sliced, drawn, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back, decoded, atol=1e-5)
    assert far.min() == -1 and far.max() == 1


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
def test_slices_change_nothing(at_once):
    params, rest, code = with_weights(make("autoencoder_tiny"))
    z = values(5, 5, 2, 2, 4)
    np.testing.assert_allclose(
        jax.jit(lambda p, z: to_pictures(code(p, rest), z, at_once))(params, z),
        jax.jit(lambda p, z: to_pictures(code(p, rest), z))(params, z),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="at_once = 0"):
        to_pictures(code(params, rest), z, at_once=0)


def test_rematerialisation_changes_nothing():
    assert_close(
        answers(make("autoencoder_tiny", remat=True), there_and_back, PICTURES), ours("autoencoder_tiny"), 1e-5
    )


def test_bfloat16_stays_near_float32_and_float16_is_raised_where_the_config_asks():
    params, rest, code = with_weights(make("autoencoder_kl", dtype=jnp.bfloat16))
    out = jax.jit(lambda p, x: there_and_back(code(p, rest), x))(params, PICTURES)
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - ours("autoencoder_kl")["out"]).max() < 0.1
    config = CASES["autoencoder_kl"][1]
    for force in (True, False):
        module = nnx.eval_shape(
            lambda: AutoencoderKL(replace(config, force_upcast=force), dtype=jnp.float16, rngs=nnx.Rngs(0))
        )
        assert module.decoder.conv_in.dtype == (jnp.float32 if force else jnp.float16)


def test_taesd_latents_fit_into_a_byte():
    module = make("autoencoder_tiny")
    z = jnp.linspace(-2.9, 2.9, 7)
    np.testing.assert_allclose(module.to_unit(jnp.asarray([-3.0, 0.0, 3.0, 9.0])), [0, 0.5, 1, 1])
    np.testing.assert_allclose(module.from_unit(module.to_unit(z)), z, atol=1e-6)


# Parameter counts of the published models: sum(p.numel()) of diffusers' on the meta device.
LEVELS = (128, 256, 512, 512)
SD3 = kl_config(LEVELS, layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
PUBLISHED = {
    "SD 1.5 and SDXL": (AutoencoderKL, kl_config(LEVELS, layers_per_block=2), 83_653_863),
    "SD3 and FLUX": (AutoencoderKL, SD3, 83_819_683),
    "TAESD": (AutoencoderTiny, AutoencoderTinyConfig(), 2_445_063),
    "TAEF1": (AutoencoderTiny, AutoencoderTinyConfig(latent_channels=16), 2_458_899),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    module, config, count = PUBLISHED[name]
    shapes = shapes_of(lambda: module(config, rngs=rngs_of(0)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_attention_of_old_checkpoints_gets_its_name_of_today():
    old = "encoder.mid_block.attentions.0."
    assert current_name(old + "query.weight") == old + "to_q.weight"
    assert current_name(old + "proj_attn.bias") == old + "to_out.0.bias"
    for name in (old + "to_k.weight", old + "group_norm.bias", "decoder.conv_in.weight"):
        assert current_name(name) == name


def test_latents_with_a_mean_and_a_deviation_of_their_own_are_normalised_by_them():
    mean, std = (5.8, 3.2, 0.1, -2.1), (4.2, 4.6, 3.7, 3.3)  # EDM2's of Stable Diffusion's autoencoder, whose σ is .5
    config = CASES["autoencoder_kl"][1]
    own = replace(config, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    params, rest, code = with_weights(make("autoencoder_kl"))
    plain = code(params, rest)
    normed = split(nnx.eval_shape(lambda: AutoencoderKL(own, rngs=nnx.Rngs(0))))[2](params, rest)
    pictures = jnp.asarray(values(3, 2, 16, 16, 3)).clip(-1, 1)
    z = to_latents(plain, pictures) / config.scaling_factor + (config.shift_factor or 0.0)
    latents = to_latents(normed, pictures)
    np.testing.assert_allclose(latents, 0.5 * (z - np.asarray(mean)) / np.asarray(std), atol=1e-5)
    np.testing.assert_allclose(to_pictures(normed, latents), plain.decode(z).clip(-1, 1), atol=1e-4)
    with pytest.raises(ValueError, match="latents_std has 2 numbers for 4 latent_channels"):
        replace(own, latents_std=(1.0, 2.0))
    tiny = {"_class_name": "AutoencoderTiny", "block_out_channels": [64, 64, 64, 64]}
    assert parsed(AutoencoderTinyConfig, "AutoencoderTiny", tiny) == AutoencoderTinyConfig()


def test_bad_inputs_are_told():
    module = make("autoencoder_kl")
    with pytest.raises(ValueError, match=r"pictures \[B, H, W, 3\]; given \[1, 3, 8, 8\]"):
        module.encode(jnp.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"multiples of 2; given \[1, 9, 8, 3\]"):
        module.encode(jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match=r"latents \[B, H, W, 4\]"):
        module.decode(jnp.zeros((1, 4, 4, 16)))
    with pytest.raises(ValueError, match="2 times DownEncoderBlock2D"):
        AutoencoderKLConfig(block_out_channels=(4, 8), down_block_types=(DOWN, "AttnDownEncoderBlock2D"))
    with pytest.raises(ValueError, match="the same width at all levels"):
        AutoencoderTinyConfig(encoder_block_out_channels=(64, 32, 64, 64))
