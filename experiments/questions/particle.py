"""Samples moved one by one by a method, without a network between them: what its gradient alone does.

256 particles are the student (`ddistill.methods.sds.particles`), all of them a batch, so that `MultiSample` knows the
score of their distribution exactly; noise levels are log-uniform between two bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from common import Training, isotropic
from jax import Array
from scipy.stats import norm, wasserstein_distance

from ddistill.losses.score import Normalised
from ddistill.losses.times import UniformLogSNR
from ddistill.methods.base import Method, Space
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Fake, MultiSample
from ddistill.methods.sds import particles
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import Process, edm

COUNT = 256
RANGE = (0.02, 10.0)


def uneven() -> Mixture:
    """.7 N(−3, .3²) + .3 N(3, .3²)."""
    return isotropic([0.7, 0.3], [[-3.0], [3.0]], [0.09, 0.09])


def matching(fake: Fake | None = None, **changes: Any) -> DMD:
    """Distribution matching at log-uniform noise levels; by default with the exact score of the particles."""
    return DMD(fake or MultiSample(), UniformLogSNR(), Normalised(1e-3), rate=1.0, **changes)


def centred(key: Array) -> Array:
    """Particles of N(0, 1), between the modes."""
    return jax.random.normal(key, (COUNT, 1))


def collapsed(key: Array) -> Array:
    """Particles that have the left mode's law, N(−3, .3²)."""
    return -3 + 0.3 * jax.random.normal(key, (COUNT, 1))


@dataclass(eq=False)
class Particles:
    """Moves particles by a method at noise levels from `low` to `high`; all seeds share one compilation.

    Batches hold samples of the mixture, for methods that look at data.
    """

    mixture: Mixture
    config: Callable[[Process], Method]
    low: float = RANGE[0]
    high: float = RANGE[1]
    steps: int = 2000
    every: int = 0
    _training: Training = field(init=False)

    def __post_init__(self):
        def batches(key, store):
            return {"x": self.mixture.sample(key, COUNT), **(store or {})}

        method, space = self.config(edm(self.low, self.high)), Space((self.mixture.d,))
        self._training = Training(method, batches, self.steps, learning_rate=0.02, every=self.every, space=space)

    def __call__(self, x: Array, key: Array, store: Any = None, probe: Callable | None = None) -> np.ndarray:
        """Where particles x [n, d] end; store: more entries of each batch; probe(x, step) as in `Training`."""
        seen = None if probe is None else lambda net, step: probe(np.asarray(net.params), step)
        teacher = as_teacher(self.mixture, edm(self.low, self.high))
        return np.asarray(self._training(particles(lambda x: x, x), teacher, key, store, seen).params)


def summary(x: np.ndarray, mixture: Mixture) -> dict[str, float]:
    """Mass right of 0, Wasserstein-1 to the mixture and width within the modes, for x [n, 1].

    The width is the median distance to the mode's median over that of N(0, 1), which is a Gaussian's standard
    deviation and, unlike a root mean square, does not follow the few particles that are between modes.
    """
    means = np.asarray(mixture.means)[:, 0]
    mode = np.argmin(np.abs(x - means), axis=1)
    groups = [x[mode == k] for k in range(len(means)) if np.sum(mode == k) > 1]
    widths = [np.median(np.abs(g - np.median(g))) / norm.ppf(0.75) for g in groups]
    true = np.asarray(mixture.sample(jax.random.key(99), 100_000))
    return {
        "right": float(np.mean(x > 0)),
        "W1": float(wasserstein_distance(x[:, 0], true[:, 0])),
        "width": float(np.average(widths, weights=[len(g) for g in groups])),
    }
