"""Images as evaluation networks see them, against torch-fidelity, Clean-FID, torch, Pillow and JAX."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity, nchw, nhwc
from PIL import Image
from published import published

from ddistill.networks.preprocess import (
    PREPROCESSINGS,
    Resampling,
    clean,
    dgm_eval,
    openai_clip,
    pytorch_fid,
    resampling_matrix,
)

PICTURES = np.random.default_rng(8).integers(0, 256, (2, 21, 18, 3)).astype(np.uint8)
PICTURES[:, 5:16, 6:14] = np.where(np.arange(8)[:, None] < 4, 0, 255)  # an edge, beyond which cubic kernels overshoot
SIDES = ((29, 13), (9, 25))


@cache
def our_resampled():
    kinds = {
        "tensorflow": Resampling(corner=True),
        "bilinear": Resampling(),
        "bicubic": Resampling(cubic=True),
        "bicubic_smooth": Resampling(cubic=True, antialias=True),
        "bilinear_smooth": Resampling(antialias=True),
        "clean": Resampling(cubic=True, antialias=True, clipped=True),
    }
    x = jnp.asarray(PICTURES[:1], jnp.float32)
    return {f"{name}_{h}_{w}": np.asarray(how(x, h, w)) for name, how in kinds.items() for h, w in SIDES}


def test_resampling_equals_the_recorded_answers():
    assert_parity("preprocess", our_resampled())


@pytest.mark.torch
def test_resampling_equals_torch_fidelity_clean_fid_and_torch(request):
    published("torchvision")
    tensorflow = published("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    resizer = published("cleanfid.resize").make_resizer
    import torch

    x = torch.from_numpy(nchw(PICTURES[:1]).astype(np.float32))
    expected = {}
    for h, w in SIDES:
        for kind in ("bilinear", "bicubic"):
            for smooth in ("", "_smooth"):
                out = torch.nn.functional.interpolate(x, (h, w), mode=kind, align_corners=False, antialias=bool(smooth))
                expected[f"{kind}{smooth}_{h}_{w}"] = nhwc(out).numpy()
        expected[f"tensorflow_{h}_{w}"] = nhwc(tensorflow(x, (h, w), align_corners=False)).numpy()
        resize = resizer("PIL", False, "bicubic", (w, h))
        expected[f"clean_{h}_{w}"] = resize(PICTURES[0])[None]
    assert_parity("preprocess", our_resampled(), expected, recording=request.config.getoption("--record"))


def test_on_devices_images_become_what_pillow_makes_of_them():
    flat = Resampling(cubic=True, antialias=True, rounded=True)
    for h, w in ((21, 18), (29, 13), (9, 25)):
        for image in PICTURES:
            # by columns and then by rows, as Pillow before 13 always did
            pillow = Image.fromarray(image).resize((w, 21), Image.BICUBIC).resize((w, h), Image.BICUBIC)
            ours = flat(jnp.asarray(image, jnp.float32)[None], h, w)[0]
            # Pillow's weights have 22 bits: a sum that ends in a half may fall to the other side
            assert np.abs(ours - np.asarray(pillow)).max() <= 1 and np.mean(ours != np.asarray(pillow)) < 0.01


def test_resampling_agrees_with_jax_and_keeps_what_is_constant():
    x = jnp.asarray(PICTURES, jnp.float32)
    for h, w in SIDES:
        theirs = jax.image.resize(x, (2, h, w, 3), "cubic")
        np.testing.assert_allclose(Resampling(cubic=True, antialias=True)(x, h, w), theirs, atol=2e-3)
    for how in (Resampling(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)):
        for inputs, outputs in ((7, 3), (3, 7), (299, 32)):
            np.testing.assert_allclose(resampling_matrix(how, inputs, outputs).sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_bytes_and_brightness_are_the_same_images(name):
    prepare = PREPROCESSINGS[name](13)
    assert prepare.name == name
    seen = prepare(jnp.asarray(PICTURES))
    assert seen.shape == (2, 13, 13, 3) and seen.dtype == jnp.float32
    np.testing.assert_allclose(prepare(jnp.asarray(PICTURES / 255, jnp.float32)), seen, atol=1e-4)


def test_squares_are_seen_as_cmmd_reads_them():
    square = PICTURES[0, :18]
    read = np.asarray(Image.fromarray(square).resize((28, 28), resample=Image.BICUBIC))  # its io_util
    expected = (read / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    away = np.abs(openai_clip(28)(jnp.asarray(square)[None])[0] - expected)
    assert away.max() < 1.1 / 255 / 0.26 and np.mean(away > 1e-5) < 0.01  # sums that end in a half


def test_the_middle_is_cut_out_of_the_shorter_side_and_means_are_taken_off():
    wide = np.zeros((1, 20, 50, 3), np.uint8)
    wide[:, :, 15:35] = 255  # the middle square, at its own size
    white = (1 - np.asarray([0.48145466, 0.4578275, 0.40821073])) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(openai_clip(20)(jnp.asarray(wide))[0], np.broadcast_to(white, (20, 20, 3)), rtol=1e-5)
    squeezed = dgm_eval(20)(jnp.asarray(wide))[0]  # both sides become 20: black is left of the middle
    np.testing.assert_allclose(squeezed[:, 0], np.broadcast_to(-np.asarray([0.485, 0.456, 0.406]) /
                                                               [0.229, 0.224, 0.225], (20, 3)), rtol=1e-5)  # fmt: skip
    ends = jnp.asarray([[[[0, 255, 128]]]], jnp.uint8)
    np.testing.assert_allclose(pytorch_fid(1)(ends)[0, 0, 0], [-1, 1, 2 * 128 / 255 - 1], atol=1e-6)
    np.testing.assert_allclose(clean(1)(ends)[0, 0, 0], [-1, 127 / 128, 0], atol=1e-6)


def test_preprocessing_says_what_images_are():
    with pytest.raises(ValueError, match="of three colours; given .1, 4, 4, 1."):
        clean(8)(jnp.zeros((1, 4, 4, 1)))
    with pytest.raises(ValueError, match="given int32"):
        clean(8)(jnp.zeros((1, 4, 4, 3), jnp.int32))
