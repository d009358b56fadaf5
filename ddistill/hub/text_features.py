"""The text side of CLIP, for scores of images against their prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.digests import digest_of
from ddistill.hub.features import float32, read_tensors
from ddistill.hub.tokenizer import Tokenizer, open_tokenizer
from ddistill.hub.weights import params_from
from ddistill.net import Definition, split
from ddistill.networks.layers import rngs_of
from ddistill.networks.text import LEGACY_EOS, CLIPTextConfig, CLIPTextModelWithProjection, clip_tensors
from ddistill.networks.vit import ViTConfig


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """The text encoder that belongs to a CLIP's image encoder, with its tokenizer.

    name: of the image encoder. digest: of these weights in float32.
    """

    tokenizer: Tokenizer
    params: dict[str, Array]
    definition: Definition
    name: str
    digest: str

    def __call__(self, texts: Sequence[str]) -> Array:
        """B texts -> embeddings [B, D] of no particular length, float32, D being that of the images'."""
        return self.apply(self.tokenizer(texts).ids)

    def apply(self, tokens: Array | np.ndarray) -> Array:
        """Tokens [B, L] -> embeddings [B, D], a function for jitted code."""
        with jax.default_matmul_precision("float32"):
            prompt = self.definition(self.params, {})(jnp.asarray(tokens))
        return prompt.pooled


def text_config(images: ViTConfig) -> CLIPTextConfig:
    """The text encoder that OpenAI trained with an image encoder: as wide as their common space, heads of 64."""
    width = images.projection
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_attention_heads=width // 64,
        eos_token_id=LEGACY_EOS,
    )  # fmt: skip


def load_text_features(
    images: ViTConfig, path: Path | str, tokenizer: Path | str, *, config: CLIPTextConfig | None = None
) -> TextFeatures:
    """The text side of a CLIP from the file of both sides, and its tokenizer from a folder.

    images: the image side's configuration. path: model.safetensors of the Hugging Face model, or its folder. tokenizer:
    a folder with tokenizer.json, or with vocab.json and merges.txt, which is the same folder. config: by default
    OpenAI's. Raises ValueError that lists all tensors that are missing, not expected or of another shape, and for a
    tokenizer of another vocabulary; otherwise as `read_tensors` and `open_tokenizer`.
    """
    config = text_config(images) if config is None else config
    known = open_tokenizer(tokenizer, config.max_position_embeddings)
    if known.backend.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {known.backend.get_vocab_size()} tokens, and the text side of {images.name} embeds "
            f"{config.vocab_size}: they belong to different models"
        )
    shapes, _, code = split(nnx.eval_shape(lambda: CLIPTextModelWithProjection(config, rngs=rngs_of(0))))
    params = params_from(_texts_own(read_tensors(path)), shapes)
    return TextFeatures(
        known,
        {name: jnp.asarray(array) for name, array in params.items()},
        code,
        images.name,
        digest_of(float32(params)),
    )


def _texts_own(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the text side alone, by the names of `CLIPTextModelWithProjection`."""
    return clip_tensors({n: t for n, t in tensors.items() if n.startswith(("text_model.", "text_projection."))}, True)
