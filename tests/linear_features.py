"""Networks for tests of evaluation that see linear combinations of pixels: quick to compile, in closed form."""

import jax.numpy as jnp
import numpy as np

from ddistill.digests import digest_of
from ddistill.hub.features import Features
from ddistill.networks.preprocess import Preprocessing, Resampling


class Linear:
    """Images to features of these widths, each a matrix times the pixels."""

    def __init__(self, params):
        self.params = params

    def __call__(self, x):
        return {name: x.reshape(len(x), -1) @ matrix for name, matrix in self.params.items()}


def linear(params, rest):
    return Linear(params)


def linear_features(side, seed=0, name="linear", **widths):
    """Features "embedding" [B, 6], or of the widths given by name, of images of side × side, resampled if need be."""
    draw = np.random.default_rng(seed)
    widths = widths or {"embedding": 6}
    params = {k: draw.standard_normal((side * side * 3, n)).astype(np.float32) / side for k, n in widths.items()}
    preprocessing = Preprocessing(f"plain{side}", side, Resampling(), (127.5,) * 3, (127.5,) * 3)
    return Features({k: jnp.asarray(v) for k, v in params.items()}, linear, preprocessing, name, digest_of(params))
