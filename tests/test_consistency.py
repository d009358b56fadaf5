"""Consistency distillation where everything is linear: data N(0, c²), exact map f(x, t) = x c/√(c² + t²)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids
from ddistill.integrators import Solution, ddim, deis, dpmpp_2m, dpmpp_3m, dpmpp_3s, euler, heun
from ddistill.losses.distances import L1, L2, CoordinateHuber, Perceptual, PseudoHuber
from ddistill.methods import Consistency
from ddistill.methods.base import Progress
from ddistill.methods.consistency import doubled, node, position, renoising_times
from ddistill.net import Net
from ddistill.process import edm, flow, trig, ve, vp, vp_cosine
from ddistill.sample import sample

C = 0.5
PROCESSES = pytest.mark.parametrize(
    "process", [edm(), vp(), flow(), trig(), vp_cosine()], ids=lambda p: type(p.schedule).__name__
)
"""The last one's t_min is 0."""
SIMPLE = Consistency(intervals=18, max_intervals=18, solver_steps=1, weighted=False, distance=L2(), between=False)


def gaussian_teacher(process):
    def denoise(params, rest, x, t, cond, *, s, key):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return alpha * C**2 * x / (alpha**2 * C**2 + sigma**2)

    return Net({}, {}, denoise)


def exact_student(process):
    def endpoint(params, rest, x, t, cond, *, s, key):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return x * C / jnp.sqrt(alpha**2 * C**2 + sigma**2)

    return Net({}, {}, endpoint)


def exact_solver(process):
    def solve(denoise, _, nodes, x):
        t, s = nodes[0][:, None], nodes[-1][:, None]
        variance = [process.alpha(u) ** 2 * C**2 + process.sigma(u) ** 2 for u in (t, s)]
        return Solution(x * jnp.sqrt(variance[1] / variance[0]), 1)

    return solve


def loss_of(config, process, student, batch=256, step=0, **nets):
    loss = config(process).losses["student"]
    x = C * jax.random.normal(jax.random.key(0), (batch, 2))
    nets = {"teacher": gaussian_teacher(process), "student": student, **nets}
    return jax.jit(lambda nets: loss(nets, {"x": x}, Progress(step), jax.random.key(1))[0])(nets)


@PROCESSES
@pytest.mark.parametrize("between", [False, True])
def test_the_exact_map_with_an_exact_solver_has_no_loss(process, between):
    config = dataclasses.replace(SIMPLE, solver=exact_solver(process), between=between)
    assert loss_of(config, process, exact_student(process)) < 1e-10
    doubled = Net({}, {}, lambda *a, **k: 2 * exact_student(process).apply(*a, **k))
    # Consistent with itself, but for f(x, 0) = x: the last interval of 18 is left with E ‖2 x − x‖²/d = c².
    assert float(loss_of(config, process, doubled, batch=8192)) == pytest.approx(C**2 / 18, rel=0.25)

    def bent(p, r, x, t, c, **k):
        return (1 + t[:, None] / process.t_max) * exact_student(process).apply(p, r, x, t, c, **k)

    assert loss_of(config, process, Net({}, {}, bent)) > 1e-4  # meets the boundary, but not itself


@pytest.mark.parametrize(
    ("n", "steps", "solver", "ratio"),
    [
        (18, 1, euler, 0.8461),
        (18, 2, euler, 0.9198),
        (40, 1, euler, 0.9297),
        (18, 1, heun, 1.0553),
        (40, 1, heun, 1.0098),
    ],
)
def test_the_fixed_point_of_a_linear_student_is_the_product_of_the_solvers_factors(n, steps, solver, ratio):
    process = edm()
    config = dataclasses.replace(SIMPLE, intervals=n, max_intervals=n, solver=solver, solver_steps=steps)
    # Steps within the intervals are intervals of a finer grid of the same kind; the last, from t_min to 0, has one.
    nodes = np.asarray(grids.karras(process, steps * (n - 1) + 1))
    intervals = jnp.asarray(np.stack([nodes[:-1], nodes[1:]]))
    one = solver(gaussian_teacher(process).bind(), process, intervals, jnp.ones((len(nodes) - 1, 1)))
    slopes = np.append(np.cumprod(np.asarray(one.x[:, 0], np.float64)[::-1])[::-1], 1.0)
    table = [jnp.asarray(np.append(a[:-1:steps], a[-1])[::-1].copy(), jnp.float32) for a in (slopes, nodes)]
    student = Net({}, {}, lambda p, r, x, t, c, **k: x * jnp.interp(t, table[1], table[0])[:, None])
    assert loss_of(config, process, student) < 1e-10
    # Against the exact slope c/√(c² + T²): the solver's bias, known in closed form for Euler.
    assert slopes[0] * np.sqrt(C**2 + 80**2) / C == pytest.approx(ratio, abs=2e-4)
    if solver is euler:
        t, s = nodes[:-1], nodes[1:]
        np.testing.assert_allclose(one.x[:, 0], (C**2 + s * t) / (C**2 + t**2), rtol=1e-4)


def test_no_gradient_reaches_the_target():
    # The solver answers x/2 and the student is a x: loss a² x²/4, gradient a x² with a stopped target, half without.
    config = dataclasses.replace(SIMPLE, solver=lambda denoise, process, nodes, x: Solution(x / 2, 1))

    def loss(a):
        return loss_of(config, edm(), Net({"a": a}, {}, lambda p, r, x, t, c, **k: p["a"] * x))

    value, gradient = jax.value_and_grad(loss)(3.0)
    np.testing.assert_allclose(gradient / value, 4 / 3.0, rtol=1e-4)


def test_the_target_is_the_average_where_one_is_asked_for():
    config = dataclasses.replace(SIMPLE, target_ema=0.95, solver=lambda d, p, nodes, x: Solution(x, 1))
    times = {"student": 1.0, "target": 3.0}
    nets = {n: Net({"a": jnp.asarray(a)}, {}, lambda p, r, x, t, c, **k: p["a"] * x) for n, a in times.items()}
    student = nets.pop("student")
    # ‖x − 3x‖² = 4 ‖x‖² against ‖x − 2x‖²: a ratio that the noise does not enter.
    other = {"target": Net({"a": jnp.asarray(2.0)}, {}, nets["target"].apply)}
    np.testing.assert_allclose(
        loss_of(config, edm(), student, **nets) / loss_of(config, edm(), student, **other), 4, rtol=1e-5
    )
    assert config(edm()).ema["target"] == ("student", 0.95)


@pytest.mark.parametrize("process", [edm(), vp()], ids=lambda p: type(p.schedule).__name__)
def test_the_weight_is_one_over_the_interval(process):
    def constant(weighted):
        config = dataclasses.replace(SIMPLE, weighted=weighted, solver=lambda d, p, nodes, x: Solution(0 * x, 1))
        unit = Net({}, {}, lambda p, r, x, t, c, **k: jnp.sign(jnp.abs(x).sum(1, keepdims=True)) * jnp.ones_like(x))
        return loss_of(config, process, unit, batch=8192)

    nodes = np.asarray(grids.karras(process, 18))
    rho = np.asarray(process.sigma(nodes) / process.alpha(nodes))
    np.testing.assert_allclose(constant(False), 1, rtol=1e-6)
    np.testing.assert_allclose(constant(True), np.mean(1 / -np.diff(rho)), rtol=0.1)


def test_nodes_are_karras_grid_and_n_doubles_on_schedule():
    process = edm()
    for n in (10, 40):
        nodes = node(process, jnp.arange(n + 1.0), jnp.asarray(float(n)))
        np.testing.assert_allclose(nodes, grids.karras(process, n), rtol=1e-4)
    steps = [0, 99, 100, 250, 399, 400, 499]
    assert [int(doubled(Progress(s, 500), 10, 160)) for s in steps] == [10, 10, 20, 40, 80, 160, 160]
    assert [int(doubled(Progress(s, 500), 10, 10)) for s in steps] == [10] * 7
    # One interval leads from every time to the data.
    np.testing.assert_allclose(node(process, jnp.asarray([0.0, 1.0]), 1), [80, 0])
    assert 0.002 < float(node(process, jnp.asarray(0.5), 1)) < 80


@pytest.mark.parametrize("steps", [7, 500, 100_001])
@pytest.mark.parametrize(("first", "last"), [(64, 1280), (10, 1280), (10, 25), (1, 1025), (3, 4), (5, 5), (8, 4)])
def test_n_doubles_until_its_last_span_which_is_of_last(first, last, steps):
    spans = max(0, int(np.ceil(np.log2(last / first)))) + 1
    k = np.minimum(np.arange(steps) * spans // steps, spans - 1)
    shown = np.unique([*range(min(steps, 500)), *range(max(0, steps - 500), steps), *np.arange(spans) * steps // spans])
    n = jax.vmap(lambda s: doubled(Progress(s, steps), first, last))(jnp.asarray(shown))
    away = np.abs(shown * spans / steps - np.round(shown * spans / steps)) > 1e-3  # where rounding decides nothing
    np.testing.assert_array_equal(n[away], np.minimum(first * 2.0 ** k[shown], last)[away])
    if steps >= spans:
        assert n[-1] == last


@PROCESSES
def test_position_is_the_inverse_of_node(process):
    i = jnp.asarray([0.0, 0.5, 3.0, 7.25, 9.0, 10.0])
    np.testing.assert_allclose(position(process, node(process, i, 10), 10), i, atol=2e-3)


def test_where_noise_is_left_at_the_data_the_last_interval_has_a_length():
    i, process = jnp.arange(11.0), ve()
    times = node(process, i, 10)
    assert times[-1] == 0 == process.t_min and np.all(np.diff(times) < 0)
    np.testing.assert_allclose(position(process, times, 10), i, atol=2e-3)
    config = Consistency(intervals=10, max_intervals=10, solver=exact_solver(process))
    assert 0 <= loss_of(config, process, exact_student(process)) < 1e-2  # 1/(ρ_t − ρ_s) of an empty one is NaN


@pytest.mark.parametrize("solver", [dpmpp_2m, dpmpp_3m, deis])
def test_multistep_solvers_take_several_steps_in_the_last_interval_too(solver):
    config = dataclasses.replace(SIMPLE, solver=solver, solver_steps=4, between=True, intervals=6, max_intervals=6)
    single = dataclasses.replace(config, solver=dpmpp_3s)
    loss = loss_of(config, edm(), exact_student(edm()))
    assert 0 <= loss < 1e-3 and float(loss) == pytest.approx(
        float(loss_of(single, edm(), exact_student(edm()))), abs=1e-3
    )


def by_velocity(velocity, process):
    """A teacher that is known by its velocity u(x, t) alone."""

    def denoise(params, rest, x, t, cond, *, s, key):
        return process.x0_from_velocity(velocity(x, t[:, None]), x, t)

    return Net({}, {}, denoise)


def test_on_a_flow_it_is_the_consistency_of_dx_dt_equal_u():
    process = flow()

    def u(x, t):
        return jnp.sin(3 * x) + t * x

    def by_hand(denoise, process, nodes, x):
        t, s = nodes[0][:, None], nodes[-1][:, None]
        return Solution(x + (s - t) * u(x, t), 1)

    values = [
        loss_of(dataclasses.replace(SIMPLE, solver=solver), process, exact_student(process), teacher=teacher)
        for solver, teacher in ((euler, by_velocity(u, process)), (by_hand, gaussian_teacher(process)))
    ]
    np.testing.assert_allclose(*values, rtol=1e-4)


@pytest.mark.parametrize("between", [False, True])
def test_of_a_straight_flow_one_interval_is_enough(between):
    # x_t = (1 − t) c z + t z, coupled straight: u = (1 − c) z, and the teacher itself is the exact map, c z.
    process = flow()
    straight = by_velocity(lambda x, t: (1 - C) * x / ((1 - t) * C + t), process)
    one = dataclasses.replace(SIMPLE, intervals=1, max_intervals=1, solver=euler, between=between)
    assert loss_of(one, process, straight, teacher=straight) < 1e-10
    # The flow of independent noise is not: from t = 1 one Euler step ends at the data mean, far from c z.
    independent = gaussian_teacher(process)
    assert loss_of(one, process, exact_student(process), teacher=independent) > (0.01 if between else 0.9 * C**2)


def test_the_multistep_sampler_starts_at_the_noise_and_agrees_with_maps_that_end_at_t_min():
    process, tau = edm(), 0.8
    method, key = Consistency()(process), jax.random.key(0)
    assert method.sampling.gamma == 1 and list(method.sampling.times(2)) == pytest.approx([80, tau, 0])
    x = process.prior(key, (100_000, 1))
    assert float(jnp.std(x)) == pytest.approx(80, rel=0.01)  # N(0, T² I), not N(0, I)
    ours = sample(exact_student(process), process, [80.0, tau], x, key, gamma=1.0).x
    noise = jax.random.normal(jax.random.fold_in(key, 0), x.shape)
    gaps = []
    for end in (0.2, 0.1):
        there = x * np.sqrt((C**2 + end**2) / (C**2 + 80**2))
        theirs = there + np.sqrt(tau**2 - end**2) * noise  # Song et al. 2023, alg. 1, where f maps to t = ε
        np.testing.assert_allclose(process.renoise(there, noise, end, tau), theirs, rtol=1e-5, atol=1e-5)
        for y in (ours, theirs):
            assert float(jnp.std(y)) == pytest.approx(np.sqrt(C**2 + tau**2), rel=0.01)
        gaps.append(float(jnp.sqrt(jnp.mean((ours - theirs) ** 2))))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)  # O(ε²)


def test_distances_in_cases_worked_by_hand():
    a, b = jnp.asarray([[3.0, 0.0], [0.0, 0.0]]), jnp.asarray([[0.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(L2()(a, b), [12.5, 0])
    np.testing.assert_allclose(L1()(a, b), [3.5, 0])
    c = 2.0 * np.sqrt(2)
    np.testing.assert_allclose(PseudoHuber(2.0)(a, b), [np.sqrt(25 + c**2) - c, 0], rtol=1e-6)
    # Each coordinate by itself: (√(9 + 4) − 2 + √(16 + 4) − 2)/2.
    np.testing.assert_allclose(CoordinateHuber(2.0)(a, b), [(np.sqrt(13) + np.sqrt(20)) / 2 - 2, 0], rtol=1e-6)
    each = CoordinateHuber(1.0)(a * 1e-4, b * 1e-4)[0]  # (9 + 16) 1e-8/(2 · 2)
    np.testing.assert_allclose(each, 25e-8 / 4, rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda a: CoordinateHuber()(a, b).sum())(b)))
    small = PseudoHuber(1.0)(a * 1e-4, b * 1e-4)[0]  # ‖Δ‖²/(2c), though float32 loses it in √(‖Δ‖² + c²) − c
    np.testing.assert_allclose(small, 25e-8 / (2 * np.sqrt(2)), rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda a: PseudoHuber()(a, b).sum())(b)))
    features = Perceptual(lambda x: (2 * x, x[:, :1]), pixel=0.5)
    np.testing.assert_allclose(features(a, b), [0.5 * 12.5 + 4 * 12.5 + 9, 0])


def test_renoising_times_start_at_the_noise_and_end_at_the_data():
    for process in (edm(), flow()):
        for steps in (1, 2, 4, 8):
            times = np.asarray(renoising_times(process, steps))
            assert len(times) == steps + 1 and times[0] == np.float32(process.t_max) and times[-1] == 0
            assert np.all(np.diff(times) < 0)
    with pytest.raises(ValueError, match="at least 1 step"):
        renoising_times(edm(), 0)


@pytest.mark.parametrize(("gamma", "overshoot"), [(0.0, 0), (0.4, 0), (1.0, 0), (0.0, 1)])
def test_sampling_keeps_the_marginals_of_gaussian_data(gamma, overshoot):
    # The exact flow map in place of the student: its jump lands on the trajectory at every s.
    process = edm()

    def toward(params, rest, x, t, cond, *, s, key):
        t, s = t[:, None], s[:, None]
        there = x * jnp.sqrt((C**2 + s**2) / (C**2 + t**2))
        return process.destination(x, t[:, 0], there, s[:, 0])

    times = [80.0, 4.0, 0.8, 0.0]
    x = 80 * jax.random.normal(jax.random.key(0), (200_000, 1)) * np.sqrt(1 + C**2 / 80**2)
    solution = sample(Net({}, {}, toward), process, times, x, jax.random.key(1), gamma=gamma, overshoot=overshoot)
    assert int(solution.nfe) == 3
    assert float(jnp.std(solution.x)) == pytest.approx(C, rel=4 / np.sqrt(400_000))


def test_gamma_zero_is_ddim_of_a_teacher_and_gamma_one_the_multistep_sampler():
    process, teacher = edm(), gaussian_teacher(edm())
    times, x = [80.0, 3.0, 0.5, 0.0], 80 * jax.random.normal(jax.random.key(0), (6, 2))
    expected = ddim(teacher.bind(), process, jnp.asarray(times), x).x
    np.testing.assert_allclose(sample(teacher, process, times, x).x, expected, rtol=1e-5, atol=1e-7)

    key, y = jax.random.key(3), x
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        noise = jax.random.normal(jax.random.fold_in(key, i), y.shape)
        y = exact_student(process)(y, t) + s * noise
    stochastic = sample(exact_student(process), process, times, x, key, gamma=1.0)
    np.testing.assert_allclose(stochastic.x, y, rtol=1e-4, atol=1e-6)


def test_the_sampler_that_overshoots_jumps_two_times_down_and_comes_one_up():
    process, key, x = edm(), jax.random.key(3), 80 * jax.random.normal(jax.random.key(0), (6, 2))
    student = Net({}, {}, lambda p, r, x, t, c, *, s, key: 0.3 * x / (1 + t[:, None]) + 0.1 * s[:, None])
    noise = [jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in range(2)]
    y = student.jump(process, x, 80.0, 0.5) + np.sqrt(3.0**2 - 0.5**2) * noise[0]
    y = student.jump(process, y, 3.0, 0.0) + 0.5 * noise[1]
    y = student.jump(process, y, 0.5, 0.0)  # the last one has nothing beyond
    drawn = sample(student, process, [80.0, 3.0, 0.5, 0.0], x, key, overshoot=1)
    np.testing.assert_allclose(drawn.x, y, rtol=1e-4, atol=1e-6)
    assert int(drawn.nfe) == 3


@pytest.mark.parametrize(("process", "middle"), [(edm(), 3.0), (vp(), 0.4), (flow(), 0.6)], ids=["edm", "vp", "flow"])
@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_with_gamma_part_of_the_noise_is_drawn_anew(process, middle, gamma):
    """It lands at ρ = √(1 − γ²) ρ(t), from where x grows by α_t / α_s and noise brings its variance to σ_t²."""
    key, x, end = jax.random.key(3), jax.random.normal(jax.random.key(0), (6, 2)), float(process.t_max)
    student = Net({}, {}, lambda p, r, x, t, c, *, s, key: 0.3 * x / (1 + t[:, None]) + 0.1 * s[:, None])
    noise = jax.random.normal(jax.random.fold_in(key, 0), x.shape)
    rho = np.sqrt(1 - gamma**2) * process.sigma(middle) / process.alpha(middle)
    landing = process.time_of(-jnp.log(rho)) if gamma < 1 else jnp.zeros(())
    grown = process.alpha(middle) / process.alpha(landing)
    y = grown * student.jump(process, x, end, landing)
    y += jnp.sqrt(process.sigma(middle) ** 2 - (grown * process.sigma(landing)) ** 2) * noise
    drawn = sample(student, process, [end, middle, 0.0], x, key, gamma=gamma).x
    np.testing.assert_allclose(drawn, student.jump(process, y, middle, 0.0), rtol=1e-4, atol=1e-6)


def test_sampling_forwards_inverts_sampling_backwards():
    process, student = vp(), None

    def toward(params, rest, x, t, cond, *, s, key):
        variance = [process.alpha(u) ** 2 * C**2 + process.sigma(u) ** 2 for u in (t, s)]
        return process.destination(x, t, x * jnp.sqrt(variance[1] / variance[0])[:, None], s)

    student, times = Net({}, {}, toward), [1.0, 0.6, 0.2, 0.05]
    x = jax.random.normal(jax.random.key(0), (6, 2))
    there = sample(student, process, times, x).x
    np.testing.assert_allclose(sample(student, process, times[::-1], there).x, x, rtol=1e-3)


def test_wrong_sampling_arguments_are_met_with_words():
    x, student = jnp.zeros((2, 2)), exact_student(edm())
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        sample(student, edm(), [80, 0], x, gamma=1.5)
    for noisy in ({"gamma": 1.0}, {"overshoot": 1}):
        with pytest.raises(ValueError, match="pass key="):
            sample(student, edm(), [80, 0], x, **noisy)
        with pytest.raises(ValueError, match="inversion.*need gamma = 0 and overshoot = 0"):
            sample(student, edm(), [0.1, 80], x, jax.random.key(0), **noisy)
    for wrong in ({"gamma": 0.5, "overshoot": 1}, {"overshoot": -1}):
        with pytest.raises(ValueError, match="overshoot must be at least 0, and 0 where gamma is not"):
            sample(student, edm(), [80, 0], x, jax.random.key(0), **wrong)
    with pytest.raises(ValueError, match="sampling time 100.* is outside this process"):
        sample(student, edm(), [100, 0], x)
    with pytest.raises(ValueError, match="at least two times"):
        sample(student, edm(), [80], x)
