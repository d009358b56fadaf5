"""Networks that `ddistill evaluate` is given: those with features, LPIPS, and CLIP's text side with its prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddistill.config import Data
from ddistill.digests import digest_of
from ddistill.evaluate.quality import Conditions, conditions_of, labels_in_turn
from ddistill.evaluate.seen import part_of_process
from ddistill.evaluate.statistics import identity
from ddistill.hub.configs import read_json
from ddistill.hub.features import NETWORKS, Features, load_features, load_lpips
from ddistill.hub.text_features import load_text_features
from ddistill.losses.distances import LPIPS
from ddistill.networks.conditions import Prompt
from ddistill.networks.inception import InceptionConfig
from ddistill.networks.preprocess import PREPROCESSINGS
from ddistill.networks.vgg import ALEXNET, VGG16
from ddistill.networks.vit import ViTConfig
from ddistill.prompts import open_prompts, time_ids

_LPIPS = {"lpips-vgg16": VGG16, "lpips-alexnet": ALEXNET}
_INCEPTION = InceptionConfig().name


@dataclass(frozen=True)
class Networks:
    """Features by kind: inception, dinov2 and clip. clip: what and where it is."""

    features: Mapping[str, Features]
    lpips: LPIPS | None = None
    clip: tuple[ViTConfig, Path] | None = None

    @property
    def kinds(self) -> set[str]:
        """The kinds of networks that metrics name."""
        return set(self.features) | ({"lpips"} if self.lpips is not None else set())

    def identity(self) -> dict[str, Any]:
        """What makes numbers comparable."""
        lpips = {} if self.lpips is None else {"lpips": digest_of((self.lpips.features, self.lpips.heads))}
        return {**identity(self.features), **lpips}


def open_networks(given: Sequence[str], resize: str) -> Networks:
    """The networks of flags NETWORK=FILE.

    resize: the name of Inception's preprocessing. Raises ValueError for unknown networks and for two of one kind.
    """
    found: dict[str, Features] = {}
    lpips, clip = None, None
    for flag in given:
        name, there, file = flag.partition("=")
        config = NETWORKS.get(_INCEPTION if name == "inception" else name)
        if name in _LPIPS and there:
            body, comma, heads = file.partition(",")
            if not comma or lpips is not None:
                raise ValueError(f"--features {flag}: LPIPS is of two files, {name}=BODY,HEADS, and of one network")
            lpips = load_lpips(_LPIPS[name], Path(body), Path(heads))
            continue
        if config is None or not there:
            known = ", ".join(sorted((set(NETWORKS) | set(_LPIPS)) - {_INCEPTION}))
            raise ValueError(f"--features {flag}: give NETWORK=FILE, with one of the networks inception, {known}")
        kind = "inception" if isinstance(config, InceptionConfig) else "clip" if config.clip else "dinov2"
        if kind in found:
            raise ValueError(f"--features names two networks of the kind {kind}, of which one is compared")
        resized = PREPROCESSINGS[resize](299) if kind == "inception" else None
        found[kind] = load_features(config, Path(file), resized)
        if isinstance(config, ViTConfig) and config.clip:
            clip = config, Path(file)
    return Networks(found, lpips, clip)


def read_prompts(file: Path) -> list[str]:
    """The lines of a file without empty ones at its end.

    Raises FileNotFoundError where there is no file, ValueError where it has no lines.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--prompts {file} does not exist: give a file with a prompt in each line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    if not lines:
        raise ValueError(f"--prompts {file} is empty: give a file with a prompt in each line")
    return lines


def text_embeddings(networks: Networks, prompts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Embeddings [n, D] of prompts by the text side of the CLIP that was given, whose tokenizer lies beside it."""
    if networks.clip is None:
        raise ValueError(
            "clip_score needs CLIP: give --features clip-vit-l-14=FOLDER, with its tokenizer in the folder"
        )
    config, path = networks.clip
    texts = load_text_features(config, path, path if path.is_dir() else path.parent)
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    return np.concatenate([np.asarray(texts(batch)) for batch in batches])


def prompt_encoder(models: Path | None, side: int) -> Callable[[Sequence[str]], Prompt]:
    """What makes conditions of prompts: the encoders of the pipeline in a folder.

    side: of the pictures, for pipelines that are told it. Raises ValueError where there is no folder.
    """
    if models is None:
        raise ValueError("prompts are encoded by the pipeline that the teacher is of: give its folder, --models FOLDER")
    encoder = open_prompts(models)
    pipeline = read_json(models / "model_index.json", "the index of a pipeline's parts")["_class_name"]
    sizes = time_ids((side, side), (0, 0), (side, side)) if pipeline.startswith("StableDiffusionXL") else None

    def encode(texts: Sequence[str]) -> Prompt:
        prompt = encoder(list(texts), None if sizes is None else jnp.tile(sizes, (len(texts), 1)))
        return jax.tree.map(np.asarray, prompt)

    return encode


def conditions_for(
    data: Data, prompts: Sequence[str] | None, models: Path | None, batch_size: int, seed: int, side: int
) -> Conditions:
    """The conditions of samples: given prompts in turn (`prompt_conditions`), by default those of the data."""
    if prompts is None:
        return conditions_of(data, batch_size, seed)
    return prompt_conditions(data, prompts, models, batch_size, side)


def prompt_conditions(
    data: Data, prompts: Sequence[str], models: Path | None, batch_size: int, side: int
) -> Conditions:
    """The conditions of samples that have prompts in turn: encoded by a pipeline, or labels, with a prompt for each.

    models: the pipeline's folder. side: of the pictures, for pipelines that are told it. Raises ValueError for another
    number of prompts than classes, for runs without conditions, and where there is no pipeline.
    """
    if data.null is None:
        if data.num_classes != len(prompts):
            what = f"{data.num_classes} classes" if data.num_classes else "no conditions"
            raise ValueError(
                f"this run has {what}, and --prompts has {len(prompts)} lines: one for each class is needed"
            )
        return labels_in_turn(data.num_classes, batch_size)
    encode, rows = prompt_encoder(models, side), np.asarray(part_of_process(batch_size))
    return lambda number: encode([prompts[i % len(prompts)] for i in number * batch_size + rows])
