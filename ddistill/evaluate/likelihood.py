"""How likely samples are under the teacher: its exact log-likelihood, made fit to compare samplers by."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.integrators.likelihood import log_likelihood
from ddistill.net import Net
from ddistill.process import Process


def bits_per_dimension(
    teacher: Net,
    process: Process,
    x: Array | np.ndarray,
    cond: Any = None,
    *,
    key: Array,
    noise: float = 0.05,
    probes: int = 4,
) -> float:
    """Mean negative log-likelihood of samples x [B, ...] under the teacher's probability flow, in bits per coordinate.

    The density is that of data to which Gaussian noise of standard deviation `noise`, in the data's units, was added,
    as it is to x. Without it the likelihood is one of the last decimals: a pixel that never varies has no bound, and
    what a jump leaves of its noise decides. Read it beside the teacher's own samples and held-out data, for lower is
    not better: blurred samples are more likely than data, and less varied. key: of the noise, which must not be the
    noise that x was sampled from. probes: random directions for the trace (`log_likelihood`), which leave the mean
    unbiased; the solver's tolerance is 1e-3.

    Raises ValueError for noise that is not positive, RuntimeError where the flow cannot be followed. Song et al. 2021,
    eq. 39.
    """
    if not noise > 0:
        raise ValueError(f"noise = {noise}: the likelihood is of samples with noise, such as 0.05")
    x = jnp.asarray(x)
    k_noise, k_probes = jax.random.split(key)
    t = float(process.time_of(jnp.asarray(-math.log(noise))))
    alpha, d = float(process.alpha(t)), math.prod(x.shape[1:])
    x_t = process.diffuse(x, jax.random.normal(k_noise, x.shape, x.dtype), t)
    denoise = teacher.bind(cond)
    log_p = log_likelihood(denoise, process, x_t, t=t, probes=probes, key=k_probes, rtol=1e-3, atol=1e-3)
    # x_t is α times the noised data, whose density is α^d times as high.
    nats = -np.mean(np.asarray(log_p, np.float64)) - d * math.log(alpha)
    return float(nats / (d * math.log(2)))
