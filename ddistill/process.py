"""Noise processes x_t = α(t) x0 + σ(t) ε, and every linear relation between x0, ε, score, v and velocity.

Time t grows with the noise: t = 0 is the data and t = t_max the noise, for every process. Networks are evaluated
on [t_min, t_max]; samplers end at t = 0. With ρ = σ/α the noise-to-signal ratio and λ = log(α/σ) = −log ρ:

    forward SDE        dx = f(t) x dt + g(t) dw,    f = α'/α,    g² = 2σσ' − 2(α'/α)σ²
    probability flow   dx/dt = f x − ½ g² ∇log p_t(x) = α' x0 + σ' ε          (x0, ε: posterior means)
    transition s → t   x_t | x_s ~ N((α_t/α_s) x_s, σ_t² (1 − e^{−2h})),      h = λ_s − λ_t, s < t
    posterior          x_s | x_t, x0 ~ N(α_s (1 − e^{−2h}) x0 + (α_t σ_s²)/(α_s σ_t²) x_t, σ_s² (1 − e^{−2h}))

Two processes with the same ρ differ by a factor only, so a teacher of one is a teacher of every other
(`ddistill.net.retime`). Sources: Song et al. 2021 (SDEs), Kingma et al. 2021 (log-SNR), Karras et al. 2022 (EDM).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Schedule(Protocol):
    """α and σ of a noise process as functions of time, with the half-log-SNR λ = log(α/σ) and its inverse.

    Implementations are frozen dataclasses: hashable by value, so that equal schedules share compilations.
    `time_of` accepts ±inf and answers with the end of the range that has it.
    """

    def alpha(self, t: Array) -> Array:
        """Signal scale at time t."""

    def sigma(self, t: Array) -> Array:
        """Noise scale at time t."""

    def half_log_snr(self, t: Array) -> Array:
        """λ(t) = log(α/σ), decreasing in t."""

    def time_of(self, half_log_snr: Array) -> Array:
        """Inverse of `half_log_snr`."""


LARGEST_RHO = 1000.0
"""Noise-to-signal ratio beyond which nothing of the data is left to see: where grids begin and embeddings end."""

Time = Array | float
"""A time, [] or [B]."""


def expand(t: Time, x: Array) -> Array:
    """Give t ([] or [B]) trailing axes so that it broadcasts against x ([B, ...])."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (jnp.ndim(x) - t.ndim)) if t.ndim else t


def safe_divide(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0, with a gradient that is finite in both cases."""
    zero = b == 0
    return jnp.where(zero, 0.0, a / jnp.where(zero, 1.0, b))


def _prime(f, t: Array) -> Array:
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


@dataclass(frozen=True)
class Process:
    """A noise process: a schedule and the range of times on which networks are evaluated.

    In every method t and s are [] or [B] and x, x0, noise are [B, ...]; results have the shape of x. Nothing divides by
    zero at the ends: where σ_t = 0 the noise estimate is 0 (its mean given clean data).
    """

    schedule: Schedule
    t_min: float
    t_max: float

    def alpha(self, t: Time) -> Array:
        """Signal scale α(t)."""
        return self.schedule.alpha(_as_float(t))

    def sigma(self, t: Time) -> Array:
        """Noise scale σ(t)."""
        return self.schedule.sigma(_as_float(t))

    def half_log_snr(self, t: Time) -> Array:
        """λ(t) = log(α/σ) of DPM-Solver; +inf where σ = 0, −inf where α = 0."""
        return self.schedule.half_log_snr(_as_float(t))

    def log_snr(self, t: Time) -> Array:
        """ℓ(t) = log(α²/σ²) = 2λ(t), the log-SNR of VDM and of progressive distillation."""
        return 2 * self.half_log_snr(t)

    def time_of(self, half_log_snr: Array) -> Array:
        """The time at which the half-log-SNR has the given value; ±inf gives the ends."""
        return self.schedule.time_of(_as_float(half_log_snr))

    def rho(self, t: Time) -> Array:
        """Noise-to-signal ratio ρ = σ/α; the σ of EDM."""
        return self.sigma(t) / self.alpha(t)

    def alpha_prime(self, t: Time) -> Array:
        """dα/dt by automatic differentiation."""
        return _prime(self.schedule.alpha, _as_float(t))

    def sigma_prime(self, t: Time) -> Array:
        """dσ/dt by automatic differentiation."""
        return _prime(self.schedule.sigma, _as_float(t))

    def diffuse(self, x0: Array, noise: Array, t: Time) -> Array:
        """x_t = α_t x0 + σ_t ε."""
        t = expand(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def prior(self, key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        """Draw the noise at which sampling starts: N(0, σ(t_max)² I)."""
        return self.sigma(jnp.asarray(self.t_max, dtype)) * jax.random.normal(key, tuple(shape), dtype)

    def eps(self, x0: Array, x: Array, t: Time) -> Array:
        """Noise estimate (x − α x0)/σ that belongs to a data estimate."""
        t = expand(t, x)
        return safe_divide(x - self.alpha(t) * x0, self.sigma(t))

    def score(self, x0: Array, x: Array, t: Time) -> Array:
        """Score (α x0 − x)/σ² = ∇ log p_t(x) that belongs to a data estimate (Tweedie)."""
        return self.score_from_eps(self.eps(x0, x, t), x, t)

    def score_from_eps(self, eps: Array, x: Array, t: Time) -> Array:
        """Score −ε/σ, the one conversion that stays defined where α = 0."""
        return -safe_divide(eps, self.sigma(expand(t, x)))

    def v(self, x0: Array, x: Array, t: Time) -> Array:
        """v = α ε − σ x0 of progressive distillation (Salimans & Ho 2022, app. D); diffusers' "v_prediction"."""
        te = expand(t, x)
        return self.alpha(te) * self.eps(x0, x, t) - self.sigma(te) * x0

    def velocity(self, x0: Array, x: Array, t: Time) -> Array:
        """Drift of the probability-flow ODE, dx/dt = α' x0 + σ' ε; ε − x0 for rectified flow."""
        te = expand(t, x)
        return self.alpha_prime(te) * x0 + self.sigma_prime(te) * self.eps(x0, x, t)

    def x0_from_eps(self, eps: Array, x: Array, t: Time) -> Array:
        """Data estimate (x − σ ε)/α; not defined where α = 0, where it answers 0."""
        t = expand(t, x)
        return safe_divide(x - self.sigma(t) * eps, self.alpha(t))

    def x0_from_score(self, score: Array, x: Array, t: Time) -> Array:
        """Data estimate (x + σ² score)/α; not defined where α = 0, where it answers 0."""
        t = expand(t, x)
        return safe_divide(x + self.sigma(t) ** 2 * score, self.alpha(t))

    def x0_from_v(self, v: Array, x: Array, t: Time) -> Array:
        """Data estimate (α x − σ v)/(α² + σ²), defined at every time."""
        t = expand(t, x)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (alpha * x - sigma * v) / (alpha**2 + sigma**2)

    def x0_from_velocity(self, u: Array, x: Array, t: Time) -> Array:
        """Data estimate (σ' x − σ u)/(α σ' − σ α')."""
        t = expand(t, x)
        alpha, sigma = self.alpha(t), self.sigma(t)
        d_alpha, d_sigma = self.alpha_prime(t), self.sigma_prime(t)
        return safe_divide(d_sigma * x - sigma * u, alpha * d_sigma - sigma * d_alpha)

    def drift(self, x: Array, t: Time) -> Array:
        """f(t) x of the forward SDE, f = d log α/dt; infinite where α = 0."""
        t = expand(t, x)
        return self.alpha_prime(t) / self.alpha(t) * x

    def diffusion2(self, t: Time) -> Array:
        """g²(t) = 2σσ' − 2(α'/α)σ² of the forward SDE, shape of t; infinite where α = 0."""
        sigma = self.sigma(t)
        return 2 * sigma * self.sigma_prime(t) - 2 * self.alpha_prime(t) / self.alpha(t) * sigma**2

    def decay(self, t: Time, s: Time) -> Array:
        """e^{−h} = (σ_s α_t)/(σ_t α_s) for a step from t down to s; 0 at s = 0 and at α_t = 0, 1 at s = t."""
        decay = safe_divide(self.sigma(s) * self.alpha(t), self.sigma(t) * self.alpha(s))
        return jnp.where(jnp.asarray(s) == jnp.asarray(t), 1.0, decay)

    def transition(self, s: Time, t: Time) -> tuple[Array, Array]:
        """Scale α_t/α_s and standard deviation of x_t given x_s, s ≤ t; shape of the times."""
        decay = self.decay(t, s)
        scale = safe_divide(self.alpha(t), self.alpha(s))  # 0/0 where both have no signal, which is s = t
        scale = jnp.where(jnp.asarray(s) == jnp.asarray(t), 1.0, scale)
        return scale, self.sigma(t) * jnp.sqrt(jnp.clip(1 - decay**2, 0.0))

    def renoise(self, x: Array, noise: Array, s: Time, t: Time) -> Array:
        """Carry x from s up to t ≥ s along the forward process: a draw of x_t given x_s."""
        scale, std = self.transition(expand(s, x), expand(t, x))
        return scale * x + std * noise

    def posterior(self, x0: Array, x: Array, t: Time, s: Time) -> tuple[Array, Array]:
        """Mean and standard deviation of x_s given x_t = x and x0, s ≤ t (DDPM's ancestral step)."""
        t, s = expand(t, x), expand(s, x)
        decay2 = self.decay(t, s) ** 2
        # α_t σ_s²/(α_s σ_t²) = e^{−h} σ_s/σ_t keeps the quotient finite where α_t = 0.
        mean = self.alpha(s) * (1 - decay2) * x0 + self.decay(t, s) * self._sigma_ratio(t, s) * x
        return mean, self.sigma(s) * jnp.sqrt(jnp.clip(1 - decay2, 0.0))

    def step(self, x0: Array, x: Array, t: Time, s: Time) -> Array:
        """Jump from t to s along the line that x0 defines: α_s x0 + σ_s (x − α_t x0)/σ_t.

        With a teacher's x0 it is DDIM (Song et al. 2021, eq. 12, η = 0); with a student's it is the learned
        integrator. At s = t it returns x bit for bit, at s = 0 (with σ_0 = 0) x0 itself.
        """
        t, s = expand(t, x), expand(s, x)
        ratio = self._sigma_ratio(t, s)
        return ratio * x + (self.alpha(s) - ratio * self.alpha(t)) * x0

    def destination(self, x: Array, t: Time, y: Array, s: Time) -> Array:
        """The x0 for which `step(x0, x, t, s)` is y (Salimans & Ho 2022, app. G), s ≠ t."""
        t, s = expand(t, x), expand(s, x)
        ratio = self._sigma_ratio(t, s)
        return safe_divide(y - ratio * x, self.alpha(s) - ratio * self.alpha(t))

    def check_times(self, t, what: str = "time") -> None:
        """Raise ValueError if concrete times leave [0, t_max] or are not finite; traced times pass unchecked."""
        if isinstance(t, jax.core.Tracer):
            return
        values = np.asarray(t, np.float64)
        slack = 1e-6 * self.t_max  # float32 rounding of t_max
        if not np.all(np.isfinite(values)) or values.min() < 0 or values.max() > self.t_max + slack:
            raise ValueError(
                f"{what} {_worst(values, self.t_max)} is outside this process: {type(self.schedule).__name__} accepts "
                f"0 (data) to {self.t_max:g} (noise), and evaluates networks from {self.t_min:g} on"
            )

    def _sigma_ratio(self, t: Time, s: Time) -> Array:
        ratio = safe_divide(self.sigma(s), self.sigma(t))
        return jnp.where(jnp.asarray(s) == jnp.asarray(t), 1.0, ratio)


def _as_float(t) -> Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.float32)


def _worst(values: np.ndarray, t_max: float) -> float:
    outside = ~np.isfinite(values) | (values < 0) | (values > t_max)
    return float(values[outside].flat[0])


@dataclass(frozen=True)
class VP:
    """Variance preserving, β(t) = β_min + t (β_max − β_min) on [0, 1] (Song et al. 2021, eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t):
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t):
        return _sqrt(-jnp.expm1(2 * self._log_alpha(t)))

    def half_log_snr(self, t):
        return _half_log_snr_vp(self._log_alpha(t))

    def time_of(self, half_log_snr):
        # ∫β = softplus(−2λ) solved for t without cancellation (Lu et al. 2022, app. D.4).
        delta, integral = self.beta_max - self.beta_min, jax.nn.softplus(-2 * half_log_snr)
        t = 2 * integral / (jnp.sqrt(self.beta_min**2 + 2 * delta * integral) + self.beta_min)
        return jnp.where(jnp.isinf(integral), jnp.inf, t)  # α > 0 at every t


@dataclass(frozen=True)
class SubVP:
    """Sub-variance preserving: the α of VP with standard deviation σ = 1 − α² (Song et al. 2021, eq. 29)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t):
        return VP(self.beta_min, self.beta_max).alpha(t)

    def sigma(self, t):
        return -jnp.expm1(2 * VP(self.beta_min, self.beta_max)._log_alpha(t))

    def half_log_snr(self, t):
        return VP(self.beta_min, self.beta_max)._log_alpha(t) - jnp.log(self.sigma(t))

    def time_of(self, half_log_snr):
        # ρ = 2 sinh(u) with u = −log α, a quadratic in α; asinh keeps small noise exact.
        u = jnp.arcsinh(0.5 * jnp.exp(-half_log_snr))
        delta = self.beta_max - self.beta_min
        t = 4 * u / (jnp.sqrt(self.beta_min**2 + 4 * delta * u) + self.beta_min)
        return jnp.where(jnp.isinf(u), jnp.inf, t)  # α > 0 at every t


@dataclass(frozen=True)
class VPCosine:
    """VP cosine in log-SNR, ℓ(t) = −2 log tan(a t + b) from ℓ_max at 0 to ℓ_min at 1 (Salimans & Ho 2022, app. E)."""

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    @property
    def _ends(self) -> tuple[float, float]:
        return math.atan(math.exp(-0.5 * self.log_snr_max)), math.atan(math.exp(0.5 * self.log_snr_min))

    def _angle(self, t):
        b, c = self._ends
        return t * (math.pi / 2 - b - c) + b

    def _complement(self, t):
        # π/2 − angle without cancellation: the small cosine near t = 1 stays exact.
        b, c = self._ends
        return (1 - t) * (math.pi / 2 - b - c) + c

    def alpha(self, t):
        return jnp.sin(self._complement(t))

    def sigma(self, t):
        return jnp.sin(self._angle(t))

    def half_log_snr(self, t):
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

    def time_of(self, half_log_snr):
        b, c = self._ends
        return jnp.clip((jnp.arctan(jnp.exp(-half_log_snr)) - b) / (math.pi / 2 - b - c), 0.0, 1.0)


@dataclass(frozen=True)
class Cosine:
    """Plain cosine: α = cos(πt/2), σ = sin(πt/2) on [0, 1]; α is exactly 0 at t = 1."""

    def alpha(self, t):
        return jnp.sin(0.5 * math.pi * (1 - t))

    def sigma(self, t):
        return jnp.sin(0.5 * math.pi * t)

    def half_log_snr(self, t):
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

    def time_of(self, half_log_snr):
        return 2 / math.pi * jnp.arctan(jnp.exp(-half_log_snr))


@dataclass(frozen=True)
class DiscreteVP:
    """VP from a table of β_1 … β_T: at integer t, α_t² = Π_{i≤t} (1 − β_i), linear in log α between integers.

    t counts the noisings, as in DDPM (Ho et al. 2020): 0 is the data and T the last. A network trained with diffusers'
    timestep index i = 0 … T − 1 sees t = i + 1.
    """

    betas: tuple[float, ...]

    @functools.cached_property
    def _log_alphas(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-np.asarray(self.betas, np.float64)))])

    def _log_alpha(self, t):
        table = np.maximum(self._log_alphas, -60.0)  # interpolation towards log 0 of a zero-terminal-SNR table
        value = jnp.interp(t, np.arange(len(table), dtype=np.float64), table.astype(jnp.result_type(t)))
        return jnp.where(t >= len(self.betas), -jnp.inf, value) if self.betas[-1] == 1 else value

    def alpha(self, t):
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t):
        return _sqrt(-jnp.expm1(2 * self._log_alpha(t)))

    def half_log_snr(self, t):
        return _half_log_snr_vp(self._log_alpha(t))

    def time_of(self, half_log_snr):
        log_alpha = -0.5 * jax.nn.softplus(-2 * half_log_snr)
        table = np.maximum(self._log_alphas, -60.0).astype(jnp.result_type(log_alpha))
        return jnp.interp(-log_alpha, -table, np.arange(len(table), dtype=table.dtype))


@dataclass(frozen=True)
class VE:
    """Variance exploding, σ = σ_min (σ_max/σ_min)^t on [0, 1]; t = 0 keeps noise σ_min (Song et al. 2021, eq. 31)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * jnp.exp(t * math.log(self.sigma_max / self.sigma_min))

    def half_log_snr(self, t):
        return -math.log(self.sigma_min) - t * math.log(self.sigma_max / self.sigma_min)

    def time_of(self, half_log_snr):
        t = (-half_log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return jnp.clip(t, 0.0, 1.0)


@dataclass(frozen=True)
class EDM:
    """α = 1, σ = t (Karras et al. 2022)."""

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return t

    def half_log_snr(self, t):
        return -jnp.log(t)

    def time_of(self, half_log_snr):
        return jnp.exp(-half_log_snr)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: α = 1 − t, σ = t on [0, 1], velocity ε − x0 (Liu et al. 2022, with t = 0 the data)."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def half_log_snr(self, t):
        return jnp.log1p(-t) - jnp.log(t)

    def time_of(self, half_log_snr):
        return jax.nn.sigmoid(-half_log_snr)


@dataclass(frozen=True)
class Trig:
    """TrigFlow: α = cos t, σ = σ_d sin t on [0, π/2]; its velocity is v for σ_d = 1 (Lu & Song 2024, sec. 3)."""

    sigma_data: float = 0.5

    def alpha(self, t):
        # sin(π/2 − t) is exactly 0 at the float nearest to π/2, where cos is not.
        return jnp.sin(jnp.asarray(math.pi / 2, t.dtype) - t)

    def sigma(self, t):
        return self.sigma_data * jnp.sin(t)

    def half_log_snr(self, t):
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

    def time_of(self, half_log_snr):
        return jnp.arctan(jnp.exp(-half_log_snr) / self.sigma_data)


def _half_log_snr_vp(log_alpha):
    return log_alpha - 0.5 * jnp.log(-jnp.expm1(2 * log_alpha))


def _sqrt(x):
    # A derivative of 0 instead of inf at x = 0, so that σ' of a VP process is finite at the data.
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Continuous VP process on [0, 1] (Song et al. 2021)."""
    return Process(VP(beta_min, beta_max), t_min, 1.0)


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Process:
    """Sub-VP process on [0, 1] (Song et al. 2021)."""
    return Process(SubVP(beta_min, beta_max), t_min, 1.0)


def vp_cosine(log_snr_min: float = -20.0, log_snr_max: float = 20.0) -> Process:
    """Cosine VP process of VDM and progressive distillation on [0, 1], with bounded log-SNR."""
    return Process(VPCosine(log_snr_min, log_snr_max), 0.0, 1.0)


def cosine(t_min: float = 1e-3) -> Process:
    """Plain cosine process on [0, 1]."""
    return Process(Cosine(), t_min, 1.0)


def discrete_vp(betas: Sequence[float]) -> Process:
    """VP process from a table β_1 … β_T, on times 1 … T (0 is the data).

    Raises ValueError unless the table is one-dimensional with values in (0, 1], a 1 only at its end.
    """
    table = np.asarray(betas, np.float64)
    if table.ndim != 1 or not len(table) or not np.all((table > 0) & (table <= 1)) or np.any(table[:-1] == 1):
        raise ValueError(
            "betas must be a one-dimensional table of values in (0, 1], 1 at its end only (zero terminal SNR); "
            f"given shape {table.shape} with values from {table.min(initial=1):g} to {table.max(initial=0):g}"
        )
    return Process(DiscreteVP(tuple(float(b) for b in table)), 1.0, float(len(table)))


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
    """Variance-exploding process on [0, 1] (Song et al. 2021)."""
    return Process(VE(sigma_min, sigma_max), 0.0, 1.0)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """EDM process: t is the noise level, from sigma_min to sigma_max (Karras et al. 2022)."""
    return Process(EDM(), sigma_min, sigma_max)


def flow(t_min: float = 1e-3) -> Process:
    """Rectified-flow process on [0, 1] (Liu et al. 2022; Lipman et al. 2023)."""
    return Process(Flow(), t_min, 1.0)


def trig(sigma_data: float = 0.5, t_min: float = 0.004, t_max: float = math.pi / 2) -> Process:
    """TrigFlow process on [0, π/2] with noise of standard deviation sigma_data (Lu & Song 2024)."""
    return Process(Trig(sigma_data), t_min, t_max)


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """DDPM's table: β linear from start to end (Ho et al. 2020)."""
    return np.linspace(start, end, steps)


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Stable Diffusion's table: √β linear (Rombach et al. 2022)."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def squared_cosine_betas(steps: int = 1000, max_beta: float = 0.999) -> np.ndarray:
    """Improved DDPM's table: ᾱ(u) = cos²((u + .008)/1.008 · π/2), β capped (Nichol & Dhariwal 2021, eq. 17)."""
    u = np.arange(steps + 1) / steps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def zero_terminal_snr(betas: Sequence[float]) -> np.ndarray:
    """Shift and scale √ᾱ so that it ends at exactly 0 and starts where it did (Lin et al. 2024, alg. 1)."""
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = np.concatenate([[1.0], root**2])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def flow_shift(t: Array, shift: float) -> Array:
    """Rectified-flow time shifted towards the noise, t' = s t/(1 + (s − 1) t), i.e. ℓ' = ℓ − 2 log s (SD3, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)
