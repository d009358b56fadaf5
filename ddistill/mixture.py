"""A Gaussian mixture as the exact teacher: denoiser, score, velocity, density, modes and samples in closed form.

For data Σ_k w_k N(μ_k, U_k Λ_k U_kᵀ) the noised data x_t = α x0 + σ ε is the mixture of N(α μ_k, U_k V_k U_kᵀ) with
V_k = α² Λ_k + σ². With y_k = U_kᵀ(x − α μ_k) and the posterior r_k(x) of the component,

    log p_t(x) = log Σ_k w_k N(y_k; 0, V_k)           score(x, t)  = −Σ_k r_k U_k V_k⁻¹ y_k
    E[x0 | x]  = Σ_k r_k (μ_k + α U_k Λ_k V_k⁻¹ y_k)  velocity     = α' E[x0 | x] − σ' σ score(x, t)

All of it is computed on x/√(α² + σ²), where every number is of order one at every time, α = 0 and σ = 0 included.
"""

import dataclasses
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddistill.net import Net
from ddistill.process import Process, Time

BUNDLED = ("ring8", "grid25", "digits")

_SMALLEST_VARIANCE = 1e-20  # of a direction in which a component has no width, at σ = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians in d dimensions whose components carry class labels.

    weights [K], means [K, d], scales [K, d] (eigenvalues of the covariances), bases [K, d, d] (eigenvectors in
    columns), labels [K] in 0 … num_classes − 1. Build one with `from_covariances` or `load`, which check their input.

    The methods take a noise process, x [B, ...] with d numbers a sample, t [] or [B] within the process, and cond: None
    or labels [] or [B], where num_classes and −1 are the null label, which leaves the class open. A concrete label
    out of this range raises ValueError; a traced one answers NaN.
    """

    weights: Array | np.ndarray
    means: Array | np.ndarray
    scales: Array | np.ndarray
    bases: Array | np.ndarray
    labels: Array | np.ndarray
    num_classes: int = field(metadata={"static": True})

    @classmethod
    def from_covariances(
        cls,
        weights: ArrayLike,
        means: ArrayLike,
        covariances: ArrayLike,
        labels: ArrayLike | Sequence[int] | None = None,
    ) -> "Mixture":
        """Build a mixture from weights [K], means [K, d], covariances [K, d, d] and, if given, labels [K].

        The weights must be positive and sum to one (to 1e-4, and are then normalised), the covariances symmetric and
        positive semi-definite (to single precision), the labels use every class from 0 on; without labels all
        components are of class 0. Raises ValueError, saying what was given and what is accepted.
        """
        w, mu, cov = (_finite(a, name) for a, name in _named(weights, means, covariances))
        if w.ndim != 1 or not w.size or mu.ndim != 2 or mu.shape[0] != w.size or not mu.shape[1]:
            raise ValueError(
                f"weights must have shape [K] and means [K, d]; given {list(w.shape)} and {list(mu.shape)}"
            )
        k, d = mu.shape
        if cov.shape != (k, d, d):
            raise ValueError(
                f"covariances must have shape {[k, d, d]}, as the means have {[k, d]}; given {list(cov.shape)}"
            )
        if w.min() <= 0:
            raise ValueError(f"weights must be positive; component {w.argmin()} has {w.min():g}")
        if abs(w.sum() - 1) > 1e-4:
            raise ValueError(f"weights must sum to 1; given weights sum to {w.sum():g}: divide them by it")
        size = np.abs(cov).max((1, 2))
        asymmetry = np.abs(cov - cov.swapaxes(1, 2)).max((1, 2)) - 1e-5 * size
        if asymmetry.max() > 0:
            raise ValueError(f"covariances must be symmetric; that of component {asymmetry.argmax()} is not")
        scales, bases = np.linalg.eigh(0.5 * (cov + cov.swapaxes(1, 2)))
        negative = scales.min(1) + 1e-5 * size
        if negative.min() < 0:
            worst = negative.argmin()
            raise ValueError(
                "covariances must be positive semi-definite; "
                f"that of component {worst} has the eigenvalue {scales[worst].min():g}"
            )
        classes = _check_labels(np.zeros(k, np.int32) if labels is None else np.asarray(labels), k)
        return cls(w / w.sum(), mu, np.maximum(scales, 0), bases, classes, int(classes.max()) + 1)

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Mixture":
        """Read a bundled mixture (ring8, grid25 or digits) or an .npz file of arrays as in `from_covariances`.

        Raises FileNotFoundError if there is neither, ValueError if the file is no such archive.
        """
        path = Path(name_or_path)
        if str(name_or_path) in BUNDLED:
            path = Path(__file__).parent / "mixtures" / f"{name_or_path}.npz"
        accepted = (
            f"one of {', '.join(BUNDLED)}, or an .npz file with weights, means, covariances and, if wanted, labels"
        )
        if not path.is_file():
            raise FileNotFoundError(f"no mixture {str(name_or_path)!r}; give {accepted}")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not an .npz file; give {accepted}")
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("weights", "means", "covariances") if key not in file]
            if missing:
                raise ValueError(f"{path} lacks {', '.join(missing)} and has {', '.join(file.files)}; give {accepted}")
            try:
                arrays = {
                    key: _numbers(file, key) for key in ("weights", "means", "covariances", "labels") if key in file
                }
                return cls.from_covariances(**arrays)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

    def standardised(self, rms: float) -> "Mixture":
        """The mixture moved to mean 0 and scaled by one factor to root-mean-square `rms` per coordinate."""
        weights, means = np.asarray(self.weights, np.float64), np.asarray(self.means, np.float64)
        means = means - weights @ means
        power = weights @ (np.sum(means**2, axis=1) + np.sum(self.scales, axis=1)) / means.shape[1]
        factor = rms / math.sqrt(power)
        return dataclasses.replace(self, means=means * factor, scales=np.asarray(self.scales) * factor**2)

    @property
    def K(self) -> int:
        """Number of components."""
        return self.means.shape[0]

    @property
    def d(self) -> int:
        """Number of coordinates of a sample."""
        return self.means.shape[1]

    def denoise(self, process: Process, x: Array, t: Time, cond: Array | None = None) -> Array:
        """E[x0 | x_t = x], shape of x."""
        at = _Local(self, process, x, t, cond)
        return at.combine(jnp.ones_like(at.alpha), at.alpha[..., None] * at.scales / at.variance)

    def score(self, process: Process, x: Array, t: Time, cond: Array | None = None) -> Array:
        """∇ log p_t(x), shape of x; of the data's own density where σ = 0."""
        at = _Local(self, process, x, t, cond)
        return at.combine(jnp.zeros_like(at.alpha), -1 / (at.norm[..., None] * at.variance))

    def velocity(self, process: Process, x: Array, t: Time, cond: Array | None = None) -> Array:
        """Drift α' E[x0 | x] + σ' E[ε | x] of the probability-flow ODE, shape of x."""
        at = _Local(self, process, x, t, cond)
        d_alpha, d_sigma = at.column(process.alpha_prime(t)), at.column(process.sigma_prime(t))
        gain = (d_alpha * at.alpha)[..., None] * at.scales + (d_sigma * at.sigma)[..., None]
        return at.combine(d_alpha, gain / at.variance)

    def log_density(self, process: Process, x: Array, t: Time, cond: Array | None = None) -> Array:
        """log p_t(x) [B] in nats; given a class, of that class's own normalised mixture.

        Where σ = 0 it is the density of the data, which must then have width in every direction.
        """
        at = _Local(self, process, x, t, cond)
        log_norm = jnp.log(at.norm[:, 0]) if at.norm.ndim == 2 else jnp.log(at.norm)
        return jax.nn.logsumexp(at.logits, -1) - self.d * (0.5 * jnp.log(2 * jnp.pi) + log_norm)

    def responsibilities(self, process: Process, x: Array, t: Time, cond: Array | None = None) -> Array:
        """Posterior probability [B, K] of each component given x_t = x."""
        return jax.nn.softmax(_Local(self, process, x, t, cond).logits, -1)

    def sample(self, key: Array, n: int, cond: Array | None = None, dtype=jnp.float32) -> Array:
        """Draw n data points x0 [n, d]; cond is None or labels [] or [n]."""
        return self.sample_with_modes(key, n, cond, dtype)[0]

    def sample_with_modes(
        self, key: Array, n: int, cond: Array | None = None, dtype=jnp.float32
    ) -> tuple[Array, Array]:
        """Draw n data points x0 [n, d] and the components [n] they came from; cond is None or labels [] or [n]."""
        key_mode, key_noise = jax.random.split(key)
        logits = jnp.broadcast_to(self._log_weights(cond, dtype), (n, self.K))
        modes = jax.random.categorical(key_mode, logits)
        noise = jax.random.normal(key_noise, (n, self.d), dtype)
        means, scales, bases = (jnp.asarray(a, dtype) for a in (self.means, self.scales, self.bases))
        return _place(means, scales, bases, modes, noise), modes

    def _log_weights(self, cond, dtype) -> Array:
        """log w_k given the class: [K], or [B, K] for labels [B]; −inf for the components of other classes."""
        log_weights = jnp.log(jnp.asarray(self.weights, dtype))
        if cond is None:
            return log_weights
        cond = _check_cond(cond, self.num_classes)
        null = (cond == self.num_classes) | (cond == -1)
        allowed = null[..., None] | (jnp.asarray(self.labels) == cond[..., None])
        return jax.nn.log_softmax(jnp.where(allowed, log_weights, -jnp.inf), -1)


class _Local:
    """A mixture as seen from x at t: coordinates, variances and log posteriors of its components."""

    def __init__(self, mixture: Mixture, process: Process, x: Array, t: Time, cond: Array | None):
        x = jnp.asarray(x)
        if x.ndim < 2 or int(np.prod(x.shape[1:])) != mixture.d:
            raise ValueError(
                f"this mixture takes x of shape [B, ...] with {mixture.d} numbers a sample; given {list(x.shape)}"
            )
        self.shape, self.dtype = x.shape, x.dtype
        self.work = jnp.promote_types(x.dtype, jnp.float32)
        if not jnp.issubdtype(self.work, jnp.floating):
            raise ValueError(f"this mixture takes x of a real floating dtype; given {x.dtype}")
        x = x.reshape(x.shape[0], mixture.d).astype(self.work)

        alpha, sigma = self.column(process.alpha(t)), self.column(process.sigma(t))
        self.norm = jnp.sqrt(alpha**2 + sigma**2)
        self.alpha, self.sigma = alpha / self.norm, sigma / self.norm
        self.means, self.scales, self.bases = (
            jnp.asarray(a, self.work) for a in (mixture.means, mixture.scales, mixture.bases)
        )
        # [K, d], or [B, K, d] for times [B].
        self.variance = jnp.maximum(
            (self.alpha**2)[..., None] * self.scales + (self.sigma**2)[..., None], _SMALLEST_VARIANCE
        )
        means = jnp.einsum("ki,kij->kj", self.means, self.bases, precision="highest")
        local = jnp.einsum("bi,kij->bkj", x / self.norm, self.bases, precision="highest")
        self.local = local - self.alpha[..., None] * means
        distance2 = jnp.sum(self.local**2 / self.variance, -1)
        self.logits = mixture._log_weights(cond, self.work) - 0.5 * (distance2 + jnp.sum(jnp.log(self.variance), -1))

    def column(self, value: Array) -> Array:
        """A function of time with an axis for the components: [] stays as it is, [B] becomes [B, 1]."""
        value = jnp.asarray(value, self.work)
        return value[:, None] if value.ndim else value

    def combine(self, mean_weight: Array, gain: Array) -> Array:
        """Σ_k r_k (mean_weight μ_k + U_k gain_k y_k), y_k of x over its norm, in the shape and dtype of x."""
        posterior = jax.nn.softmax(self.logits, -1)
        pull = posterior[..., None] * gain * self.local
        mean = jnp.matmul(posterior, self.means, precision="highest")
        total = mean_weight * mean + jnp.einsum("bkj,kij->bi", pull, self.bases, precision="highest")
        return total.reshape(self.shape).astype(self.dtype)


@jax.jit
def _place(means, scales, bases, modes, noise):
    """μ_k + U_k √Λ_k z for every mode k [n] and noise z [n, d]."""

    def one(mode_and_noise):
        mode, z = mode_and_noise
        return means[mode] + jnp.matmul(bases[mode], jnp.sqrt(scales[mode]) * z, precision="highest")

    # In batches: n gathered bases at once would be [n, d, d].
    return jax.lax.map(one, (modes, noise), batch_size=max(256, 2**20 // means.shape[1] ** 2))


@dataclass(frozen=True)
class _Denoise:
    """The `apply` of a mixture's net: `rest` is the mixture."""

    process: Process

    def __call__(self, params, rest: Mixture, x, t, cond, *, s=None, key=None) -> Array:
        del params, s, key
        return rest.denoise(self.process, x, t, cond)


def as_teacher(mixture: Mixture, process: Process) -> Net:
    """The mixture's exact denoiser as a `Net` without parameters, for x [B, ...], t [] or [B] and labels cond."""
    return Net(params={}, rest=jax.tree.map(jnp.asarray, mixture), apply=_Denoise(process))


def _named(weights, means, covariances):
    return (weights, "weights"), (means, "means"), (covariances, "covariances")


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    bad = array.size - np.isfinite(array).sum()
    if bad:
        raise ValueError(f"{name} must be finite; {bad} of {array.size} values are NaN or infinite")
    return array


def _numbers(file: Any, key: str) -> np.ndarray:
    try:
        return file[key]
    except ValueError as error:  # which numpy says in words of pickles
        raise ValueError(f"{key} holds objects: save it as an array of numbers, of float64 for example") from error


def _check_labels(labels: np.ndarray, k: int) -> np.ndarray:
    if labels.shape != (k,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be {k} integers, one for each component; given {labels.dtype} of shape {list(labels.shape)}"
        )
    absent = np.setdiff1d(np.arange(max(labels.max(), 0) + 1), labels)
    if labels.min() < 0 or absent.size:
        fault = f"{labels.min()} is given" if labels.min() < 0 else f"class {absent[0]} has no component"
        raise ValueError(f"labels must be class numbers from 0 on, each used by some component; {fault}")
    return labels.astype(np.int32)


def _check_cond(cond: ArrayLike, num_classes: int) -> Array:
    if not isinstance(cond, jax.core.Tracer):
        values = np.asarray(cond)
        integer = np.issubdtype(values.dtype, np.integer)
        if not integer or (values.size and (values.min() < -1 or values.max() > num_classes)):
            given = f"{values.min()} to {values.max()}" if integer and values.size else str(values.dtype)
            raise ValueError(
                f"labels must be integers from 0 to {num_classes - 1}, or {num_classes} or -1 for no class; "
                f"given {given}"
            )
    return jnp.asarray(cond)
