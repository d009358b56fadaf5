"""Texts as conditions, without torch: the tokenizers and text encoders in the folder of a diffusers pipeline.

`open_prompts(folder)` answers a `PromptEncoder`, a function from texts to the `Prompt` that the pipeline's denoiser
takes. What the pipelines do with their encoders is in diffusers' encode_prompt, one function here for each family.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from ddistill.hub.configs import read_json
from ddistill.hub.load import read_params
from ddistill.hub.tensors import open_tensors
from ddistill.hub.tokenizer import Tokenizer, Tokens, open_tokenizer, tokenizer_settings
from ddistill.net import Definition, split
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import rngs_of
from ddistill.networks.text import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    clip_tensors,
    t5_tensors,
)

Params = tuple[dict[str, Array], ...]


@dataclass(frozen=True)
class PromptEncoder:
    """Texts to the `Prompt` of one pipeline.

    encode(params, tokens) is a pure function of one entry for each text encoder; tokenize(texts) makes its tokens on
    the host. null: the condition that means none when no negative text is given, zeros or the empty text's.
    """

    tokenizers: tuple[Tokenizer, ...]
    params: Params
    encode: Callable[[Params, tuple[Tokens, ...]], Prompt]
    null_is_zero: bool = False

    def tokenize(self, texts: Sequence[str]) -> tuple[Tokens, ...]:
        """B texts as the tokens of each encoder."""
        return tuple(tokenizer(texts) for tokenizer in self.tokenizers)

    def __call__(self, texts: Sequence[str], sizes: Array | None = None) -> Prompt:
        """B texts -> a Prompt of float32 arrays, with sizes [B, n] if they are given (SDXL's `time_ids`)."""
        prompt = self.encode(self.params, self.tokenize(texts))
        return prompt if sizes is None else dataclasses.replace(prompt, sizes=sizes)

    def null(self, sizes: Array | None = None) -> Prompt:
        """The condition of a batch of one that means none, as `ddistill.net.guided` takes it."""
        prompt = self([""], sizes)
        if not self.null_is_zero:
            return prompt
        zeros: dict[str, Any] = {name: jnp.zeros_like(getattr(prompt, name)) for name in ("states", "pooled")}
        return dataclasses.replace(prompt, **zeros)


def open_prompts(
    folder: Path | str,
    *,
    length: int | None = None,
    skip: int = 0,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    variant: str | None = None,
) -> PromptEncoder:
    """The prompt encoder of a diffusers pipeline's folder (model_index.json, text_encoder*/, tokenizer*/).

    length: tokens that T5 reads, the pipelines' max_sequence_length; by default theirs. skip: CLIP's last blocks that
    are skipped, their clip_skip. dtype: what the encoders compute in; matrices are kept in it. mesh: parameters lie on
    it as `sharding.state_shardings` has it. variant: of the weights' files, "fp16" for example.

    Raises ValueError for other pipelines and encoders, and for files that do not fit; FileNotFoundError for missing
    ones; ImportError without the tokenizers library.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json", "the index of a pipeline's parts")
    family = FAMILIES.get(index.get("_class_name", ""))
    if family is None:
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}, whose prompts are not supported, only those of "
            + ", ".join(FAMILIES)
        )
    if length is not None and not family.length:
        raise ValueError(f"length = {length} is of T5's texts, and {folder} has no T5")
    if skip and family.combine in (_flux, _pixart):
        raise ValueError(f"skip = {skip} skips blocks of CLIP, whose states {folder} does not take")
    how = How(skip, family.length if length is None else length, _joint_width(folder))
    names = [f"text_encoder_{i + 1}" if i else "text_encoder" for i in range(len(family.encoders))]
    parts = [
        _open_part(folder, name, kind, how.length, family.prepare, dtype, mesh, variant)
        for i, (name, kind) in enumerate(zip(names, family.encoders, strict=True))
        if i not in family.optional or (index.get(name) or [None])[-1]
    ]

    codes = [(part.code, part.rest) for part in parts]

    @jax.jit
    def encode(params: Params, tokens: tuple[Tokens, ...]) -> Prompt:
        modules = [code(p, rest) for (code, rest), p in zip(codes, params, strict=True)]
        return family.combine(modules, tokens, how)

    zero = bool(index.get("force_zeros_for_empty_prompt", family is _SDXL))
    return PromptEncoder(tuple(p.tokenizer for p in parts), tuple(p.params for p in parts), encode, zero)


def time_ids(original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """SDXL's sizes [6] of one image (Podell et al. 2023, sec. 2.2), each height before width, in pixels.

    original: before scaling and cropping. corner: the crop's top and left. target: after.
    """
    return np.asarray([*original, *corner, *target], np.float32)


@dataclass(frozen=True)
class How:
    """Blocks of CLIP that are skipped, tokens that T5 reads, and the width of the texts that the denoiser takes."""

    skip: int
    length: int
    width: int


@dataclass(frozen=True)
class Family:
    """How the pipelines of one family turn texts into a condition.

    encoders: kinds of text_encoder, text_encoder_2 and so on; optional: which of them a folder may lack. length: tokens
    that T5 reads.
    """

    encoders: tuple[str, ...]
    combine: Callable[[list[Any], tuple[Tokens, ...], How], Prompt]
    optional: tuple[int, ...] = ()
    length: int = 0
    prepare: Callable[[str], str] = str


def _sd(modules: list[Any], tokens: tuple[Tokens, ...], how: How) -> Prompt:
    return Prompt(modules[0](tokens[0].ids, skip=how.skip).states)


def _sdxl(modules: list[Any], tokens: tuple[Tokens, ...], how: How) -> Prompt:
    """The penultimate states side by side, and the second encoder's pooled state."""
    prompts = [m(t.ids, skip=how.skip + 1, norm=False) for m, t in zip(modules, tokens, strict=True)]
    return Prompt(jnp.concatenate([p.states for p in prompts], axis=-1), pooled=prompts[-1].pooled)


def _sd3(modules: list[Any], tokens: tuple[Tokens, ...], how: How) -> Prompt:
    """CLIP's penultimate states side by side, padded to T5's width; then T5's, or zeros in their place."""
    clips = [m(t.ids, skip=how.skip + 1, norm=False) for m, t in zip(modules[:2], tokens[:2], strict=True)]
    states = jnp.concatenate([p.states for p in clips], axis=-1)
    t5 = modules[2](tokens[2].ids).states if len(modules) > 2 else jnp.zeros((len(states), how.length, how.width))
    states = jnp.pad(states, ((0, 0), (0, 0), (0, t5.shape[-1] - states.shape[-1])))
    pooled = jnp.concatenate([p.pooled for p in clips], axis=-1)
    return Prompt(jnp.concatenate([states, t5], axis=1), pooled=pooled)


def _flux(modules: list[Any], tokens: tuple[Tokens, ...], how: How) -> Prompt:
    """T5's states, padding included, and CLIP's pooled state."""
    return Prompt(modules[1](tokens[1].ids).states, pooled=modules[0](tokens[0].ids).pooled)


def _pixart(modules: list[Any], tokens: tuple[Tokens, ...], how: How) -> Prompt:
    """T5's states, of which those of padding are seen by nobody."""
    return modules[0](tokens[0].ids, tokens[0].mask)


def _stripped(text: str) -> str:
    """What PixArt's pipelines do to a text without their clean_caption, which strips addresses, tags and the like."""
    return text.lower().strip()


_CLIP, _CLIP_HEAD, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_SD = Family((_CLIP,), _sd)
_SDXL = Family((_CLIP, _CLIP_HEAD), _sdxl, optional=(0,))  # SDXL's refiner has the second alone
_SD3 = Family((_CLIP_HEAD, _CLIP_HEAD, _T5), _sd3, optional=(2,), length=256)
_FLUX = Family((_CLIP, _T5), _flux, length=512)
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "LatentConsistencyModelImg2ImgPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "PixArtAlphaPipeline": Family((_T5,), _pixart, length=120, prepare=_stripped),
    "PixArtSigmaPipeline": Family((_T5,), _pixart, length=300, prepare=_stripped),
}
"""Families by the `_class_name` of a pipeline's model_index.json."""


class _Part(NamedTuple):
    """A text encoder and its tokenizer."""

    tokenizer: Tokenizer
    params: dict[str, Array]
    rest: dict[str, Array]
    code: Definition


def _open_part(
    pipeline: Path,
    name: str,
    kind: str,
    length: int,
    prepare: Callable[[str], str],
    dtype: jnp.dtype,
    mesh: Mesh | None,
    variant: str | None,
) -> _Part:
    """The encoder in the folder `name` of a pipeline; length: tokens of a text, for T5."""
    folder, beside = pipeline / name, pipeline / name.replace("text_encoder", "tokenizer")
    raw = read_json(folder / "config.json", "the configuration of a text encoder")
    module: Any = {_CLIP: CLIPTextModel, _CLIP_HEAD: CLIPTextModelWithProjection, _T5: T5EncoderModel}[kind]
    config = _encoder_config(raw, T5Config if kind == _T5 else CLIPTextConfig, folder, kind)
    if kind != _T5:  # a tokenizer's "very many" is a number of thirty digits
        length = int(tokenizer_settings(beside).get("model_max_length", config.max_position_embeddings))
        length = min(length, config.max_position_embeddings)
    tokenizer = open_tokenizer(beside, length, prepare)
    if tokenizer.backend.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{beside} has {tokenizer.backend.get_vocab_size()} tokens and {folder} embeds {config.vocab_size}: they "
            "belong to different models"
        )

    abstract, rest, code = split(nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=rngs_of(0))))
    tensors: Mapping[str, Any] = open_tensors(folder, variant)
    tensors = t5_tensors(tensors) if kind == _T5 else clip_tensors(tensors, projection=kind == _CLIP_HEAD)
    # Matrices are cast to dtype where they are used anyway; the rest is small, and used in float32.
    kept = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype if path.endswith(".kernel") else leaf.dtype)
        for path, leaf in abstract.items()
    }
    return _Part(tokenizer, read_params(tensors, kept, mesh), rest, code)


def _encoder_config(raw: Mapping[str, Any], kind: type, folder: Path, name: str) -> Any:
    """transformers' config.json as a configuration; fields that no number depends on are left out."""
    architecture = (raw.get("architectures") or [name])[0]
    if architecture != name:
        raise ValueError(f"{folder} holds a {architecture}, where the pipeline has a {name}")
    wrong = [
        f"{key} = {raw[key]!r} is not supported, only {' or '.join(map(repr, values))}"
        for key, values in kind.FIXED.items()  # type: ignore[attr-defined]
        if key in raw and raw[key] not in values
    ]
    if wrong:
        raise ValueError(f"{folder / 'config.json'}: " + "; ".join(wrong))
    return kind(**{field.name: raw[field.name] for field in dataclasses.fields(kind) if field.name in raw})


def _joint_width(folder: Path) -> int:
    """The width of the texts that SD3's transformer takes."""
    path = folder / "transformer" / "config.json"
    return read_json(path, "the configuration of a model").get("joint_attention_dim", 4096) if path.is_file() else 4096
