"""Feature networks and LPIPS against others' implementations, their files, and features on many devices."""

import dataclasses
import json
import zipfile
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from parity import assert_parity, nchw, nhwc, shapes_of, values, weights
from published import published
from safetensors.numpy import load_file, save_file

from ddistill import sharding
from ddistill.cli.networks import Networks
from ddistill.config import Data, Experiment, MLPNetwork, Teacher
from ddistill.digests import digest_of
from ddistill.evaluate import clip_score
from ddistill.hub.features import (
    NETWORKS,
    float32,
    load_features,
    load_lpips,
    random_features,
    random_lpips,
    read_tensors,
)
from ddistill.hub.text_features import load_text_features, text_config
from ddistill.hub.vision import LAYOUTS, vision_params
from ddistill.hub.weights import params_from, tensors_from, tensors_of
from ddistill.log import Silent
from ddistill.losses.distances import LPIPS_MEAN, LPIPS_SPREAD
from ddistill.methods import Consistency
from ddistill.net import split
from ddistill.networks.inception import InceptionConfig, InceptionV3
from ddistill.networks.preprocess import (
    clean,
)
from ddistill.networks.text import CLIPTextConfig, CLIPTextModelWithProjection
from ddistill.networks.vgg import ALEXNET, VGG16, Convolutions, ConvolutionsConfig, Layer
from ddistill.networks.vit import VisionTransformer, ViTConfig
from ddistill.overrides import describe
from ddistill.runs import distil

TINY = InceptionConfig("tiny", classes=5, thinner=16)


def recording(request):
    return request.config.getoption("--record")


def run(module, params, x):
    """What a module answers with these parameters."""
    _, rest, code = module
    return jax.jit(lambda p, x: code(p, rest)(x))(params, x)


def abstract(make):
    return split(nnx.eval_shape(make))


# Inception


def inception_weights(shapes):
    """Weights that keep activations of order one through 94 convolutions."""
    made = weights({n: s for n, s in shapes.items() if not n.endswith("num_batches_tracked")})
    for name, w in made.items():
        if w.ndim == 4:
            w *= np.float32(np.sqrt(2))
        elif name.endswith("running_var"):
            made[name] = np.exp(w)
        elif name.endswith("bn.weight"):
            w += 1
    return made


INCEPTION_INPUT = np.tanh(values(0, 2, 75, 91, 3))


@cache
def our_inception():
    module = abstract(lambda: InceptionV3(InceptionConfig(), rngs=nnx.Rngs(0)))
    shapes = {t.name: t.shape for p, a in module[0].items() for t in tensors_of(p, a.shape)}
    return run(module, params_from(inception_weights(shapes), module[0]), INCEPTION_INPUT)


def test_inception_equals_the_recorded_answers_of_pytorch_fid():
    assert_parity("features_inception", our_inception())


@pytest.mark.torch
def test_inception_equals_pytorch_fid(request, monkeypatch):
    theirs = published("pytorch_fid.inception")
    import torch

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **options: {})
    kind = published("torchvision.models").Inception3
    monkeypatch.setattr(kind, "load_state_dict", lambda *args: None)
    monkeypatch.setattr(
        theirs, "_inception_v3", lambda **options: kind(num_classes=1008, aux_logits=False, init_weights=False)
    )
    model = theirs.fid_inception_v3().eval()
    state = inception_weights({n: tuple(p.shape) for n, p in model.state_dict().items()})
    torch.nn.Module.load_state_dict(model, {n: torch.from_numpy(w) for n, w in state.items()}, strict=False)
    seen = {}
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, out: seen.update(spatial=out))
    model.avgpool.register_forward_hook(lambda module, x, out: seen.update(pool=out))
    with torch.no_grad():
        model(torch.from_numpy(nchw(INCEPTION_INPUT)))
        logits = seen["pool"][:, :, 0, 0] @ model.fc.weight.T
    expected = {
        "pool": seen["pool"][:, :, 0, 0].numpy(),
        "logits": logits.numpy(),
        "spatial": nhwc(seen["spatial"][:, :7]).reshape(2, -1).numpy(),
    }
    assert_parity("features_inception", our_inception(), expected, recording=recording(request))


# CLIP and DINOv2


def vit(name, **changes):
    return ViTConfig(
        **{"name": name, "width": 12, "depth": 3, "heads": 2, "hidden": 24, "patch": 2, "image": 10} | changes
    )


CLIP = {"activation": "quick_gelu", "clip": True, "projection": 5, "epsilon": 1e-5}
OPEN = CLIP | {"activation": "gelu", "hidden": 48}  # open_clip's MLPs have four widths
GATED = {"activation": "swiglu", "hidden": 16}  # two thirds of 24
REGISTERS = {"registers": 4, "antialias": True}
# The library, our configuration, the image's sides, and the sign of the library's names.
VITS = {
    "features_clip": ("transformers", vit("clip", **CLIP), (10, 10), "vision_model."),
    "features_open_clip": ("open_clip", vit("open", **OPEN), (10, 10), "visual.conv1"),
    "features_dinov2": (
        "transformers",
        vit("dinov2"),
        (8, 14),
        "attention.attention.query",
    ),  # positions of 5 × 5 at 4 × 7 patches
    "features_dinov2_registers": ("transformers", vit("registers", **REGISTERS), (8, 14), "attention.attention.query"),
    "features_dinov2_gated": ("transformers", vit("gated", **REGISTERS, **GATED), (10, 10), "mlp.weights_in"),
    "features_dinov2_timm": ("timm", vit("timm"), (10, 10), "patch_embed.proj"),
}


def transformers_vit(config):
    import transformers

    shared = {
        "hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "patch_size": config.patch, "image_size": config.image,
    }  # fmt: skip
    if config.clip:
        options = shared | {"intermediate_size": config.hidden, "projection_dim": config.projection}
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**options))
    options = shared | {"mlp_ratio": 2, "use_swiglu_ffn": config.activation == "swiglu"}
    if not config.registers:
        return transformers.Dinov2Model(transformers.Dinov2Config(**options))
    options["num_register_tokens"] = config.registers
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**options))


def open_clip_vit(config):
    vision = {
        "image_size": config.image, "layers": config.depth, "width": config.width,
        "head_width": config.width // config.heads, "patch_size": config.patch,
    }  # fmt: skip
    text = {"context_length": 3, "vocab_size": 5, "width": 8, "heads": 2, "layers": 1}
    return published("open_clip").CLIP(embed_dim=config.projection, vision_cfg=vision, text_cfg=text)


def timm_vit(config):
    return published("timm.models.vision_transformer").VisionTransformer(
        img_size=config.image, patch_size=config.patch, embed_dim=config.width, depth=config.depth,
        num_heads=config.heads, mlp_ratio=2, init_values=1.0, num_classes=0,
    )  # fmt: skip


def images_of(case):
    return values(1, 2, *VITS[case][2], 3)


def names_of(case):
    """Names and shapes of the file that a case's library writes, as our tables have them."""
    _, config, _, sign = VITS[case]
    layout = next(known for known in LAYOUTS if known.sign == sign)
    params, _, _ = abstract(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    tensors = [t for path, p in params.items() for t in tensors_of(path, p.shape)]
    places = [(*layout.source(t.name), t.shape) for t in tensors]
    return {name: source.shape(shape) for name, source, shape in places}


def our_embedding(case, state):
    module = abstract(lambda: VisionTransformer(VITS[case][1], rngs=nnx.Rngs(0)))
    return run(module, vision_params(state, module[0]), images_of(case))


@pytest.mark.parametrize("case", VITS)
def test_vision_transformers_equal_the_recorded_answers(case):
    assert_parity(case, our_embedding(case, weights(names_of(case))))


@pytest.mark.torch
@pytest.mark.parametrize("case", VITS)
def test_vision_transformers_equal_their_libraries(case, request, tmp_path):
    torch = pytest.importorskip("torch")
    library, config, _, _ = VITS[case]
    model = {"transformers": transformers_vit, "open_clip": open_clip_vit, "timm": timm_vit}[library](config)
    x = torch.from_numpy(np.ascontiguousarray(nchw(images_of(case))))
    if library == "transformers":  # its files have other names than its models
        model.save_pretrained(tmp_path)
        state = weights({name: t.shape for name, t in load_file(tmp_path / "model.safetensors").items()})
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        out = type(model).from_pretrained(tmp_path).eval()(x)
        embedding = out.image_embeds if config.clip else out.pooler_output
        state = read_tensors(tmp_path)
    else:
        state = weights({name: tuple(p.shape) for name, p in model.state_dict().items()})
        model.load_state_dict({name: torch.from_numpy(np.asarray(w)) for name, w in state.items()})
        embedding = model.eval().encode_image(x) if library == "open_clip" else model.eval()(x)
    ours = our_embedding(case, state)
    assert_parity(case, ours, {"embedding": embedding.detach().numpy()}, recording=recording(request))


@pytest.mark.torch
def test_positions_of_the_first_dinov2_move_as_its_code_moves_them():
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(vit("dinov2"), offset=0.1)
    places = values(3, 1, 26, 12)
    scale = ((4 + 0.1) / 5, (7 + 0.1) / 5)
    square = torch.from_numpy(nchw(places[:, 1:].reshape(1, 5, 5, 12)))
    moved = torch.nn.functional.interpolate(square, scale_factor=scale, mode="bicubic")
    module = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    module.positions = nnx.Param(jnp.asarray(places))
    first, ours = module._positions(4, 7)
    np.testing.assert_array_equal(first, places[:, :1])
    np.testing.assert_allclose(ours[0], nhwc(moved.numpy()).reshape(28, 12), atol=1e-5)


def test_files_of_both_kinds_of_dinov2_give_the_same_network():
    config = vit("gated", **REGISTERS, **GATED)
    params, _, _ = abstract(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    theirs = weights(names_of("features_dinov2_gated"))
    one = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
           "embeddings.register": "register", "embeddings.patch_embeddings.projection": "patch_embed.proj",
           "encoder.layer.": "blocks.", "layernorm.": "norm.",
           "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma", "mlp.weights_in": "mlp.w12",
           "layer_scale2.lambda1": "ls2.gamma", "mlp.weights_out": "mlp.w3"}  # fmt: skip
    authors = {"mask_token": np.zeros((1, 12), np.float32)}
    for name, tensor in theirs.items():
        if "attention.attention.query" in name:
            name = name.replace("attention.attention.query", "attn.qkv")
            rest = [theirs[name.replace("attn.qkv", f"attention.attention.{k}").replace("blocks.", "encoder.layer.")]
                    for k in ("key", "value")]  # fmt: skip
            tensor = np.concatenate([tensor, *rest])
        elif "attention.attention." in name:
            continue
        for before, after in one.items():
            name = name.replace(before, after)
        authors[name] = tensor
    ours, other = vision_params(theirs, params), vision_params(authors, params)
    for path in params:
        np.testing.assert_array_equal(ours[path], other[path], path)
    deep = ours["blocks.stack.gate.kernel"]
    np.testing.assert_array_equal(deep[2], theirs["encoder.layer.2.mlp.weights_in.weight"][:16].T)


def test_a_file_that_does_not_fit_is_told_by_its_own_names():
    params, _, _ = abstract(lambda: VisionTransformer(vit("clip", **CLIP), rngs=nnx.Rngs(0)))
    state = weights(names_of("features_clip"))
    whole = {**state, "text_model.x": np.zeros(3), "logit_scale": np.zeros(()), "vision_model.y.position_ids": TINY}
    vision_params(whole, params)  # the other half of a CLIP is no part of this network
    bad = dict(state, **{"vision_model.extra": np.zeros(2), "visual_projection.weight": np.zeros((5, 3))})
    del bad["vision_model.encoder.layers.1.mlp.fc1.bias"], bad["vision_model.pre_layrnorm.weight"]
    with pytest.raises(ValueError) as error:
        vision_params(bad, params)
    told = str(error.value)
    for part in (
        "missing: vision_model.encoder.layers.1.mlp.fc1.bias [24]",
        "not expected: vision_model.extra [2]",
        "missing: vision_model.pre_layrnorm.weight",
        "visual_projection.weight is [5, 3], expected [5, 12]",
    ):
        assert part in told  # fmt: skip
    with pytest.raises(ValueError, match="no CLIP of transformers"):
        vision_params({"conv1.weight": np.zeros(2)}, params)
    with pytest.raises(ValueError, match="another network's"):
        vision_params(weights(names_of("features_dinov2")), params)


def test_vision_transformers_say_which_images_they_take():
    clip, dino = (
        nnx.eval_shape(lambda c=c: VisionTransformer(c, rngs=nnx.Rngs(0))) for c in (vit("c", **CLIP), vit("d"))
    )
    with pytest.raises(ValueError, match="c takes images of 10 × 10"):
        clip(np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="d takes images .* of patches of 2"):
        dino(np.zeros((1, 8, 9, 3)))
    with pytest.raises(ValueError, match="does not split into 5 heads"):
        vit("x", heads=5)


# Parameters of transformers' models on the meta device, without the mask's token.
PUBLISHED = {
    "clip-vit-b-32": 87_849_216, "clip-vit-l-14": 303_966_208, "clip-vit-l-14-336": 304_293_888,
    "dinov2-vit-s-14-reg4": 22_057_728, "dinov2-vit-l-14": 304_367_616, "dinov2-vit-g-14": 1_136_479_232,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_vision_transformers(name):
    shapes = shapes_of(lambda: VisionTransformer(NETWORKS[name], rngs=nnx.Rngs(0)))
    assert NETWORKS[name].name == name and sum(int(np.prod(s)) for s in shapes.values()) == PUBLISHED[name]


# LPIPS

PAIR = np.tanh(values(5, 2, 2, 34, 40, 3))
TWO = ConvolutionsConfig("two", (Layer(0, 4, seen=True), Layer(3, 4, pool=2, seen=True)))
LPIPS = {"features_lpips_vgg": ("vgg", VGG16), "features_lpips_alex": ("alex", ALEXNET)}


def lpips_weights(config):
    """Convolutions' weights by torchvision's names, and heads by lpips'."""
    params, _, _ = abstract(lambda: Convolutions(config, rngs=nnx.Rngs(0)))
    made = weights({t.name: t.shape for p, a in params.items() for t in tensors_of(p, a.shape)})
    made = {name: w * np.float32(np.sqrt(2) if w.ndim == 4 else 1) for name, w in made.items()}
    heads = weights({f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(config.widths)})
    return made, {name: np.abs(w) for name, w in heads.items()}


@cache
def our_lpips(case, folder):
    _, config = LPIPS[case]
    body, heads = lpips_weights(config)
    classifier = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    save_file(body | classifier, folder / "body.safetensors")
    save_file(heads, folder / "heads.safetensors")
    distance = load_lpips(config, folder / "body.safetensors", folder / "heads.safetensors")
    if config is VGG16:
        return {"out": np.asarray(jax.jit(distance)(*PAIR))}
    out, back = jax.vjp(jax.jit(distance), *PAIR)
    return {"out": np.asarray(out), "by_x": np.asarray(back(jnp.ones(2))[0])}


@pytest.mark.parametrize("case", LPIPS)
def test_lpips_equals_the_recorded_answers(case, tmp_path_factory):
    assert_parity(case, our_lpips(case, tmp_path_factory.getbasetemp()))


@pytest.mark.torch
@pytest.mark.parametrize("case", LPIPS)
def test_lpips_equals_lpips(case, request, tmp_path_factory):
    lpips = published("lpips")
    import torch

    name, config = LPIPS[case]
    body, heads = lpips_weights(config)
    model = lpips.LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False).eval()
    of_torchvision = {f"net.{n}": f"features.{n.split('.', 1)[1]}" for n in model.net.state_dict()}
    state = {theirs: body[ours] for theirs, ours in of_torchvision.items()} | heads
    _, unknown = model.load_state_dict({n: torch.from_numpy(w) for n, w in state.items()}, strict=False)
    assert not unknown
    a, b = (torch.from_numpy(np.ascontiguousarray(nchw(x))).requires_grad_() for x in PAIR)
    out = model(a, b)[:, 0, 0, 0]
    out.sum().backward()
    expected = {"out": out.detach().numpy(), "by_x": nhwc(a.grad.numpy())}
    if name == "vgg":
        del expected["by_x"]
    ours = our_lpips(case, tmp_path_factory.getbasetemp())
    assert_parity(case, ours, expected, recording=recording(request))


@pytest.mark.torch
def test_published_heads_of_lpips_are_read_from_their_old_files():
    lpips = published("lpips")
    import torch

    for name, config in LPIPS.values():
        path = f"{lpips.__path__[0]}/weights/v0.1/{name}.pth"
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        ours = read_tensors(path)
        assert list(ours) == list(theirs) == [f"lin{i}.model.1.weight" for i in range(len(config.widths))]
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_lpips_is_zero_and_flat_where_images_agree_also_where_nothing_is_seen():
    small = PAIR[0][:, :9, :9]
    distance = random_lpips(TWO, size=5)
    black = Partial(lambda x: (jnp.zeros((len(x), 2, 2, 3)) * x.sum(),))
    for d in (distance, dataclasses.replace(distance, features=black, heads=(jnp.ones(3),))):
        value, slope = jax.jit(jax.value_and_grad(lambda a, d=d: d(a, small).sum()))(small)
        assert value == 0 and not np.any(slope)
    assert np.all(distance(small, -small) > 0)
    described = json.loads(json.dumps(describe(distance)))  # as runs keep what they were trained with
    assert described["features"]["network"]["name"] == "two" and "float32[4] sha256:" in described["heads"][0]
    with pytest.raises(ValueError, match="LPIPS compares images"):
        distance(PAIR[0], PAIR[1][:, :9])
    with pytest.raises(ValueError, match="too small for two"):
        distance.features(jnp.zeros((1, 1, 1, 3)))


def test_a_student_learns_by_lpips():
    lpips = random_lpips(TWO)
    seen = []

    def distance(a, b):
        jax.debug.callback(lambda a, b: seen.append((np.asarray(a), np.asarray(b))), a, b)
        return lpips(a, b)

    @dataclasses.dataclass(frozen=True)
    class Images:
        def load(self):
            return Data({"x": np.tanh(values(3, 16, 9, 9, 3))}, (9, 9, 3), 0)

    method = Consistency(intervals=4, max_intervals=4, distance=distance, weighted=False)
    experiment = Experiment(
        "lpips", method, data=Images(), network=MLPNetwork(width=8, blocks=1), teacher=Teacher(steps=2), steps=2,
        batch_size=8, log_every=1,
    )  # fmt: skip
    log = Silent()
    distil(experiment, log=log)
    jax.effects_barrier()
    told = [row["student/loss"] for row in log.rows if row["stage"] == "student"]

    def by_hand(a, b):
        # Zhang et al. 2018, eq. 1, of the images that the student and its target have made
        def units(images):
            maps = lpips.features((images - np.float32(LPIPS_MEAN)) / np.float32(LPIPS_SPREAD))
            return [np.asarray(f, np.float64) / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10) for f in maps]

        maps = zip(units(a), units(b), lpips.heads, strict=True)
        return sum(np.mean(np.sum((f - g) ** 2 * np.asarray(head), axis=-1)) for f, g, head in maps)

    (first, second) = seen
    assert first[0].shape == (8, 9, 9, 3) and told[0] > 1e-6
    assert told == pytest.approx([by_hand(*first), by_hand(*second)], rel=1e-4)
    assert not np.array_equal(first[0], first[1])


def test_vgg16_is_torchvisions():
    # features.28 is its thirteenth and last convolution; 14,714,688 are its parameters without the classifier
    shapes = shapes_of(lambda: Convolutions(VGG16, rngs=nnx.Rngs(0)))
    assert sum(int(np.prod(s)) for s in shapes.values()) == 14_714_688
    numbers = [layer.number for layer in VGG16.layers]
    assert numbers == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28] and VGG16.widths == (64, 128, 256, 512, 512)


# From a file to features


@pytest.fixture(scope="module")
def tiny():
    return random_features(TINY, clean(75))


apply = jax.jit(lambda features, images: features.apply(images))
IMAGES = np.random.default_rng(9).integers(0, 256, (8, 20, 20, 3)).astype(np.uint8)


def test_features_of_a_file_are_those_it_was_written_from(tiny, tmp_path):
    state = dict(tensors_from(tiny.params))
    state["Mixed_7c.branch1x1.bn.num_batches_tracked"] = np.zeros((), np.int64)
    save_file(state, tmp_path / "inception.safetensors")
    read = load_features(TINY, tmp_path / "inception.safetensors", clean(75))
    assert (read.name, read.digest, read.size) == ("tiny", tiny.digest, 75)
    ours, theirs = apply(tiny, IMAGES), apply(read, IMAGES)
    assert {k: v.shape for k, v in ours.items()} == {"pool": (8, 128), "logits": (8, 5), "spatial": (8, 3 * 3 * 7)}
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    # the last bias is in the file and in no feature
    shifted = dataclasses.replace(tiny, params={**tiny.params, "fc.bias": tiny.params["fc.bias"] + 1})
    np.testing.assert_array_equal(apply(shifted, IMAGES)["logits"], ours["logits"])
    other = {**tiny.params, "fc.bias": tiny.params["fc.bias"].at[3].add(1e-6)}
    assert digest_of(other) != tiny.digest == digest_of(tiny.params)


def test_features_lie_where_their_images_lie(tiny):
    mesh = sharding.make_mesh()
    spread = apply(tiny.on(mesh), sharding.put_batch(mesh, IMAGES))
    alone = apply(tiny, IMAGES)
    for name in alone:
        assert len(spread[name].sharding.device_set) == 8 and spread[name].addressable_shards[0].data.shape[0] == 1
        np.testing.assert_allclose(spread[name], alone[name], atol=1e-6 * np.abs(alone[name]).max())


def test_bfloat16_stays_near_float32():
    config = vit("clip", **CLIP)
    full, half = random_features(config), random_features(config, dtype=jnp.bfloat16)
    assert half.digest == full.digest
    exact, out = (apply(features, IMAGES)["embedding"] for features in (full, half))
    assert out.dtype == jnp.float32 and 1e-4 < np.abs(out - exact).max() / np.abs(exact).max() < 0.05


def test_references_of_each_network_are_its_preprocessing():
    clip, dino = vit("c", **CLIP), vit("d", patch=14, image=28)
    for network, name, size in ((TINY, "clean", 299), (clip, "clip", 10), (dino, "dgm-eval", 224)):
        features = random_features(network)
        assert (features.preprocessing.name, features.size, features.name) == (name, size, network.name)


def test_files_that_are_no_weights_are_refused(tmp_path):
    wrong = {"fc.weight": np.zeros((1008, 2048), np.float32), "AuxLogits.fc.bias": np.zeros(3, np.float32)}
    save_file(wrong, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        load_features(TINY, tmp_path / "x.safetensors")
    told = str(error.value)
    assert "not expected: AuxLogits.fc.bias [3]" in told and "fc.weight is [1008, 2048], expected [5, 128]" in told
    assert told.count("missing: ") == 94 * 5 + 1
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript archive"):
        load_features(TINY, tmp_path / "script.pt")
    with pytest.raises(FileNotFoundError, match="absent.pth does not exist"):
        load_features(TINY, tmp_path / "absent.pth")


@pytest.mark.torch
def test_files_of_torch_are_read_as_safetensors_are(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(t)) for name, t in tensors_from(tiny.params)}
    torch.save(state, tmp_path / "new.pth")
    torch.save({"state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "old.pth"):
        assert load_features(TINY, tmp_path / name).digest == tiny.digest


def letters_of_clip(folder):
    """A tokenizer of three letters in a folder; 6 begins a text and 7, the largest number, ends it."""
    letters = [*"abc", *(f"{c}</w>" for c in "abc"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_the_text_side_of_a_clip_is_read_beside_its_image_side(tmp_path):
    pytest.importorskip("tokenizers")
    images = vit("clip", **CLIP | {"projection": 64})
    config = dataclasses.replace(text_config(images), num_hidden_layers=1, vocab_size=24, max_position_embeddings=6)
    assert text_config(NETWORKS["clip-vit-l-14"]) == CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, eos_token_id=2
    )
    letters_of_clip(tmp_path)
    params, _, code = abstract(lambda: CLIPTextModelWithProjection(config, rngs=nnx.Rngs(0)))
    text = weights({t.name: t.shape for p, a in params.items() for t in tensors_of(p, a.shape)})
    save_file(text | weights(names_of("features_clip")), tmp_path / "model.safetensors")
    side = load_text_features(images, tmp_path, tmp_path, config=config)
    out = side(["a b", "abcabcabc"])
    # start, words and end, to which texts are filled, and cut
    tokens = np.asarray([[6, 3, 4, 7, 7, 7], [6, 0, 1, 2, 0, 7]])
    np.testing.assert_array_equal(side.tokenizer(["a b", "abcabcabc"]).ids, tokens)
    expected = code(params_from(text, params), {})(tokens).pooled
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert out.shape == (2, 64) and side.name == "clip" and side.digest == digest_of(float32(side.params))
    with pytest.raises(ValueError, match="8 tokens, and the text side of clip embeds 5"):
        load_text_features(images, tmp_path, tmp_path, config=dataclasses.replace(config, vocab_size=5))
    with pytest.raises(ValueError, match="missing: text_model.encoder.layers.1"):
        load_text_features(images, tmp_path, tmp_path, config=dataclasses.replace(config, num_hidden_layers=2))


@pytest.mark.torch
def test_clip_score_of_prompts_is_that_of_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    images = vit("clip", **CLIP | {"image": 12, "projection": 64})
    config = dataclasses.replace(text_config(images), num_hidden_layers=2, vocab_size=24, max_position_embeddings=6)
    shared = {"num_attention_heads": 1, "projection_dim": 64}
    text = shared | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 24}
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text | {"max_position_embeddings": 6, "eos_token_id": 2},
        vision_config=transformers_vit(images).config.to_dict(), projection_dim=64,
    )).eval()  # fmt: skip
    state = weights({name: tuple(p.shape) for name, p in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(np.asarray(w)) for name, w in state.items()})
    model.save_pretrained(tmp_path)
    letters_of_clip(tmp_path)
    prompts = ["a b", "cab", "b", "abc c a b c"]
    # The shorter side needs no resampling, which Pillow's versions do in another order of the axes.
    pictures = np.random.default_rng(0).integers(0, 256, (4, 18, 12, 3), dtype=np.uint8)
    side = load_text_features(images, tmp_path, tmp_path, config=config)
    size = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
    seen = transformers.CLIPImageProcessorPil(**size)(list(pictures), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(np.array(side.tokenizer(prompts).ids)), pixel_values=seen)
        cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal().numpy()
    score = clip_score(load_features(images, tmp_path).apply(pictures)["embedding"], side(prompts))
    assert score == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-4)
    assert (cosines < 0).any() and score > 1


def test_what_was_judged_by_an_lpips_of_equal_weights_is_compared():
    def identity(seed):
        return Networks({}, random_lpips(TWO, seed=seed)).identity()

    assert identity(0) == identity(0) != identity(1)
    assert Networks({}).identity() == {}
