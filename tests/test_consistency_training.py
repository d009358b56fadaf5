"""Consistency training against consistency distillation and closed forms for data N(0, c²)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from ddistill import grids
from ddistill.integrators import ddim, euler
from ddistill.losses.distances import L2
from ddistill.methods import Consistency
from ddistill.methods.base import Progress
from ddistill.methods.consistency_training import ConsistencyTraining, Doubling, Growing, Shrinking
from ddistill.net import Net
from ddistill.process import edm, flow, trig, vp, vp_cosine

C = 0.5
DATA = C * jax.random.normal(jax.random.key(0), (100_000, 1))


def fixed(t, s):
    """Neighbours that are the same two times always."""
    return lambda process, progress, key, count: (jnp.full(count, t), jnp.full(count, s))


def sloped(slopes):
    """A student x ↦ a(t) x, with a given at some times; its parameter scales the one of the latest."""
    times, values = (jnp.asarray(a) for a in zip(*sorted(slopes.items()), strict=True))

    def f(p, r, x, t, c, **k):
        return x * (jnp.where(t == times[-1], p, 1.0) * jnp.interp(t, times, values))[:, None]

    return Net(jnp.asarray(1.0), {}, f)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_of(config, process, student, x=DATA, progress=0):
    loss = config(process).losses["student"]
    return loss({"student": student}, {"x": x}, Progress(progress, 1), jax.random.key(1))[0]


@pytest.mark.parametrize(
    ("process", "solver"), [(edm(), euler), (flow(), euler), (vp(), ddim), (trig(), ddim), (vp_cosine(), ddim)],
    ids=lambda p: type(p.schedule).__name__ if hasattr(p, "schedule") else "",
)  # fmt: skip
def test_it_is_distillation_by_an_euler_step_with_x0_for_the_denoiser(process, solver):
    x = DATA[:512]
    student = Net({}, {}, lambda p, r, x, t, c, **k: jnp.tanh(x) * jnp.cos(t)[:, None])
    oracle = Net({}, {}, lambda p, r, x_t, t, c, **k: x)
    config = Consistency(intervals=17, max_intervals=17, solver=solver, solver_steps=1, between=False, distance=L2())
    nets = {"student": student, "teacher": oracle}
    distilled = config(process).losses["student"](nets, {"x": x}, Progress(0), jax.random.key(1))[0]
    trained = loss_of(ConsistencyTraining(Growing(18, 17), L2()), process, student, x)
    np.testing.assert_allclose(trained, distilled, rtol=2e-4)


def test_its_floor_and_its_optimum_on_gaussian_data():
    t, s, process = 2.0, 1.2, edm()
    a_s = C / np.sqrt(C**2 + s**2)
    euler_step = (C**2 + s * t) / (C**2 + t**2)
    student = sloped({s: a_s, t: a_s * euler_step})
    config = ConsistencyTraining(fixed(t, s), L2(), weighted=False)
    value, gradient = jax.value_and_grad(lambda p: loss_of(config, process, student.replace(params=p)))(1.0)
    floor = a_s**2 * ((t - s) / t) ** 2 * C**2 * t**2 / (C**2 + t**2)
    np.testing.assert_allclose(value, floor, rtol=0.02)
    # The optimum is distillation's, whose floor is 0; E x_t² = c² + t² sets the scale of the gradient's noise.
    scale = 2 * (a_s * euler_step) ** 2 * (C**2 + t**2)
    assert abs(float(gradient)) < 0.01 * scale
    worse = jax.grad(lambda p: loss_of(config, process, student.replace(params=p)))(1.1)
    np.testing.assert_allclose(worse, 0.1 * scale, rtol=0.1)
    weighted = loss_of(ConsistencyTraining(fixed(t, s), L2()), process, student)
    np.testing.assert_allclose(weighted, value / (t - s), rtol=1e-5)


def test_no_gradient_reaches_the_target_and_an_average_can_be_it():
    # f = a x: loss a² E (x_t − x_s)² = a² (t − s)², its gradient with a stopped target 2 a E x_t (x_t − x_s).
    t, s = 2.0, 1.2
    config = ConsistencyTraining(fixed(t, s), L2(), weighted=False)

    def student(a):
        return Net(a, {}, lambda p, r, x, t, c, **k: p * x)

    value, gradient = jax.value_and_grad(lambda a: loss_of(config, edm(), student(a)))(3.0)
    np.testing.assert_allclose([value, gradient], [9 * (t - s) ** 2, 6 * t * (t - s)], rtol=0.02)

    averaged = ConsistencyTraining(fixed(t, s), L2(), weighted=False, target_ema=0.9)(edm())
    assert averaged.ema["target"] == ("student", 0.9)
    nets = {"student": student(3.0), "target": student(0.0)}
    value, _ = averaged.losses["student"](nets, {"x": DATA}, Progress(0), jax.random.key(1))
    np.testing.assert_allclose(value, 9 * (C**2 + t**2), rtol=0.02)


def test_at_the_end_it_denoises():
    config = ConsistencyTraining(fixed(0.5, 0.0), L2(), weighted=False)
    # E ‖h x_t − x0‖² for the best h = c²/(c² + t²) is c² t²/(c² + t²).
    value, gradient = jax.value_and_grad(
        lambda a: loss_of(config, edm(), Net(a, {}, lambda p, r, x, t, c, **k: p * x))
    )(C**2 / (C**2 + 0.25))
    np.testing.assert_allclose(value, C**2 * 0.25 / (C**2 + 0.25), rtol=0.02)
    np.testing.assert_allclose(gradient, 0, atol=0.01)


def test_ct_grows_and_its_target_slows_on_schedule():
    law = Growing(2, 150)
    # ⌈√(k/K (151² − 4) + 4) − 1⌉ + 1, by hand: 2 at first, 107 at half, 151 at the end.
    assert [int(law.nodes(Progress(k, 1000))) for k in (0, 1, 100, 500, 999, 1000)] == [2, 6, 48, 107, 151, 151]
    for k, nodes in ((0, 2), (500, 107), (1000, 151)):
        np.testing.assert_allclose(law.target_decay(Progress(k, 1000), 0.9), 0.9 ** (2 / nodes), rtol=1e-6)
    assert ConsistencyTraining(law, target_ema=law.target_decay)(edm()).ema["target"] == ("student", law.target_decay)
    process = edm()
    assert np.asarray(law(process, Progress(0, 1000), jax.random.key(0), 8)).tolist() == [[80.0] * 8, [0.0] * 8]
    t, s = law(process, Progress(100, 1000), jax.random.key(0), 4000)
    nodes = np.asarray(grids.karras(process, 47))
    at = np.abs(np.asarray(t)[:, None] / nodes[:-1] - 1).argmin(1)
    np.testing.assert_allclose(s, nodes[at + 1], rtol=1e-4)
    np.testing.assert_allclose(np.bincount(at, minlength=47) / 4000, 1 / 47, atol=4 * np.sqrt(1 / 47 / 4000))


def test_ict_doubles_its_nodes_from_11_to_1281():
    law, process, seen = Doubling(), edm(), []
    for k in (0, 99, 100, 250, 350, 450, 550, 650, 799):
        t, s = law(process, Progress(k, 800), jax.random.key(0), 4)
        ramp = np.diff(np.power([*np.asarray(s), *np.asarray(t)], 1 / 7).reshape(2, 4), axis=0)
        seen.append(round((80 ** (1 / 7) - 0.002 ** (1 / 7)) / float(ramp.mean())) + 2)  # n − 1 ramps, n + 1 nodes
    assert seen == [11, 11, 21, 41, 81, 161, 321, 641, 1281]


@pytest.mark.parametrize("process", [edm(), flow()], ids=lambda p: type(p.schedule).__name__)
def test_ict_draws_intervals_by_differences_of_erf(process):
    count, law = 40_000, Doubling(10, 10)
    nodes = np.asarray(grids.karras(process, 10))
    with np.errstate(divide="ignore"):
        rho = np.minimum(np.asarray(process.rho(jnp.asarray(nodes)), np.float64), 1000.0)
        cumulative = erf((np.log(rho) + 1.1) / (math.sqrt(2) * 2.0))
    p = -np.diff(cumulative) / (cumulative[0] - cumulative[-1])
    assert p.sum() == pytest.approx(1) and np.all(p > 0)
    t, s = law(process, Progress(0), jax.random.key(0), count)
    at = np.abs(np.asarray(t)[:, None] - nodes[:-1]).argmin(1)
    np.testing.assert_allclose(s, nodes[at + 1], rtol=1e-3, atol=1e-7)
    share = np.bincount(at, minlength=10) / count
    assert np.all(np.abs(share - p) < 4 * np.sqrt(p / count) + 1e-4), (share, p)

    t, s = Doubling(10, 10, between=True)(process, Progress(0), jax.random.key(0), count)
    inside = np.asarray(t) > process.t_min * 1.01
    log_rho = np.log(np.asarray(process.rho(t)))[inside]
    # Kolmogorov–Smirnov: the times themselves follow the normal, cut off at t_max.
    theirs = (erf((np.sort(log_rho) + 1.1) / (math.sqrt(2) * 2)) - cumulative[-1]) / (cumulative[0] - cumulative[-1])
    mine = 1 - inside.mean() + np.arange(inside.sum()) / count
    assert np.abs(theirs - mine).max() < 2 / np.sqrt(count)
    assert np.all(np.asarray(s) < np.asarray(t))


@pytest.mark.parametrize("process", [edm(), flow()], ids=["edm", "flow"])
def test_ect_tightens_from_denoising_to_neighbours(process):
    law, key = Shrinking(q=2.0, stages=8), jax.random.key(0)
    ratios = []
    for k in range(8):
        t, s = law(process, Progress(k, 8), key, 4000)
        assert np.all((s < t) & (s >= 0) & (t >= process.t_min) & (t <= process.t_max * (1 + 1e-6)))
        t, s = (np.asarray(process.sigma(a) / process.alpha(a), np.float64) for a in (t, s))
        expected = np.maximum(0, t * (1 - 2.0 ** -(k + 1) * (1 + 8 / (1 + np.exp(t)))))
        np.testing.assert_allclose(s, expected, rtol=1e-3, atol=1e-5)
        ratios.append((s / t).mean())
    assert np.all(np.diff(ratios) > 0) and ratios[-1] > 0.97
    assert not np.any(Shrinking(q=1.0)(process, Progress(0), key, 100)[1])  # q = 1: plain denoising


def test_a_teacher_is_never_asked():
    method = ConsistencyTraining()(edm())
    assert method.needs == {"x"} and method.sampling.gamma == 1 and set(method.losses) == {"student"}
    student = Net(jnp.asarray(1.0), {}, lambda p, r, x, t, c, **k: p * x / (1 + t[:, None]))
    value, gradient = jax.value_and_grad(lambda s: loss_of(ConsistencyTraining(), edm(), s))(student)
    assert np.isfinite(value) and value > 0 and np.isfinite(gradient.params)  # nets hold the student alone
