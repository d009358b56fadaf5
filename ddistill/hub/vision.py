"""The names of vision transformers' tensors in published files, as the parameters of `networks.vit` are made of them.

CLIP: transformers' and open_clip's. DINOv2: its authors', as timm's too, and transformers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddistill.hub.weights import check, tensors_of, to_ours

BLOCK = "blocks.#."


@dataclass(frozen=True)
class Source:
    """Where a tensor is in a file: the name there (# is the block's number), perhaps as one of equal parts of it.

    ones: axes of one number that the file leaves out in front. whole: the name is not the beginning of names that go on
    with .weight and .bias. turned: the file's matrix is transposed.
    """

    name: str
    part: int = 0
    parts: int = 1
    ones: int = 0
    whole: bool = False
    turned: bool = False

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a tensor of the shape `ours`."""
        first, *rest = ours[self.ones :]
        there = (first * self.parts, *rest)
        return there[::-1] if self.turned else there

    def read(self, tensor: Any, ours: tuple[int, ...]) -> np.ndarray:
        """The tensor of the shape `ours` in one of a file."""
        array = np.asarray(tensor)
        return np.split(array.T if self.turned else array, self.parts)[self.part].reshape(ours)


@dataclass(frozen=True)
class Layout:
    """The names of one kind of file. sign: a part of a name that these files alone have. others: what is not read.

    others tells the beginnings of names; with only=True those of all that is read.
    """

    sign: str
    sources: Mapping[str, Source]
    others: tuple[str, ...]
    only: bool = False

    def reads(self, name: str) -> bool:
        """Whether a name should be one of the network's."""
        return name.startswith(self.others) == self.only and not name.endswith("position_ids")

    def source(self, name: str) -> tuple[str, Source]:
        """A tensor's name in the file, and how it lies there."""
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        stem = BLOCK + name.split(".", 2)[2] if number else name
        for ours in (stem, stem.rpartition(".")[0]):
            if ours in self.sources:
                source = self.sources[ours]
                # In open_clip's fused projections an underscore stands before weight and bias.
                last = "" if source.whole else name.rpartition(".")[2]
                dot = "" if source.whole or source.name.endswith("_") else "."
                return source.name.replace("#", number) + dot + last, source
        raise ValueError(
            f"files with {self.sign!r} in their names have no tensor for {name}: they are another network's"
        )


def vision_params(tensors: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters of the paths, shapes and dtypes of `params` (of a `VisionTransformer`), from the tensors of a file.

    Raises ValueError for files of another kind, and one that lists every tensor that is missing, not expected or of
    another shape, by the file's names.
    """
    layout = next((known for known in LAYOUTS if any(known.sign in name for name in tensors)), None)
    if layout is None:
        there = ", ".join(list(tensors)[:4])
        raise ValueError(
            f"this file holds {there} …: no CLIP of transformers or open_clip, and no DINOv2 of its authors or of "
            "transformers"
        )
    wanted = {path: tensors_of(path, leaf.shape) for path, leaf in params.items()}
    places = {tensor.name: layout.source(tensor.name) for parts in wanted.values() for tensor in parts}
    expected = {places[t.name][0]: places[t.name][1].shape(t.shape) for parts in wanted.values() for t in parts}
    check(expected, {name: np.shape(tensor) for name, tensor in tensors.items() if layout.reads(name)})
    out = {}
    for path, parts in wanted.items():
        arrays = []
        for tensor in parts:
            name, source = places[tensor.name]
            arrays.append(to_ours(path, source.read(tensors[name], tensor.shape)))
        array = arrays[0] if parts[0].block is None else np.stack(arrays)
        out[path] = array.astype(params[path].dtype)
    return out


def _blocks(before: str, **names: str | Source) -> dict[str, Source]:
    sources = {ours: Source(name) if isinstance(name, str) else name for ours, name in names.items()}
    return {
        BLOCK + ours: Source(before + s.name, s.part, s.parts, s.ones, s.whole, s.turned) for ours, s in sources.items()
    }


_CLIP_HF = {
    "class_token": Source("vision_model.embeddings.class_embedding", ones=2, whole=True),
    "positions": Source("vision_model.embeddings.position_embedding.weight", ones=1, whole=True),
    "patches": Source("vision_model.embeddings.patch_embedding"),
    "norm_before": Source("vision_model.pre_layrnorm"),  # transformers' spelling
    "norm": Source("vision_model.post_layernorm"),
    "projection": Source("visual_projection"),
    **_blocks(
        "vision_model.encoder.layers.#.", norm1="layer_norm1", norm2="layer_norm2", q="self_attn.q_proj",
        k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj", fc1="mlp.fc1", fc2="mlp.fc2",
    ),
}  # fmt: skip
_OPEN_CLIP = {
    "class_token": Source("visual.class_embedding", ones=2, whole=True),
    "positions": Source("visual.positional_embedding", ones=1, whole=True),
    "patches": Source("visual.conv1"),
    "norm_before": Source("visual.ln_pre"),
    "norm": Source("visual.ln_post"),
    "projection.weight": Source("visual.proj", whole=True, turned=True),
    **_blocks(
        "visual.transformer.resblocks.#.", norm1="ln_1", norm2="ln_2", out="attn.out_proj",
        q=Source("attn.in_proj_", 0, 3), k=Source("attn.in_proj_", 1, 3), v=Source("attn.in_proj_", 2, 3),
        fc1="mlp.c_fc", fc2="mlp.c_proj",
    ),
}  # fmt: skip
_DINO_AUTHORS = {
    "class_token": Source("cls_token", whole=True),
    "positions": Source("pos_embed", whole=True),
    "registers": Source("register_tokens", whole=True),
    "patches": Source("patch_embed.proj"),
    "norm": Source("norm"),
    **_blocks(
        "blocks.#.", norm1="norm1", norm2="norm2", out="attn.proj", fc1="mlp.fc1", fc2="mlp.fc2",
        q=Source("attn.qkv", 0, 3), k=Source("attn.qkv", 1, 3), v=Source("attn.qkv", 2, 3),
        scale1=Source("ls1.gamma", whole=True), scale2=Source("ls2.gamma", whole=True),
    ),
}  # fmt: skip
_DINO_HF = {
    "class_token": Source("embeddings.cls_token", whole=True),
    "positions": Source("embeddings.position_embeddings", whole=True),
    "registers": Source("embeddings.register_tokens", whole=True),
    "patches": Source("embeddings.patch_embeddings.projection"),
    "norm": Source("layernorm"),
    **_blocks(
        "encoder.layer.#.", norm1="norm1", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2",
        q="attention.attention.query", k="attention.attention.key", v="attention.attention.value",
        out="attention.output.dense", scale1=Source("layer_scale1.lambda1", whole=True),
        scale2=Source("layer_scale2.lambda1", whole=True),
    ),
}  # fmt: skip
_DINO_AUTHORS_GATED = _DINO_AUTHORS | _blocks(
    "blocks.#.", gate=Source("mlp.w12", 0, 2), fc1=Source("mlp.w12", 1, 2), fc2="mlp.w3"
)
_DINO_HF_GATED = _DINO_HF | _blocks(
    "encoder.layer.#.", gate=Source("mlp.weights_in", 0, 2), fc1=Source("mlp.weights_in", 1, 2), fc2="mlp.weights_out"
)
_MASK = ("mask_token", "embeddings.mask_token")

LAYOUTS = (
    Layout("vision_model.", _CLIP_HF, ("vision_model.", "visual_projection."), only=True),
    Layout("visual.conv1", _OPEN_CLIP, ("visual.",), only=True),
    Layout("mlp.w12", _DINO_AUTHORS_GATED, _MASK),
    Layout("patch_embed.proj", _DINO_AUTHORS, _MASK),
    Layout("mlp.weights_in", _DINO_HF_GATED, _MASK),
    Layout("attention.attention.query", _DINO_HF, _MASK),
)
"""Kinds of files, the first of which fits."""
