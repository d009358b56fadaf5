"""Gradients of divergences between a generator's samples and a teacher's, and the scores they are made of.

With x = G_θ(z) and x_t = α_t x + σ_t ε,

    ∇_θ KL(p_fake,t ‖ p_real,t) = E[α_t (s_fake − s_real)(x_t, t) ∂x/∂θ]                       (Yin et al. 2024, eq. 3)
    α_t (s_fake − s_real) = (α_t/σ_t)² (μ_fake − μ_real)

for denoisers μ(x_t, t) = E[x0 | x_t], so that a gradient by x is a weight times μ_fake − μ_real.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.process import Process, expand


class DirectionWeight(Protocol):
    """The weight of μ_fake − μ_real in a gradient by x; a frozen dataclass."""

    def __call__(self, process: Process, t: Array, x: Array, real: Array) -> Array:
        """t: [B], x and real = μ_real(x_t, t): [B, ...] -> [B], float32."""


@dataclass(frozen=True)
class Normalised:
    """1/mean|x − μ_real|, the mean over coordinates: steps of one size at all t (Yin et al. 2024, eq. 8).

    Eq. 7 and 8 have a factor α_t more, which the authors' code drops: with it a teacher on a process that scales the
    data down would hardly be heard at high noise, where modes get their weights. floor bounds the mean from below:
    where teacher and sample agree the quotient is noise.
    """

    floor: float = 0.01

    def __call__(self, process: Process, t: Array, x: Array, real: Array) -> Array:
        """t: [B], x and real: [B, ...] -> [B]."""
        apart = jnp.abs((x - real).astype(jnp.float32)).reshape(x.shape[0], -1).mean(1)
        return 1 / jnp.maximum(apart, self.floor)


@dataclass(frozen=True)
class Likelihood:
    """(α_t/σ_t)²: the gradient of the divergence itself, unweighted."""

    def __call__(self, process: Process, t: Array, x: Array, real: Array) -> Array:
        """t: [B] -> [B]."""
        return jnp.exp(process.log_snr(t))


@dataclass(frozen=True)
class NoisePrediction:
    """w(t) α_t/σ_t, so that the gradient is w(t) (ε̂_real − ε̂_fake), as in score distillation sampling.

    w(t) = β^noise ᾱ^signal with ᾱ = α²/(α² + σ²), β = 1 − ᾱ: (1, 0) is DreamFusion's σ² on variance-preserving
    processes, (0, 0) is 1, and (1, .5) is Fantasia3D's.
    """

    noise: float = 1.0
    signal: float = 0.0

    def __call__(self, process: Process, t: Array, x: Array, real: Array) -> Array:
        """t: [B] -> [B]."""
        log_snr = process.log_snr(t)
        weight = jax.nn.sigmoid(-log_snr) ** self.noise * jax.nn.sigmoid(log_snr) ** self.signal
        return weight * jnp.exp(0.5 * log_snr)


def directed(x: Array, gradient: Array) -> Array:
    """½ mean ‖x − sg(x − g)‖² over the B D coordinates: a scalar whose gradient by x is g/(B D)."""
    # The half square of a difference that is g itself; written with x − (x − g), small g would be rounded away.
    difference = x - jax.lax.stop_gradient(x) + jax.lax.stop_gradient(gradient)
    return 0.5 * jnp.mean(difference.astype(jnp.float32) ** 2)


def multi_sample_denoiser(
    process: Process, x_t: Array, t: Array, references: Array, mine: Array | None = None
) -> Array:
    """Σ_i w_i r_i, w_i ∝ p(x_t | r_i) = N(x_t; α_t r_i, σ_t² I): E[x0 | x_t] if x0 is one of the references.

    The self-normalised estimate of the denoiser of the distribution that the references were drawn from (Xu et al.
    2023, stable target field, eq. 5); `process.score` of it is that of the score. It is consistent, with a bias of
    order 1/n and a variance that grows as σ_t falls below the distance of neighbouring references. With one reference,
    the sample that x_t was made from, the score is −ε/σ_t, score distillation sampling's. x_t: [B, ...], t: [B],
    references: [n, ...]. mine: [B, n] bool, which of the references count for which x_t, at least one each: those of
    its condition. Nothing is differentiated.
    """
    x_t, t, references = map(jax.lax.stop_gradient, (x_t, t, references))
    points, centres = (a.astype(jnp.float32).reshape(len(a), -1) for a in (x_t, references))
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    # Differences before squares: at small σ the squares of the parts would hide them.
    distance2 = jnp.sum((points[:, None] - alpha[:, :, None] * centres[None]) ** 2, axis=-1)
    log_weight = -distance2 / (2 * sigma**2)
    if mine is not None:
        log_weight = jnp.where(mine, log_weight, -jnp.inf)
    # In full precision: α r − x_t, which the score is made of, is far smaller than r at small σ.
    mean = jnp.matmul(jax.nn.softmax(log_weight, axis=1), centres, precision="highest")
    return mean.reshape(x_t.shape).astype(x_t.dtype)


def divergence_gradient(
    process: Process, t: Array, x: Array, fake: Array, real: Array, weight: DirectionWeight
) -> Array:
    """weight · (μ_fake − μ_real) [B, ...] in float32, not differentiated; entries that are not finite are 0."""
    direction = expand(weight(process, t, x, real), x) * (fake - real).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0))
