"""Stochastic samplers: Euler–Maruyama, EDM's churned Heun, predictor–corrector; ancestral ones are multistep's.

Contract and errors are those of `ddistill.integrators.multistep`. All run from the noise to the data and need a key;
`ddpm`, `ddim` with eta > 0 and `sde_dpmpp_2m` are linear methods and live there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators.multistep import Steps, ancestral, steps_of
from ddistill.integrators.scan import Denoise, Linear, Solution, check_grid, linear, per_sample, step_keys
from ddistill.integrators.single_step import euler_jump, heun_jump, single_step
from ddistill.process import Process, expand, safe_divide


def euler_maruyama(denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None) -> Solution:
    """Euler–Maruyama on the reverse SDE dx = (f x − g² score) dt + g dw̄ (Song et al. 2021), weak and strong order one.

    From α = 0, where f and g are infinite, the step is DDPM's; a step to σ = 0 returns its mean.
    """
    nodes = check_grid(process, grid, x, descending=True)
    keys = step_keys(key, len(nodes) - 1, "euler_maruyama")
    st = steps_of(process, nodes)
    step, f = st.t - st.s, process.alpha_prime(st.t) / st.alpha_t
    g2 = 2 * st.sigma_t * process.sigma_prime(st.t) - 2 * f * st.sigma_t**2
    # x − (f x − g² score) Δ + g √Δ z, with score = (α x̂0 − x)/σ²
    pull = step * g2 / st.sigma_t**2
    std = jnp.where(st.sigma_s == 0, 0.0, jnp.sqrt(step * g2))
    rule = _from_noise(st, Linear(1 - step * f - pull, (pull * st.alpha_t,), std))
    return linear(denoise, process, nodes, x, rule, keys)


def heun_churn(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    churn: float = 40.0,
    churn_min: float = 0.05,
    churn_max: float = 50.0,
    noise_scale: float = 1.003,
    mid: float = 1.0,
) -> Solution:
    """EDM's stochastic sampler (Karras et al. 2022, alg. 2): noise is raised by a factor 1 + γ, then a `heun` step.

    γ = min(churn/N, √2 − 1) where ρ lies in [churn_min, churn_max] (S_churn, S_min, S_max; those of ImageNet-64 by
    default), else 0; noise_scale is S_noise. On processes with α ≠ 1 it is ρ = σ/α that is raised, on all at most to
    that of t_max. γ is O(1/N), so the weak order is two. churn = 0 is `heun`.
    """
    nodes = check_grid(process, grid, x, descending=True)
    n = len(nodes) - 1
    keys = step_keys(key, n, "heun_churn")
    most = min(churn / n, 2**0.5 - 1)

    def lift(x, t, key):
        lam = process.half_log_snr(t)
        raised = jnp.minimum(process.time_of(lam - jnp.log1p(most)), process.t_max)
        inside = (jnp.exp(-lam) >= churn_min) & (jnp.exp(-lam) <= churn_max) & (raised > t)
        low, high = jnp.where(inside, t, 0.5 * process.t_max), jnp.where(inside, raised, 0.5 * process.t_max)
        noise = noise_scale * jax.random.normal(key, x.shape, x.dtype)
        return jnp.where(expand(inside, x), process.renoise(x, noise, low, high), x), jnp.where(inside, raised, t)

    jump, simple = heun_jump(process, mid), euler_jump(process)
    return single_step(denoise, process, nodes, x, jump, simple, 2, lift=lift, keys=keys)


def reverse_diffusion(st: Steps) -> Linear:
    """Coefficients of score_sde's predictor: the forward step's own f and G, reversed (Song et al. 2021, eq. 46).

    From α = 0, where the forward step forgets all, it is `ancestral`.
    """
    scale = st.alpha_t / st.alpha_s
    g2 = st.sigma_t**2 * jnp.clip(1 - st.decay**2, 0.0)
    # x − f + G² score + G z with f = (α_t/α_s − 1) x and score = (α_t x̂0 − x)/σ_t²
    pull = safe_divide(g2, st.sigma_t**2)
    rule = Linear(2 - scale - pull, (pull * st.alpha_t,), jnp.where(st.sigma_s == 0, 0.0, jnp.sqrt(g2)))
    return _from_noise(st, rule)


def predictor_corrector(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    predictor: Callable[[Steps], Linear] = reverse_diffusion,
    snr: float = 0.16,
    corrections: int = 1,
) -> Solution:
    """Langevin corrections at each node, then a predictor to the next (Song et al. 2021, alg. 2 to 5).

    predictor: `reverse_diffusion` or `ancestral`, coefficients of a first-order method. snr: signal-to-noise ratio of
    a correction, which steps by 2 (α_t/α_s)² (snr ‖z‖/‖score‖)², norms averaged over the batch (of the device, under
    pmap); so at α = 0 none happens. A step to σ = 0 returns its mean. (corrections + 1) N evaluations.
    """
    nodes = check_grid(process, grid, x, descending=True)
    keys = step_keys(key, len(nodes) - 1, "predictor_corrector")
    st = steps_of(process, nodes)
    rule = predictor(st)

    def body(carry, step):
        x, nfe = carry
        t, scale, rule, key = step
        key, *others = jax.random.split(key, corrections + 1)
        for z_key in others:
            z = jax.random.normal(z_key, x.shape, x.dtype)
            score = process.score(denoise(x, per_sample(t, x)), x, t)
            root = scale * snr * _norm(z) / _norm(score)  # √(ε/2) of the step ε
            x = (x + expand(2 * root**2, x) * score + expand(2 * root, x) * z).astype(x.dtype)
        z = jax.random.normal(key, x.shape, x.dtype)
        x0 = denoise(x, per_sample(t, x))
        after = expand(rule.a, x) * x + expand(rule.b[0], x) * x0 + expand(rule.c, x) * z
        return (after.astype(x.dtype), nfe + corrections + 1), None

    scale = st.alpha_t / st.alpha_s
    (x, nfe), _ = jax.lax.scan(body, (x, jnp.int32(0)), (st.t, scale, rule, keys))
    return Solution(x, nfe)


def _from_noise(st: Steps, rule: Linear) -> Linear:
    return jax.tree.map(lambda first, other: jnp.where(st.alpha_t == 0, first, other), ancestral(st), rule)


def _norm(x: Array) -> Array:
    return jnp.mean(jnp.sqrt(jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)))
