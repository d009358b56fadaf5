"""Our samplers beside diffusers' schedulers, with one small network written in torch and in jax."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids, process
from ddistill import integrators as I
from ddistill.process import expand

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

N = 10
BETAS = process.scaled_linear_betas(1000, 1e-4, 0.02)
PROC = process.discrete_vp(BETAS)
_rng = np.random.default_rng(0)
A, B, C = _rng.normal(size=(3, 8)), _rng.normal(size=8), _rng.normal(size=(8, 2)) / 3
NOISE = _rng.normal(size=(4, 2))


def net_jax(x, t):
    at = jnp.broadcast_to(t, x.shape[:1])[:, None] / 1000
    return jnp.tanh(jnp.concatenate([x, at], axis=1) @ A + B) @ C


def net_torch(x, t):
    at = torch.full((len(x), 1), float(t), dtype=x.dtype) / 1000
    return torch.tanh(torch.cat([x, at], dim=1) @ torch.tensor(A) + torch.tensor(B)) @ torch.tensor(C)


def denoise(x, t, kind="v_prediction", proc=PROC):
    out = net_jax(x, t - 1)
    return proc.x0_from_v(out, x, t) if kind == "v_prediction" else proc.x0_from_eps(out, x, t)


def theirs(scheduler, start, noise=None, **set_timesteps):
    """Run a scheduler as its pipelines do; noise [N, ...] is handed to it step by step."""
    scheduler.set_timesteps(**(set_timesteps or {"num_inference_steps": N}))
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - BETAS))
    scales = float(getattr(scheduler, "init_noise_sigma", 1)) != 1
    x = torch.tensor(start)
    if scales:  # the state lives at x/α
        x = x * float((scheduler.sigmas[0] ** 2 + 1) ** 0.5)
    named = inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        out = net_torch(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        extra = {"variance_noise": torch.tensor(noise[i])} if noise is not None and "variance_noise" in named else {}
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x.numpy()


def nodes_of(scheduler):
    """The scheduler's own timesteps as our grid: index + 1, then the data, or the first index where σ ends above 0."""
    last = 1.0 if hasattr(scheduler, "sigmas") and scheduler.sigmas[-1] > 0 else 0.0
    return np.append(np.asarray(scheduler.timesteps, np.float64) + 1, last)


def ours(f, grid, key=None, kind="v_prediction"):
    run = jax.jit(lambda grid, x, key: f(functools.partial(denoise, kind=kind), PROC, grid, x, key).x)
    return np.asarray(run(grid, NOISE, key))


def make(name, kind="v_prediction", **options):
    return getattr(diffusers, name)(
        num_train_timesteps=1000, trained_betas=list(BETAS), prediction_type=kind, **options
    )


def noises(key):
    return np.stack([jax.random.normal(k, NOISE.shape, jnp.float64) for k in jax.random.split(key, N)])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(x64, kind, eta):
    key = jax.random.key(1)
    scheduler = make("DDIMScheduler", kind, clip_sample=False, timestep_spacing="leading")
    scheduler.step = functools.partial(scheduler.step, eta=eta)
    expected = theirs(scheduler, NOISE, noises(key))
    close(ours(functools.partial(I.ddim, eta=eta), nodes_of(scheduler), key, kind), expected)


@pytest.mark.parametrize(("kind", "variance"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_ddpm(x64, monkeypatch, kind, variance):
    key = jax.random.key(1)
    scheduler = make("DDPMScheduler", variance_type=kind, clip_sample=False, timestep_spacing="leading")
    drawn = iter(noises(key))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: torch.tensor(next(drawn)))
    expected = theirs(scheduler, NOISE)
    close(ours(functools.partial(I.ddpm, variance=variance), nodes_of(scheduler), key), expected)


SOLVERS = {
    "2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, I.dpmpp_2m),
    "2m_heun": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "solver_type": "heun"},
        functools.partial(I.dpmpp_2m, heun=True),
    ),
    "3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, functools.partial(I.dpmpp_3m, kappa=1.0)),
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2}, I.unipc),
    "unipc_2_bh1": (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},  # theirs is NaN at σ = 0
        functools.partial(I.unipc, bh1=True),
    ),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}, functools.partial(I.unipc, order=3)),
    "deis_2": ("DEISMultistepScheduler", {"solver_order": 2}, functools.partial(I.deis, order=2, log_rho=True)),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}, functools.partial(I.deis, log_rho=True)),
    "euler": ("EulerDiscreteScheduler", {}, I.ddim),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(x64, name):
    cls, options, f = SOLVERS[name]
    scheduler = make(cls, timestep_spacing="trailing", **options)
    expected = theirs(scheduler, NOISE)
    close(ours(f, nodes_of(scheduler)), expected)


@pytest.mark.parametrize("heun", [False, True])
def test_sde_dpmpp_2m(x64, heun):
    key = jax.random.key(1)
    scheduler = make(
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        solver_type="heun" if heun else "midpoint",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    expected = theirs(scheduler, NOISE, noises(key))
    close(ours(functools.partial(I.sde_dpmpp_2m, heun=heun), nodes_of(scheduler), key), expected)


def test_heun(x64):
    """Heun's scheduler integrates in ρ, the time of EDM: the network is asked at x α, where ρ is the same."""
    scheduler = make("HeunDiscreteScheduler", timestep_spacing="trailing")
    expected = theirs(scheduler, NOISE)
    sigmas = np.append(np.asarray(scheduler.sigmas, np.float64)[:-1:2], 0.0)
    edm = process.edm(sigmas[-2], sigmas[0])

    def in_edm(x, sigma):
        t = PROC.time_of(-jnp.log(sigma))
        return denoise(expand(PROC.alpha(t), x) * x, t)

    out = I.heun(in_edm, edm, sigmas, jnp.asarray(NOISE * (sigmas[0] ** 2 + 1) ** 0.5))
    close(out.x, expected)
    assert out.nfe == len(scheduler.timesteps) == 2 * N - 1


def test_flow_match_euler(x64):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    expected = theirs(scheduler, NOISE, sigmas=np.linspace(1, 1 / N, N))
    grid = grids.flow_shifted(N, 3.0)
    close(scheduler.sigmas, grid, 1e-6)
    flow = process.flow()

    def velocity_net(x, t):
        return flow.x0_from_velocity(net_jax(x, 1000 * t), x, t)

    close(I.euler(velocity_net, flow, grid, jnp.asarray(NOISE)).x, expected)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 10, 33, 50])
def test_index_grids(n):
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = make("DDIMScheduler", timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
        scheduler.set_timesteps(n)
        grid = grids.leading(PROC, n, offset=1) if spacing == "leading" else getattr(grids, spacing)(PROC, n)
        np.testing.assert_array_equal(grid, nodes_of(scheduler))
    for name, grid in (("LCMScheduler", grids.lcm), ("TCDScheduler", grids.tcd)):
        scheduler = make(name)
        scheduler.set_timesteps(n)
        np.testing.assert_array_equal(grid(PROC, n), nodes_of(scheduler))
    scheduler.set_timesteps(n, original_inference_steps=50)  # asked for by name, TCD takes any index
    np.testing.assert_array_equal(grids.tcd(PROC, n, origin=1000), nodes_of(scheduler))


def test_trig_grid():
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(2)
    close(grids.trig(2), scheduler.timesteps)
    scheduler.set_timesteps(5, intermediate_timesteps=None)
    close(grids.trig(5), scheduler.timesteps)
