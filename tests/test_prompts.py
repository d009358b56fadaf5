"""Texts as conditions against transformers' tokenizers and diffusers' pipelines, in folders made here."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_parity, weights
from safetensors.numpy import save_file

from ddistill.hub.tokenizer import open_tokenizer
from ddistill.hub.weights import tensors_of
from ddistill.net import split
from ddistill.networks import text
from ddistill.prompts import open_prompts, time_ids
from ddistill.sharding import make_mesh

tokenizers = pytest.importorskip("tokenizers")

# Bytes of ASCII and of one accent, each also as the end of a word; "a cat" and a few more merges.
BYTES = [*map(chr, range(33, 127)), "Ã", "©", "ł", "½"]
MERGES = [("c", "a"), ("ca", "t</w>"), ("a", "n</w>"), ("'", "s</w>"), ("!", "!</w>"), ("1", "2</w>")]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCAB = [*BYTES, *(b + "</w>" for b in BYTES), *map("".join, MERGES), BOS, EOS]
T5_VOCAB = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁cat", "s", "t", "a", "c", "▁C", "!", "<extra_id_0>"]
TEXTS = ["a cat", "", "A  CAT's\n\tcats!", "it's 12 !! <|endoftext|> caté ½", "cat " * 9, "  Cat\xa0"]

LENGTH = 9
CLIP = {
    "vocab_size": len(CLIP_VOCAB),
    "hidden_size": 8,
    "intermediate_size": 12,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}
T5 = {
    "vocab_size": 16,
    "d_model": 20,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def write_clip_tokenizer(folder, pad=EOS, config=None):
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(CLIP_VOCAB)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n", "utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {key: {"content": token, **flags} for key, token in (("bos_token", BOS), ("eos_token", EOS))}
    write_json(folder / "special_tokens_map.json", special | {"unk_token": EOS, "pad_token": pad})
    named = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": EOS}
    write_json(folder / "tokenizer_config.json", named | (config or {}))


def write_t5_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [(piece, 0.0 if piece.startswith("<") else -2.0 - 0.1 * i) for i, piece in enumerate(T5_VOCAB)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 1}
    write_json(folder / "tokenizer_config.json", names | {"tokenizer_class": "T5Tokenizer", "model_max_length": 512})


def write_encoder(folder, kind, name):
    """A text encoder with weights made from their names and its own, as transformers saves it."""
    config = getattr(text, "T5Config" if kind == "T5EncoderModel" else "CLIPTextConfig")
    fields = T5 if kind == "T5EncoderModel" else CLIP | {"eos_token_id": 2}
    if kind == "CLIPTextModelWithProjection":
        fields = fields | {"hidden_act": "gelu", "hidden_size": 10, "eos_token_id": len(CLIP_VOCAB) - 1}
    params, _, _ = split(nnx.eval_shape(lambda: getattr(text, kind)(config(**fields), rngs=nnx.Rngs(0))))
    shapes = {t.name: t.shape for path, leaf in params.items() for t in tensors_of(path, leaf.shape)}
    made = weights({f"{name}.{n}": shape for n, shape in shapes.items()})
    folder.mkdir(parents=True)
    save_file({n: made[f"{name}.{n}"] for n in shapes}, folder / "model.safetensors", {"format": "pt"})
    model = "t5" if kind == "T5EncoderModel" else "clip_text_model"
    write_json(folder / "config.json", fields | {"architectures": [kind], "model_type": model, "dropout_rate": 0.1})


CLIP_MODEL, CLIP_HEAD, T5_MODEL = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
PIPELINES = {
    "StableDiffusionPipeline": (CLIP_MODEL,),
    "StableDiffusionXLPipeline": (CLIP_MODEL, CLIP_HEAD),
    "StableDiffusion3Pipeline": (CLIP_HEAD, CLIP_HEAD, T5_MODEL),
    "FluxPipeline": (CLIP_MODEL, T5_MODEL),
    "PixArtAlphaPipeline": (T5_MODEL,),
}


def write_pipeline(folder, name, kinds=None, **settings):
    index = {"_class_name": name, **settings}
    for i, kind in enumerate(kinds or PIPELINES[name]):
        end = f"_{i + 1}" * (i > 0)
        index[f"text_encoder{end}"] = ["transformers", kind] if kind else [None, None]
        if kind == T5_MODEL:
            write_t5_tokenizer(folder / f"tokenizer{end}")
        elif kind:
            write_clip_tokenizer(folder / f"tokenizer{end}", pad="!" if i else EOS)
        if kind:
            write_encoder(folder / f"text_encoder{end}", kind, f"encoder{i}")
    write_json(folder / "model_index.json", index)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders by the pipeline's name, written when they are asked for."""
    root = tmp_path_factory.mktemp("pipelines")
    return cache(lambda name: write_pipeline(root / name, name))


# Texts as numbers


def ids(*tokens):
    return [CLIP_VOCAB.index(token) for token in tokens]


def test_clip_tokens_are_merged_cut_and_padded(tmp_path):
    write_clip_tokenizer(tmp_path)
    tokenize = open_tokenizer(tmp_path, LENGTH)
    tokens = tokenize(["a cat", "cat " * 9, "Caté's"])
    assert tokens.ids[0].tolist() == ids(BOS, "a</w>", "cat</w>", *[EOS] * 6)
    assert tokens.mask[0].tolist() == [1] * 4 + [0] * 5
    assert tokens.ids[1].tolist() == ids(BOS, *["cat</w>"] * 7, EOS) and tokens.mask[1].all()
    assert tokens.ids[2].tolist() == ids(BOS, "ca", "t", "Ã", "©</w>", "'s</w>", *[EOS] * 3)
    assert tokens.ids.dtype == tokens.mask.dtype == np.int32


def test_t5_tokens_are_cut_and_padded(tmp_path):
    write_t5_tokenizer(tmp_path)
    tokens = open_tokenizer(tmp_path, 5)(["a cats", "a a a a a a", ""])
    assert tokens.ids.tolist() == [[4, 5, 6, 1, 0], [4, 4, 4, 4, 1], [1, 0, 0, 0, 0]]
    assert tokens.mask.tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 0, 0, 0, 0]]


KINDS = {
    "vocabulary and merges": lambda folder: write_clip_tokenizer(folder),
    "padding with a character": lambda folder: write_clip_tokenizer(folder, pad="!"),
    "listed tokens, which settle what pads": lambda folder: write_clip_tokenizer(
        folder,
        pad="!",
        config={
            "added_tokens_decoder": {
                str(len(CLIP_VOCAB)): {"content": "<cat>", "special": False, "lstrip": True},
                str(len(CLIP_VOCAB) - 1): {"content": EOS, "special": True, "normalized": False},
            }
        },
    ),
    "T5": write_t5_tokenizer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    KINDS[kind](tmp_path)
    theirs = getattr(transformers, "T5Tokenizer" if kind == "T5" else "CLIPTokenizer").from_pretrained(tmp_path)
    texts = [*TEXTS, "a <cat> !", "!a!", "<pad> a</s> C ats ☃"]
    for length in (LENGTH, 30):
        expected = theirs(texts, padding="max_length", max_length=length, truncation=True)
        tokens = open_tokenizer(tmp_path, length)(texts)
        assert tokens.ids.tolist() == expected["input_ids"]
        assert tokens.mask.tolist() == expected["attention_mask"]
    theirs.save_pretrained(tmp_path / "again")  # as tokenizer.json
    again = open_tokenizer(tmp_path / "again", 30)(texts)
    assert again.ids.tolist() == expected["input_ids"]


# Texts as conditions

CASES = {
    "prompts_sd": ("StableDiffusionPipeline", {}),
    "prompts_sd_skip": ("StableDiffusionPipeline", {"skip": 1}),
    "prompts_sdxl": ("StableDiffusionXLPipeline", {}),
    "prompts_sd3": ("StableDiffusion3Pipeline", {"length": 6}),
    "prompts_flux": ("FluxPipeline", {"length": 7}),
    "prompts_pixart": ("PixArtAlphaPipeline", {"length": 6}),
}


def arrays(prompt):
    return {name: np.asarray(a) for name, a in vars(prompt).items() if a is not None}


@pytest.fixture(scope="module")
def ours(pipelines):
    """Our answers by case, computed once."""
    return cache(lambda case: arrays(open_prompts(pipelines(CASES[case][0]), **CASES[case][1])(TEXTS[:4])))


@pytest.mark.parametrize("case", CASES)
def test_conditions_equal_the_recorded_answers(case, ours):
    assert_parity(case, ours(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_conditions_equal_diffusers(case, ours, pipelines, request):
    pytest.importorskip("torch")
    theirs = diffusers_answers(pipelines(CASES[case][0]), *CASES[case])
    assert_parity(case, ours(case), theirs, recording=request.config.getoption("--record"))


def diffusers_answers(folder, name, options):
    import diffusers
    import torch
    import transformers

    parts = {}
    for i, kind in enumerate(PIPELINES[name]):
        end = f"_{i + 1}" * (i > 0)
        parts[f"text_encoder{end}"] = getattr(transformers, kind).from_pretrained(folder / f"text_encoder{end}")
        tokenizer = transformers.T5Tokenizer if kind == T5_MODEL else transformers.CLIPTokenizer
        parts[f"tokenizer{end}"] = tokenizer.from_pretrained(folder / f"tokenizer{end}")
    other = {"unet", "vae", "scheduler", "transformer", "safety_checker", "feature_extractor"}
    kind = getattr(diffusers, name)
    wanted = set(kind.__init__.__code__.co_varnames[: kind.__init__.__code__.co_argcount])
    nothing = dict.fromkeys(other & wanted)
    pipeline = kind(**parts, **nothing, **({"requires_safety_checker": False} if "safety_checker" in wanted else {}))
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if "length" in options:
        how["max_sequence_length"] = options["length"]
    if "skip" in options:
        how["clip_skip"] = options["skip"]
    if name.startswith(("StableDiffusion3", "Flux")):
        how |= {"prompt_2": None} | ({"prompt_3": None} if "3" in name else {})
    if name == "FluxPipeline":
        del how["do_classifier_free_guidance"]
    if "skip" in options:  # diffusers 0.42 looks for the norm where transformers 4 had it
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    with torch.no_grad():
        out = pipeline.encode_prompt(list(TEXTS[:4]), **how)
    found = {"states": out[0]}
    if name == "FluxPipeline":
        found["pooled"] = out[1]
    elif name.startswith("PixArt"):
        found["mask"] = out[1]
    elif len(out) == 4:
        found["pooled"] = out[2]
    return {key: value.numpy() for key, value in found.items()}


def test_no_text_is_zeros_in_sdxl_and_the_empty_text_elsewhere(pipelines, tmp_path):
    sizes = jnp.asarray(time_ids((8, 9), (1, 2), (4, 5)))[None]
    assert sizes.tolist() == [[8, 9, 1, 2, 4, 5]]
    encoder = open_prompts(pipelines("StableDiffusionXLPipeline"))
    cond, null = encoder(["a cat"], sizes), encoder.null(sizes)
    assert jax.tree.map(jnp.shape, cond) == jax.tree.map(jnp.shape, null)
    assert cond.states.any() and not null.states.any() and not null.pooled.any()
    np.testing.assert_array_equal(null.sizes, sizes)

    index = pipelines("StableDiffusionXLPipeline") / "model_index.json"
    kept = json.loads(index.read_text())
    write_json(index, kept | {"force_zeros_for_empty_prompt": False})
    null = open_prompts(index.parent).null()
    write_json(index, kept)
    np.testing.assert_array_equal(null.states, encoder([""]).states)

    encoder = open_prompts(pipelines("PixArtAlphaPipeline"), length=6)
    null = encoder.null()
    np.testing.assert_array_equal(null.states, encoder(["  "]).states)
    assert null.mask.tolist() == [[1, 0, 0, 0, 0, 0]]


def test_encoders_that_a_pipeline_comes_without(pipelines, ours, tmp_path):
    name = "StableDiffusion3Pipeline"
    write_pipeline(tmp_path / "sd3", name, (CLIP_HEAD, CLIP_HEAD, None))
    write_json(tmp_path / "sd3" / "transformer" / "config.json", {"joint_attention_dim": 20})
    states = open_prompts(tmp_path / "sd3", length=6)(TEXTS[:4]).states
    np.testing.assert_allclose(states[:, :LENGTH], ours("prompts_sd3")["states"][:, :LENGTH], atol=1e-5)
    assert states.shape == (4, LENGTH + 6, 20) and not states[:, LENGTH:].any()

    write_pipeline(tmp_path / "refiner", "StableDiffusionXLPipeline", (None, CLIP_HEAD))
    refiner = open_prompts(tmp_path / "refiner")(TEXTS[:4])
    np.testing.assert_allclose(refiner.states, ours("prompts_sdxl")["states"][..., 8:], atol=1e-5)
    np.testing.assert_allclose(refiner.pooled, ours("prompts_sdxl")["pooled"], atol=1e-5)


def test_matrices_are_kept_in_bfloat16_and_split_over_devices(pipelines, ours):
    encoder = open_prompts(pipelines("FluxPipeline"), length=7, dtype=jnp.bfloat16, mesh=make_mesh(fsdp=2))
    for params in encoder.params:
        for path, leaf in params.items():
            assert leaf.dtype == (jnp.bfloat16 if path.endswith(".kernel") else jnp.float32)
            assert len(leaf.sharding.device_set) == jax.device_count()
    out = arrays(encoder(TEXTS[:4]))
    for name, exact in ours("prompts_flux").items():
        assert out[name].dtype == np.float32
        assert np.abs(out[name] - exact).max() < 0.05 * np.abs(exact).max()


def test_what_does_not_fit_is_told(pipelines, tmp_path):
    flux, sd = pipelines("FluxPipeline"), pipelines("StableDiffusionPipeline")
    with pytest.raises(ValueError, match="skip = 1 skips blocks of CLIP"):
        open_prompts(flux, skip=1)
    with pytest.raises(ValueError, match="length = 7 is of T5's texts"):
        open_prompts(sd, length=7)
    with pytest.raises(ValueError, match="1 tokens leave no room for a text"):
        open_prompts(flux, length=1)
    with pytest.raises(ValueError, match=r"give a list of texts, \['a cat'\]"):
        open_prompts(sd)("a cat")
    with pytest.raises(FileNotFoundError, match=r"no model_index.json"):
        open_prompts(tmp_path)
    write_json(tmp_path / "model_index.json", {"_class_name": "SanaPipeline"})
    with pytest.raises(ValueError, match="is a SanaPipeline, whose prompts are not supported, only those of Stable"):
        open_prompts(tmp_path)

    folder = write_pipeline(tmp_path / "sd", "StableDiffusionPipeline")
    config = folder / "text_encoder" / "config.json"
    kept = json.loads(config.read_text())
    for change, told in (
        ({"architectures": ["CLIPModel"]}, "holds a CLIPModel, where the pipeline has a CLIPTextModel"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported, only 0.0"),
        ({"vocab_size": 100}, f"has {len(CLIP_VOCAB)} tokens and .* embeds 100"),
        ({"hidden_size": 12}, "another shape: embeddings.token_embedding.weight"),
    ):
        write_json(config, kept | change)
        with pytest.raises(ValueError, match=told):
            open_prompts(folder)

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor vocab.json and merges.txt, only nothing"):
        open_tokenizer(tokenizer, 5)
    (tokenizer / "spiece.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        open_tokenizer(tokenizer, 5)
    write_t5_tokenizer(tokenizer)
    write_json(tokenizer / "tokenizer_config.json", {})
    with pytest.raises(ValueError, match="names no pad_token of its vocabulary"):
        open_tokenizer(tokenizer, 5)
