import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddistill import grids, process
from ddistill import integrators as I
from ddistill.integrators.multistep import ancestral, steps_of
from ddistill.process import expand

DETERMINISTIC = {
    "euler": I.euler,
    "heun": I.heun,
    "rk4": I.rk4,
    "ddim": I.ddim,
    "dpm_solver_2": I.dpm_solver_2,
    "dpm_solver_3": I.dpm_solver_3,
    "dpmpp_2s": I.dpmpp_2s,
    "dpmpp_3s": I.dpmpp_3s,
    "dpmpp_2m": I.dpmpp_2m,
    "dpmpp_3m": I.dpmpp_3m,
    "unip": I.unip,
    "unipc": functools.partial(I.unipc, order=3),
    "deis": I.deis,
    "deis_log": functools.partial(I.deis, log_rho=True),
}
STOCHASTIC = {
    "ddim_eta": functools.partial(I.ddim, eta=0.7),
    "ddpm": I.ddpm,
    "ddpm_large": functools.partial(I.ddpm, variance=1.0),
    "sde_dpmpp_2m": I.sde_dpmpp_2m,
    "sde_dpmpp_2m_heun": functools.partial(I.sde_dpmpp_2m, heun=True),
    "euler_maruyama": I.euler_maruyama,
    "heun_churn": functools.partial(I.heun_churn, churn=2.0, churn_max=math.inf),
    "predictor_corrector": I.predictor_corrector,
    "predictor_corrector_ancestral": functools.partial(I.predictor_corrector, predictor=I.ancestral),
}
ALL = DETERMINISTIC | STOCHASTIC

MEANS = np.array([[1.0, 0.5], [-1.0, 0.2], [0.1, -0.9]])
WIDTHS = np.array([0.4, 0.5, 0.6])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def mixture(proc):
    """E[x0 | x_t] of Σ_k w_k N(μ_k, τ_k² I) in the plane."""

    def denoise(x, t):
        alpha, sigma = expand(proc.alpha(t), x)[..., None], expand(proc.sigma(t), x)[..., None]
        mu, width = jnp.asarray(MEANS, x.dtype), jnp.asarray(WIDTHS, x.dtype)[:, None]
        total = (alpha * width) ** 2 + sigma**2  # [B, K, 1]
        away = x[:, None] - alpha * mu
        log_r = jnp.log(jnp.asarray(WEIGHTS, x.dtype)) - jnp.log(total[..., 0]) - 0.5 * jnp.sum(away**2 / total, -1)
        r = jax.nn.softmax(log_r, axis=-1)[..., None]
        return jnp.sum(r * (mu + alpha * width**2 / total * away), axis=1)

    return denoise


def gaussian(proc, c):
    """E[x0 | x_t] for x0 ~ N(0, c²)."""

    def denoise(x, t):
        alpha, sigma = expand(proc.alpha(t), x), expand(proc.sigma(t), x)
        return alpha * c**2 / (alpha**2 * c**2 + sigma**2) * x

    return denoise


def variance(proc, c, t):
    t = jnp.asarray(t)
    return np.asarray(proc.alpha(t) ** 2 * c**2 + proc.sigma(t) ** 2)


@functools.partial(jax.jit, static_argnames=("f", "proc", "model"))
def run(f, proc, grid, x, key=None, model=mixture):
    return f(model(proc), proc, grid, x, key)


@functools.cache
def exact(start, end):
    """The flow of the mixture under the VP process between two times, by scipy."""
    from scipy.integrate import solve_ivp

    proc = process.vp()
    x = np.random.default_rng(0).normal(size=(4, 2)) * float(proc.sigma(start))
    velocity = jax.jit(lambda t, y: proc.velocity(mixture(proc)(y, jnp.full(4, t)), y, jnp.full(4, t)))
    solution = solve_ivp(
        lambda t, y: np.asarray(velocity(t, y.reshape(4, 2))).ravel(),
        (start, end),
        x.ravel(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    )
    return x, solution.y[:, -1].reshape(4, 2)


def lambda_nodes(proc, n, start, end, halvings=0):
    """n steps uniform in λ, the first of them split at its halves so that a low-order start weighs nothing."""
    lam = np.linspace(*np.asarray(proc.half_log_snr(np.array([start, end]))), n + 1)
    split = lam[0] + (lam[1] - lam[0]) * 2.0 ** -np.arange(halvings, 0, -1)
    lam = np.concatenate([lam[:1], split, lam[1:]])
    return np.asarray(proc.time_of(lam))


def slope(errors):
    return np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))


def multistep(f, **options):
    return functools.partial(f, lower_order_final=False, **options)


ORDERS = [
    ("ddim", I.ddim, 1, 0.25),
    ("dpm_solver_2", I.dpm_solver_2, 2, 0.25),
    ("dpm_solver_3", I.dpm_solver_3, 3, 0.25),
    ("dpmpp_2s", I.dpmpp_2s, 2, 0.25),
    ("dpmpp_3s", I.dpmpp_3s, 3, 0.25),
    ("dpmpp_2m", multistep(I.dpmpp_2m), 2, 0.25),
    ("dpmpp_2m_heun", multistep(I.dpmpp_2m, heun=True), 2, 0.25),
    ("dpmpp_3m", multistep(I.dpmpp_3m), 3, 0.4),
    ("dpmpp_3m_kappa1", multistep(I.dpmpp_3m, kappa=1.0), 2, 0.4),
    ("unip_1", multistep(I.unip, order=1), 1, 0.25),
    ("unip_2", multistep(I.unip, order=2), 2, 0.25),
    ("unip_3", multistep(I.unip, order=3), 3, 0.25),
    ("unipc_1", multistep(I.unipc, order=1), 2, 0.25),
    ("unipc_2", multistep(I.unipc, order=2), 3, 0.25),
    ("unipc_2_bh1", multistep(I.unipc, order=2, bh1=True), 3, 0.25),
    ("unipc_3", multistep(I.unipc, order=3), 4, 0.25),
    ("deis_2", multistep(I.deis, order=2), 2, 0.25),
    ("deis_3", multistep(I.deis, order=3), 3, 0.25),
    ("deis_4", multistep(I.deis, order=4), 4, 0.25),
    ("deis_3_log", multistep(I.deis, order=3, log_rho=True), 3, 0.25),
]


def errors_of(f, nodes_of, start=0.7, end=0.1):
    x, y = exact(start, end)
    return [float(np.abs(run(f, process.vp(), nodes_of(n), x).x - y).max()) for n in (80, 160)]


@pytest.mark.parametrize(("f", "order", "slack"), [o[1:] for o in ORDERS], ids=[o[0] for o in ORDERS])
def test_order_in_lambda(x64, f, order, slack):
    proc = process.vp()
    rates = slope(errors_of(f, lambda n: lambda_nodes(proc, n, 0.7, 0.1, halvings=16)))
    assert abs(rates[-1] - order) < slack


T_ORDERS = [
    ("euler", I.euler, 1),
    ("heun", I.heun, 2),
    ("ralston", functools.partial(I.heun, mid=2 / 3), 2),
    ("midpoint", functools.partial(I.heun, mid=0.5), 2),
    ("rk4", I.rk4, 4),
]


@pytest.mark.parametrize(("f", "order"), [o[1:] for o in T_ORDERS], ids=[o[0] for o in T_ORDERS])
def test_order_in_t(x64, f, order):
    rates = slope(errors_of(f, lambda n: np.linspace(0.7, 0.1, n + 1)))
    assert abs(rates[-1] - order) < 0.25


def quiet_noise(monkeypatch):
    """Replace the noise of step i by one of sample i alone, so that a linear sampler shows its gains."""
    monkeypatch.setattr(jax.random, "split", lambda key, n: jnp.arange(n) if isinstance(key, str) else jnp.full(n, key))
    monkeypatch.setattr(
        jax.random,
        "normal",
        lambda key, shape, dtype: jnp.broadcast_to((jnp.arange(shape[0]) == key)[:, None], shape).astype(dtype),
    )


@pytest.mark.parametrize(
    ("f", "order"),
    [
        (I.ddpm, 1),
        (functools.partial(I.ddpm, variance=1.0), 1),
        (functools.partial(I.ddim, eta=0.6), 1),
        (I.euler_maruyama, 1),
        (functools.partial(I.predictor_corrector, corrections=0), 1),
        (functools.partial(I.sde_dpmpp_2m, lower_order_final=False), 2),
        (functools.partial(I.sde_dpmpp_2m, heun=True, lower_order_final=False), 2),
        (functools.partial(I.sde_dpmpp_2m, eta=0.5, heun=True, lower_order_final=False), 2),
        (functools.partial(I.heun_churn, churn=0.4, churn_max=math.inf, noise_scale=1.0), 2),
    ],
    ids=["ddpm", "ddpm_large", "ddim", "em", "reverse", "sde_2m", "sde_2m_heun", "sde_2m_eta", "churn"],
)
def test_weak_order(x64, monkeypatch, f, order):
    """On Gaussian data a sampler is linear: the variance it ends with is the sum of its squared gains."""
    proc, c, start, end = process.vp(), 0.5, 0.6, 0.15
    quiet_noise(monkeypatch)
    errors = []
    for n in (80, 160):
        first = jnp.zeros((n + 1, 1)).at[n].set(math.sqrt(variance(proc, c, start)))
        grid = lambda_nodes(proc, n, start, end)
        key = "numbers the steps"
        out = jax.jit(lambda g, x, key=key: f(gaussian(proc, c), proc, g, x, key).x)(grid, first)
        errors.append(abs(float(jnp.sum(out**2)) - float(variance(proc, c, end))))
    assert abs(slope(errors)[-1] - order) < 0.25


PROCESSES = {
    "flow": process.flow(),
    "vp": process.vp(),
    "edm": process.edm(),
    "trig": process.trig(1.0),
    "cosine": process.cosine(),
    "discrete": process.discrete_vp(process.linear_betas(50)),
}


@pytest.mark.parametrize("proc", PROCESSES.values(), ids=PROCESSES)
def test_ddim_on_a_gaussian_is_a_product(x64, proc):
    c, x = 0.7, jnp.ones((2, 3))
    grid = grids.uniform(proc, 5)
    alpha, sigma = np.asarray(proc.alpha(grid)), np.asarray(proc.sigma(grid))
    factor = (alpha[:-1] * alpha[1:] * c**2 + sigma[:-1] * sigma[1:]) / (alpha[:-1] ** 2 * c**2 + sigma[:-1] ** 2)
    out = run(I.ddim, proc, grid, x, model=functools.partial(gaussian, c=c))
    np.testing.assert_allclose(out.x, np.prod(factor), rtol=1e-9)


def test_heun_on_a_gaussian_is_a_product(x64):
    proc, c = process.edm(), 0.7
    grid = grids.karras(proc, 6)
    expected = 1.0
    for t, s in itertools.pairwise(grid):
        here, ahead, step = t / (c**2 + t**2), s / (c**2 + s**2), s - t
        last = s == 0
        expected *= 1 + step * here if last else 1 + step / 2 * (here + ahead * (1 + step * here))
    out = run(I.heun, proc, grid, jnp.ones((2, 3)), model=functools.partial(gaussian, c=c))
    np.testing.assert_allclose(out.x, expected, rtol=1e-10)
    assert out.nfe == 11


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "dpmpp_3s", "unipc", "deis", "deis_log", "heun"])
def test_gaussian_flow_down_to_the_data(x64, name):
    """Φ scales a Gaussian by the ratio of its widths; the last step, to σ = 0, is of first order and small."""
    proc, c = process.edm(), 0.7
    out = run(
        DETERMINISTIC[name],
        proc,
        grids.karras(proc, 60),
        jnp.full((1, 2), 80.0),
        model=functools.partial(gaussian, c=c),
    )
    np.testing.assert_allclose(out.x, 80 * c / math.sqrt(c**2 + 80**2), rtol=1e-2)


def same(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a.x, b.x, atol=tolerance, rtol=tolerance)


def test_identities(x64):
    key, proc = jax.random.key(3), process.vp()
    grid = grids.uniform(proc, 6)
    x = proc.prior(jax.random.key(0), (3, 2), jnp.float64)
    go = functools.partial(run, proc=proc, grid=grid, x=x, key=key)
    same(go(functools.partial(I.ddim, eta=1.0)), go(I.ddpm))
    same(go(functools.partial(I.sde_dpmpp_2m, eta=0.0)), go(I.dpmpp_2m))
    same(go(functools.partial(I.unip, order=2)), go(I.dpmpp_2m))
    same(go(functools.partial(I.unip, order=3)), go(I.dpmpp_3m))
    for first in (functools.partial(I.deis, order=1), functools.partial(I.unip, order=1)):
        same(go(first), go(I.ddim))
    once = functools.partial(run, proc=proc, grid=np.array([0.8, 0.3]), x=x, key=key)
    same(once(I.sde_dpmpp_2m), once(I.ddpm))


@pytest.mark.parametrize("proc", [process.flow(), process.edm()], ids=["flow", "edm"])
def test_euler_is_ddim_where_the_process_is_linear(x64, proc):
    grid = grids.uniform(proc, 6)
    x = proc.prior(jax.random.key(0), (3, 2), jnp.float64)
    same(run(I.euler, proc, grid, x), run(I.ddim, proc, grid, x))
    same(run(functools.partial(I.heun_churn, churn=0.0), proc, grid, x, jax.random.key(0)), run(I.heun, proc, grid, x))


def test_ddim_is_euler_in_rho(x64):
    proc = process.vp()
    grid = grids.uniform(proc, 6)
    x = proc.prior(jax.random.key(0), (3, 2), jnp.float64)
    rho = np.asarray(proc.rho(grid))
    y = np.asarray(x / proc.alpha(grid[0]))
    for i, t in enumerate(grid[:-1]):
        at = jnp.asarray(y) * proc.alpha(t)
        y = y + (rho[i + 1] - rho[i]) * np.asarray(proc.eps(mixture(proc)(at, jnp.full(3, t)), at, t))
    np.testing.assert_allclose(run(I.ddim, proc, grid, x).x, y, rtol=1e-9)


def test_predictor_corrector_is_that_of_score_sde(x64, monkeypatch):
    betas = process.linear_betas(4, 0.05, 0.3)
    proc, snr = process.discrete_vp(betas), 0.16
    denoise = mixture(proc)
    x = jax.random.normal(jax.random.key(0), (5, 2), jnp.float64)
    z = jax.random.normal(jax.random.key(1), (5, 2), jnp.float64)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: z)
    call = jax.jit(lambda x, key: I.predictor_corrector(denoise, proc, np.arange(4.0, -1, -1), x, key, snr=snr))
    out = call(x, jax.random.key(0))

    def norm(v):
        return np.linalg.norm(v, axis=1).mean()

    def score(x, t):
        return np.asarray(proc.score(denoise(x, jnp.full(5, float(t))), x, float(t)))

    y = np.asarray(x)
    for t in (4, 3, 2, 1):
        beta = betas[t - 1]
        grad = score(y, t)
        size = 2 * (1 - beta) * (snr * norm(np.asarray(z)) / norm(grad)) ** 2
        y = y + size * grad + np.sqrt(2 * size) * z
        forward = np.sqrt(1 - beta) * y - y
        y = y - forward + beta * score(y, t)
        y = y + np.sqrt(beta) * z if t > 1 else y
    np.testing.assert_allclose(out.x, y, rtol=1e-9)
    assert out.nfe == 8


EVALUATIONS = {"heun": (2, 1), "rk4": (4, 1), "dpm_solver_2": (2, 2), "dpm_solver_3": (3, 2)} | {
    "dpmpp_2s": (2, 2),
    "dpmpp_3s": (3, 2),
}
COLUMNS = np.array([[1.0, 0.7, 0.4, 0.2, 0.0], [0.9, 0.8, 0.5, 0.3, 0.1], [0.6, 0.5, 0.3, 0.1, 0.0]]).T


@pytest.mark.parametrize("name", ALL)
def test_ends_are_finite_and_nodes_may_differ_between_samples(x64, name):
    """Flow has α = 0 at t = 1 and σ = 0 at t = 0: values and gradients are finite, and samples keep to their grids."""
    f, proc, key = ALL[name], process.flow(), jax.random.key(7)
    x = jax.random.normal(jax.random.key(0), (3, 2), jnp.float64)
    weigh = jax.random.normal(jax.random.key(1), x.shape, x.dtype)

    @jax.jit
    def both(x, grid):
        def loss(x):
            out = f(mixture(proc), proc, grid, x, key)
            return jnp.sum(weigh * out.x), out

        gradient, out = jax.grad(loss, has_aux=True)(x)
        return gradient, out

    gradient, out = both(x, COLUMNS)
    assert np.all(np.isfinite(gradient)) and np.all(np.isfinite(out.x)) and np.any(gradient != 0)
    if name not in DETERMINISTIC:
        return
    evaluations, singular = EVALUATIONS.get(name, (1, 0))
    assert out.nfe == 4 * evaluations
    for i, alone in enumerate(COLUMNS.T):
        one = run(f, proc, alone, x[i : i + 1])
        np.testing.assert_allclose(one.x[0], out.x[i], rtol=1e-9, atol=1e-12)
        skipped = {0: singular, 1: 0, 2: min(singular, 1)}[i]
        assert one.nfe == 4 * evaluations - skipped * (evaluations - 1)


@pytest.mark.parametrize("name", ["ddpm", "euler_maruyama", "heun_churn", "predictor_corrector"])
def test_scalar_grid_of_flow_is_finite_from_noise_to_data(name):
    proc = process.flow()
    x = proc.prior(jax.random.key(0), (3, 2))
    out = run(STOCHASTIC[name], proc, grids.uniform(proc, 4), x, jax.random.key(1))
    assert out.x.dtype == jnp.float32 and np.all(np.isfinite(out.x))
    per_step = {"heun_churn": 7, "predictor_corrector": 8}
    assert out.nfe == per_step.get(name, 4)


@pytest.mark.parametrize("name", ["rk4", "dpmpp_3s", "deis", "dpm_solver_2", "unipc"])
def test_inversion_returns(x64, name):
    proc = process.vp()
    x, _ = exact(0.7, 0.1)
    grid = lambda_nodes(proc, 40, 0.7, 0.1)
    down = run(DETERMINISTIC[name], proc, grid, x).x
    up = run(DETERMINISTIC[name], proc, grid[::-1].copy(), down).x
    assert np.abs(down - x).max() > 0.1
    np.testing.assert_allclose(up, x, atol=5e-3)


SHARDED = ["ddim", "heun", "unipc", "dpm_solver_2", "ddpm", "heun_churn", "predictor_corrector"]


@pytest.fixture(scope="module")
def devices():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.devices()[:8]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_inputs(devices, x64, name):
    proc = process.vp()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    x, grid = proc.prior(jax.random.key(0), (16, 2), jnp.float64), grids.uniform(proc, 4)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    out = run(ALL[name], proc, grid, sharded, jax.random.key(1))
    assert len(out.x.sharding.device_set) == 8
    whole = run(ALL[name], proc, grid, x, jax.random.key(1))
    same(out, whole)
    assert out.nfe == whole.nfe


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "ddpm"])
def test_pmap(devices, name):
    proc = process.vp()
    x, grid = proc.prior(jax.random.key(0), (16, 2)), grids.uniform(proc, 4)
    keys = jax.random.split(jax.random.key(1), 8)
    shards = x.reshape(8, 2, 2)
    out = jax.pmap(lambda x, key: ALL[name](mixture(proc), proc, grid, x, key))(shards, keys)
    for i in range(8):
        one = run(ALL[name], proc, grid, shards[i], keys[i])
        np.testing.assert_allclose(out.x[i], one.x, rtol=1e-5, atol=1e-5)
        assert out.nfe[i] == one.nfe
    if name in DETERMINISTIC:
        np.testing.assert_allclose(out.x.reshape(16, 2), run(ALL[name], proc, grid, x).x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "sde_dpmpp_2m", "heun_churn"])
def test_vmap_over_keys(name):
    proc = process.vp()
    x, grid = proc.prior(jax.random.key(0), (2, 2)), grids.uniform(proc, 4)
    keys = jax.random.split(jax.random.key(1), 3)
    out = jax.jit(jax.vmap(lambda key: ALL[name](mixture(proc), proc, grid, x, key)))(keys)
    for i in range(3):
        one = run(ALL[name], proc, grid, x, keys[i])
        np.testing.assert_allclose(out.x[i], one.x, rtol=1e-5, atol=1e-5)
        assert out.nfe[i] == one.nfe
    assert not np.allclose(out.x[0], out.x[1])


def test_churn_raises_the_noise_where_told(x64):
    """One step of a denoiser that answers 0 scales x by (ρ_s/ρ̂); with data at 0 the spread of x̂ shows γ."""
    proc, key = process.edm(), jax.random.key(0)
    x = jnp.zeros((2000, 1))

    def spread(**options):
        f = functools.partial(I.heun_churn, lambda x, t: 0 * x, proc, np.array([2.0, 1.0]), noise_scale=1.5, **options)
        out = jax.jit(f)(x, key)
        return float(jnp.std(out.x))

    sampled = float(jnp.std(jax.random.normal(jax.random.split(key, 1)[0], x.shape, x.dtype)))
    for churn, gamma in ((5.0, math.sqrt(2) - 1), (0.3, 0.3)):  # of one step
        # for D = 0, d = x/t exactly, so Heun carries x̂ from t̂ to s by 1 + Δ/2 (1/t̂ + (1 + Δ/t̂)/s)
        hat = 2 * (1 + gamma)
        carried = 1 + (1 - hat) / 2 * (1 / hat + (1 + (1 - hat) / hat) / 1.0)
        expected = 1.5 * math.sqrt(hat**2 - 4) * abs(carried) * sampled
        assert spread(churn=churn) == pytest.approx(expected, rel=1e-9)
    assert spread(churn=5.0, churn_min=3.0) == 0 and spread(churn=5.0, churn_max=1.9) == 0
    assert spread(churn=0.1) < spread(churn=0.2) < spread(churn=5.0)


@pytest.mark.parametrize("f", [I.dpmpp_2m, I.dpmpp_3m, I.deis], ids=["dpmpp_2m", "dpmpp_3m", "deis"])
@pytest.mark.parametrize("steps", [14, 15])
def test_the_last_steps_are_of_lower_order_where_there_are_fewer_than_15(x64, f, steps):
    proc, grid = process.vp(), np.linspace(0.9, 0.1, steps + 1)
    x = jax.random.normal(jax.random.key(0), (3, 2), jnp.float64)
    lower, same_order = run(f, proc, grid, x).x, run(functools.partial(f, lower_order_final=False), proc, grid, x).x
    assert np.array_equal(lower, same_order) == (steps == 15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("f", [I.unipc, I.heun, I.ddpm], ids=["unipc", "heun", "ddpm"])
def test_dtype_of_x_is_kept(x64, f, dtype):
    proc = process.vp()
    seen = []

    def denoise(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return mixture(proc)(x, t)

    call = jax.jit(lambda x, key: f(denoise, proc, grids.uniform(proc, 3), x, key))
    out = call(jnp.ones((4, 2), dtype), jax.random.key(0))
    assert out.x.dtype == dtype and out.nfe.dtype == jnp.int32
    assert set(seen) == {(jnp.dtype(dtype), jnp.dtype(dtype), (4,))}


def test_errors_at_the_border():
    proc, x = process.vp(), jnp.ones((3, 2))
    good = np.linspace(1, 0, 4)
    with pytest.raises(ValueError, match="key"):
        I.ddpm(mixture(proc), proc, good, x)
    for name, f in STOCHASTIC.items():
        with pytest.raises(ValueError, match="backwards"):
            f(mixture(proc), proc, good[::-1].copy(), x, jax.random.key(0))
        with pytest.raises(ValueError, match="key"):
            f(mixture(proc), proc, good, x)
        assert name
    for bad, words in [
        (np.array([1.0]), r"\[N \+ 1\]"),
        (np.ones((4, 2)), r"\[N \+ 1, 3\]"),
        (np.array([1.0, 0.5, 0.5, 0.0]), "monotone"),
        (np.array([0.5, 1.0, 0.2]), "monotone"),
        (np.array([1.5, 0.0]), "outside"),
        (np.array([1.0, np.nan]), "outside"),
    ]:
        with pytest.raises(ValueError, match=words):
            I.ddim(mixture(proc), proc, bad, x)
    for f in (I.unipc, I.unip, I.deis):
        with pytest.raises(ValueError, match="order"):
            f(mixture(proc), proc, good, x, order=0)


def test_denoiser_may_be_an_argument_of_jit_and_is_differentiable(x64):
    """d/dc of DDIM's product on Gaussian data, with the denoiser a pytree and not a closure."""
    proc, grid = process.flow(), np.array([0.8, 0.3, 0.0])
    net = jax.tree_util.Partial(lambda c, x, t: gaussian(proc, c)(x, t), jnp.asarray(0.7))
    slope_of = jax.jit(jax.grad(lambda net, x: I.ddim(net, proc, grid, x).x[0, 0]))

    def product(c):
        first = ((0.2 * 0.7) * c**2 + 0.8 * 0.3) / (0.2**2 * c**2 + 0.8**2)
        return first * 0.7 * c**2 / (0.7**2 * c**2 + 0.3**2)

    expected = (product(0.7 + 1e-6) - product(0.7 - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope_of(net, jnp.ones((1, 1))).args[0], expected, rtol=1e-7)


def test_the_variance_between_the_posteriors_and_the_forward_ones_is_their_geometric_mean(x64):
    st = steps_of(process.vp(), jnp.asarray([1.0, 0.6, 0.2, 0.05]))
    small, middle, large = (ancestral(st, v).c for v in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(middle**2, small * large, rtol=1e-10)  # β̃^{1−v} β^v (Nichol & Dhariwal 2021, eq. 15)
    assert np.all(small < large)


@pytest.mark.parametrize(
    "integrator",
    [
        I.ddim, I.dpmpp_3s,
        *(functools.partial(f, lower_order_final=False) for f in (I.dpmpp_2m, I.dpmpp_3m, I.deis, I.unip)),
    ],
    ids=["ddim", "3s", "2m", "3m", "deis", "unip"],
)  # fmt: skip
def test_equal_nodes_are_no_step_after_which_a_method_begins_anew(integrator, x64):
    def denoise(x, t):
        return 0.3 * jnp.sin(x) / (1 + expand(t, x))

    solve = jax.jit(lambda grid, x: integrator(denoise, process.edm(), grid, x).x)
    x = 3 * jax.random.normal(jax.random.key(0), (5, 2))
    above, below = jnp.asarray([9.0, 6.0, 4.0, 2.5]), jnp.asarray([2.5, 1.5, 0.8, 0.3])
    whole = solve(jnp.concatenate([above, below]), x)
    np.testing.assert_allclose(whole, solve(below, solve(above, x)), rtol=1e-8)
