"""Autoencoders in folders of diffusers, between pictures and the latents that a denoiser sees."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from ddistill.hub.configs import parsed, read_json
from ddistill.hub.load import read_params
from ddistill.hub.tensors import open_tensors
from ddistill.net import Definition, split
from ddistill.networks.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderTiny,
    AutoencoderTinyConfig,
    Posterior,
    current_name,
    scale_of,
    to_pictures,
)
from ddistill.networks.layers import rngs_of

CLASSES: Mapping[str, tuple[type, type]] = {
    "AutoencoderKL": (AutoencoderKL, AutoencoderKLConfig),
    "AutoencoderTiny": (AutoencoderTiny, AutoencoderTinyConfig),
}
"""Autoencoders and their configurations, by their classes in diffusers."""


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder with its weights. Make one with `load_autoencoder`.

    config: `AutoencoderKLConfig` or `AutoencoderTinyConfig`. `code(params, rest)` is the module.
    """

    config: Any
    params: dict[str, Array]
    rest: dict[str, Array]
    code: Definition

    def moments(self, x: Array) -> dict[str, Array]:
        """Pictures [B, H, W, in_channels] in [-1, 1] -> mean and std, or x alone, of a denoiser's latents [B, h, w, C].

        They are (z − shift) · scale (`scale_of`) of the posterior's z, or of the one z of the tiny autoencoder.
        """
        return _moments(self.params, self.rest, x, self.code)

    def pictures(self, latents: Array) -> Array:
        """A denoiser's latents [B, h, w, C] -> pictures [B, H, W, out_channels] in [-1, 1]."""
        return _pictures(self.params, self.rest, latents, self.code)


def load_autoencoder(
    folder: Path | str, *, mesh: Mesh | None = None, dtype: jnp.dtype = jnp.float32, variant: str | None = None
) -> Autoencoder:
    """The autoencoder in a folder: a pipeline's, in vae/, or a model's own (config.json).

    mesh: parameters lie on it as `sharding.state_shardings` has it. It computes in dtype. variant: of the weights.
    Raises FileNotFoundError for a folder without one, ValueError for other classes and for files that do not fit.
    """
    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    raw = read_json(folder / "config.json", "the configuration of an autoencoder")
    name = str(raw.get("_class_name"))
    if name not in CLASSES:
        raise ValueError(f"{folder} holds a model of the class {name}; autoencoders are {', '.join(CLASSES)}")
    module, kind = CLASSES[name]
    config = parsed(kind, name, raw)
    abstract, rest, code = split(nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=rngs_of(0))))
    tensors = {current_name(n): tensor for n, tensor in open_tensors(folder, variant).items()}
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    return Autoencoder(config, read_params(tensors, shapes, mesh), rest, code)


@functools.partial(jax.jit, static_argnums=3)
def _moments(params: dict[str, Array], rest: dict[str, Array], x: Array, code: Definition) -> dict[str, Array]:
    module: Any = code(params, rest)
    z = module.encode(x)
    shift, scale = scale_of(module.config)
    if isinstance(z, Posterior):
        return {"mean": (z.mean - shift) * scale, "std": jnp.exp(0.5 * z.log_variance) * scale}
    return {"x": (z - shift) * scale}


@functools.partial(jax.jit, static_argnums=3)
def _pictures(params: dict[str, Array], rest: dict[str, Array], latents: Array, code: Definition) -> Array:
    module: Any = code(params, rest)
    return to_pictures(module, latents)
