"""Consistency trajectory models in a linear world: N(0, c²), exact map x_t √(α_s² c² + σ_s²)/√(α_t² c² + σ_t²)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids
from ddistill.integrators import Solution, dpmpp_2m, heun
from ddistill.losses.adversarial import Hinge
from ddistill.losses.distances import L2
from ddistill.losses.times import LogNormal
from ddistill.methods import Consistency
from ddistill.methods.adversarial import Adversary
from ddistill.methods.base import Progress
from ddistill.methods.ctm import CTM, HalfKarras, flow_times
from ddistill.net import Net, diagonal
from ddistill.process import Process, edm, flow, trig, vp
from ddistill.sample import sample

C = 0.5
PROCESSES = [edm(), vp(), flow(), trig()]
MODES = {"local": (0.0, 0.12), "soft": (0.0, 1.0), "global": (1.0, 1.0)}


def halve(denoise, process, nodes, x):
    return Solution(x / 2, 1)


SIMPLE = CTM(solver=halve, solver_steps=1, distance=L2(), dsm=0.0, weighted=False, exact=False)


def name_of(process):
    return type(process.schedule).__name__


def deviation(process, t):
    return jnp.sqrt(process.alpha(t) ** 2 * C**2 + process.sigma(t) ** 2)[:, None]


def gaussian_teacher(process):
    def denoise(params, rest, x, t, cond, *, s, key):
        return process.alpha(t)[:, None] * C**2 * x / deviation(process, t) ** 2

    return Net({}, {}, denoise)


def exact_student(process, slope=1.0):
    def toward(params, rest, x, t, cond, *, s, key):
        there = slope * x * deviation(process, s) / deviation(process, t)
        on_diagonal = gaussian_teacher(process)(x, t)
        return jnp.where((s == t)[:, None], on_diagonal, process.destination(x, t, there, s))

    return Net({}, {}, toward)


def exact_solver(process):
    def solve(denoise, _, nodes, x):
        return Solution(x * deviation(process, nodes[-1]) / deviation(process, nodes[0]), 1)

    return solve


def evaluate(config, process, student, batch=256, x=None, **nets):
    x = C * jax.random.normal(jax.random.key(0), (batch, 2)) if x is None else x
    nets = {"teacher": gaussian_teacher(process), "student": student, **nets}
    loss = config(process).losses["student"]
    return jax.jit(lambda nets: loss(nets, {"x": x}, Progress(0), jax.random.key(1)))(nets)


@dataclasses.dataclass(frozen=True)
class At(CTM):
    """The same loss at times t, u, s of our choice."""

    at: tuple[float, float, float] = (4.0, 3.0, 2.0)

    def times(self, process, key, n):
        t, u, s = (jnp.full(n, time) for time in self.at)
        return jnp.stack([t, u]), s


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_a_jump_to_the_same_time_is_no_jump(process):
    x = jax.random.normal(jax.random.key(0), (64, 3))
    t = jnp.linspace(0.0, process.t_max, 64)
    wild = Net({}, {}, lambda p, r, x, t, c, **k: 1e3 * jnp.cos(7 * x))
    np.testing.assert_array_equal(wild.jump(process, x, t, t), x)


@pytest.mark.parametrize(
    ("process", "mode", "between"),
    [
        (edm(), "local", True),
        (edm(), "soft", False),
        (edm(), "global", True),
        (vp(), "soft", True),
        (flow(), "local", False),
        (trig(), "soft", True),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Process) else str(value),
)
def test_the_exact_map_with_an_exact_solver_has_no_loss(process, mode, between):
    config = dataclasses.replace(SIMPLE, gap=MODES[mode], solver=exact_solver(process), between=between)
    loss = config(process).losses["student"]
    x = C * jax.random.normal(jax.random.key(0), (256, 2))

    @jax.jit
    def ctm(slope):
        nets = {"teacher": gaussian_teacher(process), "student": exact_student(process, slope)}
        return loss(nets, {"x": x}, Progress(0), jax.random.key(1))[1]["ctm"]

    assert ctm(1.0) < 1e-9
    assert ctm(1.2) > 1e-4  # not the identity at s = t
    assert ctm(0.9) > 1e-4


def test_a_jump_to_the_data_from_neighbouring_nodes_is_consistency_distillation():
    class Neighbours(CTM):
        def times(self, process, key, n):
            i = jnp.floor(jax.random.uniform(key, (n,)) * self.intervals)  # as Consistency draws them
            return jnp.stack([self.node(process, i), self.node(process, i + 1)]), jnp.zeros(n)

    process, n = edm(), 18
    cd = Consistency(intervals=n, max_intervals=n, solver_steps=1, weighted=False, distance=L2(), between=False)
    ctm = Neighbours(intervals=n, solver=cd.solver, solver_steps=1, weighted=False, distance=L2(), dsm=0.0)
    x = C * jax.random.normal(jax.random.key(0), (64, 2))

    def loss(config, a):
        def apply(p, r, x, t, c, **k):
            return p["a"] * x * jnp.cos(t)[:, None]

        nets = {"teacher": gaussian_teacher(process), "student": Net({"a": a}, {}, apply)}
        return config(process).losses["student"](nets, {"x": x}, Progress(0), jax.random.key(1))[0]

    expected, got = (jax.jit(jax.value_and_grad(functools.partial(loss, config)))(0.3) for config in (cd, ctm))
    assert expected[0] > 1e-2
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_only_under_global_matching_the_target_needs_no_inner_map(mode):
    # Inner maps of two targets differ (their jumps to s > 0), outer ones (to s = 0) do not.
    config = dataclasses.replace(SIMPLE, gap=MODES[mode], target_ema=0.9, final=0.0)

    def apply(p, r, x, t, c, *, s, key):
        return jnp.where(s == 0, 0.5, p["inner"])[:, None] * x

    def loss(inner):
        return evaluate(config, edm(), exact_student(edm()), target=Net({"inner": inner}, {}, apply))[0]

    one, other = float(loss(jnp.asarray(0.1))), float(loss(jnp.asarray(3.0)))
    same = one == pytest.approx(other, rel=1e-5)
    assert one > 0 and same == (mode == "global")
    assert config(edm()).ema["target"] == ("student", 0.9)


def inner_outer(a, b):
    """EDM: G(x, t, s) = (s/t + (1 − s/t) a) x where s > 0, and b x where s = 0."""

    def apply(p, r, x, t, c, *, s, key):
        return jnp.where(s == 0, p["b"], p["a"])[:, None] * x

    return Net({"a": jnp.asarray(a), "b": jnp.asarray(b)}, {}, apply)


def test_the_outer_map_is_frozen_and_passes_the_gradient_of_its_input():
    # Left b (½ + ½ a) x, right b (⅔ + ⅓ a) x/2, the right one stopped, b stopped on both sides: m is mean x².
    a, b = 0.7, 1.5
    config = At(distance=L2(), weighted=False, exact=False, dsm=0.0, solver=halve)
    unit = At(distance=L2(), weighted=False, exact=False, dsm=0.0, solver=lambda d, p, nodes, x: Solution(0 * x, 1))
    m = evaluate(unit, edm(), inner_outer(1.0, 1.0))[0]
    assert m == pytest.approx(C**2 + 16, rel=0.1)
    difference = (0.5 + 0.5 * a) - (2 / 3 + a / 3) / 2
    value, gradient = jax.value_and_grad(lambda s: evaluate(config, edm(), s)[0])(inner_outer(a, b))
    np.testing.assert_allclose(value, (b * difference) ** 2 * m, rtol=1e-5)
    np.testing.assert_allclose(gradient.params["a"], 2 * b**2 * difference * 0.5 * m, rtol=1e-5)
    assert gradient.params["b"] == 0
    weighted = evaluate(dataclasses.replace(config, weighted=True), edm(), inner_outer(a, b))[0]
    np.testing.assert_allclose(weighted, value / 4, rtol=1e-5)  # 1/t
    on_vp = [dataclasses.replace(config, at=(0.8, 0.6, 0.4), weighted=w) for w in (True, False)]
    weighted, value = (evaluate(c, vp(), inner_outer(a, b))[0] for c in on_vp)
    np.testing.assert_allclose(weighted, value * vp().alpha(0.8) / vp().sigma(0.8), rtol=1e-4)  # 1/ρ


def test_the_adaptive_weight_is_the_quotient_of_the_gradients_at_the_last_layer():
    # Data 0, so that L_DSM = a² E w x² has the gradient 2 L_DSM/a; that of L_CTM is L_CTM/difference, see above.
    a, b, x = 0.7, 1.5, jnp.zeros((64, 2))
    config = At(distance=L2(), weighted=False, exact=False, dsm=None, last_layer="a", solver=halve)
    difference = (0.5 + 0.5 * a) - (2 / 3 + a / 3) / 2
    (value, metrics), gradient = jax.value_and_grad(
        lambda s: evaluate(config, edm(), s, x=x), has_aux=True
    )(inner_outer(a, b))  # fmt: skip
    d_ctm, d_dsm = metrics["ctm"] / difference, 2 * metrics["dsm"] / a
    np.testing.assert_allclose(metrics["dsm_weight"], d_ctm / (d_dsm + 1e-4), rtol=1e-5)
    np.testing.assert_allclose(value, metrics["ctm"] + metrics["dsm_weight"] * metrics["dsm"], rtol=1e-6)
    # The weight is a number to the gradient.
    np.testing.assert_allclose(gradient.params["a"], d_ctm + metrics["dsm_weight"] * d_dsm, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no parameters 'head' in the student: name .*CTM\(last_layer=…\), of a, b"):
        evaluate(dataclasses.replace(config, last_layer="head"), edm(), inner_outer(a, b))


def test_denoising_is_learnt_on_the_diagonal():
    # Around the posterior mean D: L(D + a x) − L(D) = a² E w x² + 2 a E w x (D − x0), the last with mean 0.
    process, n = edm(), 200_000
    config = dataclasses.replace(SIMPLE, dsm=1.0, dsm_times=LogNormal(-1.2, 0.5), gap=(1.0, 1.0))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def dsm(a):
        seen = []

        def student(p, r, x, t, c, *, s, key):
            seen.append((t, s))
            return gaussian_teacher(process)(x, t) + p["a"] * x

        x = C * jax.random.normal(jax.random.key(0), (n, 1))
        nets = {"teacher": gaussian_teacher(process), "student": Net({"a": a}, {}, student)}
        loss = config(process).losses["student"]
        return loss(nets, {"x": x}, Progress(0), jax.random.key(1))[1]["dsm"], seen[-1]

    (value, (t, s)), gradient = dsm(0.0)
    np.testing.assert_array_equal(t, s)
    # w = 1/t² + 1/c² and Var[x0 | x_t] = 1/w: the least loss is 1, its gradient's standard error 2 √(E w x²/n).
    assert float(value) == pytest.approx(1, abs=0.02)
    power = 1 + float(np.mean(C**2 / np.square(t) + np.square(t) / C**2 + 1))
    assert abs(float(gradient)) < 4 * 2 * np.sqrt(power / n)
    exact = dataclasses.replace(SIMPLE, dsm=1.0, exact=True)
    assert evaluate(exact, process, exact_student(process))[1]["dsm"] < 1e-10  # the teacher in place of x0
    assert float(dsm(0.2)[0][0]) - float(value) == pytest.approx(0.04 * power, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("between", [True, False])
def test_times_are_s_below_u_below_t_with_gaps_of_the_law(mode, between):
    process, n = edm(), 20_000
    config = CTM(gap=MODES[mode], between=between, intervals=20, solver_steps=3, final=0.25)
    nodes, s = config.times(process, jax.random.key(0), n)
    nodes, s = np.asarray(nodes, np.float64), np.asarray(s, np.float64)
    assert nodes.shape == (4, n)
    t, u = nodes[0], nodes[-1]
    assert np.all(np.diff(nodes, axis=0) <= 0) and np.all(u < t) and np.all(s <= u) and s.min() == 0 and t.max() <= 80

    def share(time):  # along the grid: t_min at (N − 1)/N, 0 at 1
        high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
        return np.where(time == 0, 1.0, (high - time ** (1 / 7)) / (high - low) * 19 / 20)

    gap, free = share(u) - share(t), (u > s) & (u > 0)
    if mode == "global":
        np.testing.assert_array_equal(u, s)
    elif between:  # drawn with a density proportional to the gap, where s or the end did not cut it
        long = free & (share(t) < 0.2) & (s == 0)
        ratio = gap[long] / MODES[mode][1] if mode == "local" else np.asarray([2 / 3])
        assert gap[free].max() <= MODES[mode][1] + 1e-3 and ratio.mean() == pytest.approx(2 / 3, abs=0.02)
    if not between:
        known = np.append(np.asarray(grids.karras(process, 20)), 0)
        for times in (t, u, s):
            assert np.abs(times[:, None] - known).min(1).max() < 1e-4 * 80
    assert np.mean(s == 0) > 0.25


def test_half_of_the_denoising_times_are_log_normal_and_half_on_the_noisy_ramp():
    times = np.asarray(HalfKarras()(edm(), jax.random.key(0), 40_000))
    normal, ramp = np.log(times[::2]), times[1::2]
    assert normal.mean() == pytest.approx(-1.2, abs=0.03) and normal.std() == pytest.approx(1.2, abs=0.03)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    place = (high - ramp ** (1 / 7)) / (high - low)
    np.testing.assert_allclose(np.quantile(place, [0, 0.5, 1]), [0, 0.35, 0.7], atol=0.01)


@dataclasses.dataclass(frozen=True)
class MeanJudge:
    """D(x) = w mean x."""

    def see(self, rest, x, t, cond):
        return x

    def judge(self, params, rest, seen, t, cond, s):
        return params["w"] * jnp.mean(seen, axis=1, keepdims=True)

    def __call__(self, params, rest, x, t, cond, *, s=None, key=None):
        return self.judge(params, rest, x, t, cond, s)


JUDGE = Net({"w": jnp.asarray(0.01)}, {}, MeanJudge())
PLAIN = At(distance=L2(), weighted=False, exact=False, dsm=0.3, solver=halve, last_layer="a")
JUDGED = dataclasses.replace(PLAIN, adversary=Adversary(loss=Hinge(), noise=None, r1=0.0), adversary_weight=0.5)


def test_an_adversary_is_heard_from_its_share_of_the_steps_on():
    x = 0.2 + C * jax.random.normal(jax.random.key(0), (256, 2))

    def both(config, step):
        loss = config(edm()).losses["student"]

        def of(student):
            nets = {"teacher": gaussian_teacher(edm()), "student": student, "discriminator": JUDGE}
            return loss(nets, {"x": x}, Progress(step, 100), jax.random.key(1))

        (value, metrics), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(inner_outer(a, b))
        return value, metrics, gradient.params

    a, b = 0.7, 1.5
    (without, metrics, before), silent, (value, judged, after) = both(PLAIN, 0), both(JUDGED, 49), both(JUDGED, 50)
    assert silent[0] == without and silent[2]["a"] == before["a"] and silent[1]["gan_weight"] == 0
    # L_GAN = −.01 mean x̂ with x̂ = b (½ + ½ a) x_t, so that its gradient by a is L_GAN · ½/(½ + ½ a); L_CTM see above.
    d_ctm = metrics["ctm"] / ((0.5 + 0.5 * a) - (2 / 3 + a / 3) / 2)
    d_gan = judged["gan"] * 0.5 / (0.5 + 0.5 * a)
    weight = 0.5 * np.clip(abs(d_ctm) / (abs(d_gan) + 1e-4), 0.01, 10)
    np.testing.assert_allclose(judged["gan_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(value - without, weight * judged["gan"], rtol=1e-3)
    np.testing.assert_allclose(after["a"] - before["a"], weight * d_gan, rtol=1e-2)  # a difference of larger numbers
    assert after["b"] == before["b"]  # by the samples' outer map nothing


def test_the_discriminator_of_ctm_compares_the_estimates_with_the_data():
    method, x = JUDGED(edm()), 0.2 + C * jax.random.normal(jax.random.key(0), (256, 2))
    a, b, key = 0.7, 1.5, jax.random.key(1)
    nets = {"teacher": gaussian_teacher(edm()), "student": inner_outer(a, b), "discriminator": JUDGE}
    loss, metrics = method.losses["discriminator"](nets, {"x": x}, Progress(0), key)
    mean = float(jnp.mean(x))
    fake = -float(method.losses["student"](nets, {"x": x}, Progress(0), key)[1]["gan"])  # the same samples
    np.testing.assert_allclose(metrics["real"], 0.01 * mean, rtol=1e-4)
    np.testing.assert_allclose(metrics["fake"], fake, rtol=1e-4)
    np.testing.assert_allclose(loss, 2 - 0.01 * mean + fake, rtol=1e-5)
    assert set(method.losses) == {"student", "discriminator"} and set(PLAIN(edm()).losses) == {"student"}


def test_the_diagonal_is_a_teacher_for_every_integrator():
    process = edm()
    student, x = exact_student(process), 80 * jax.random.normal(jax.random.key(0), (5, 2))
    for integrator, grid in ((heun, grids.karras(process, 9)), (dpmpp_2m, grids.karras(process, 12))):
        ends = jax.jit(lambda net, x, f=integrator, grid=grid: f(net.bind(), process, grid, x).x)
        np.testing.assert_allclose(ends(diagonal(student), x), ends(gaussian_teacher(process), x), rtol=1e-6)


def test_sampling_follows_the_trajectory_at_any_number_of_steps():
    for process in PROCESSES:
        method, x = CTM()(process), process.prior(jax.random.key(0), (5, 2))
        exact = x * C / deviation(process, jnp.full(5, process.t_max))
        assert method.sampling.gamma == 0
        grids = [np.asarray(method.sampling.times(steps)) for steps in (1, 2, 5)]
        ends = jax.jit(lambda x, p=process, grids=grids: [sample(exact_student(p), p, times, x).x for times in grids])
        for steps, times, got in zip((1, 2, 5), grids, ends(x), strict=True):
            assert len(times) == steps + 1 and times[0] == np.float32(process.t_max) and times[-1] == 0
            np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-5)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    np.testing.assert_allclose(flow_times(edm(), 2), [80, middle, 0], rtol=1e-5)


def test_wrong_gaps_are_met_with_words():
    for gap in ((0.0, 0.0), (0.5, 0.2), (-0.1, 0.5), (0.0, 1.5)):
        with pytest.raises(ValueError, match="gap = .* must be shares of the time range"):
            CTM(gap=gap)
