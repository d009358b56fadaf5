"""Rectified flow where the flow is known: Gaussian data N(0, c²), monotone couplings, and a mixture on a line."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ddistill import grids
from ddistill.data.inverted import beside_inverted
from ddistill.data.pairs import teacher_pairs
from ddistill.evaluate.flow import straightness, transport_cost
from ddistill.gathering import Place
from ddistill.integrators import ddim, euler, rk4
from ddistill.losses.distances import L2, PseudoHuber
from ddistill.losses.times import Nodes, Uniform, UShaped
from ddistill.methods import Consistency
from ddistill.methods.base import Pairs, Progress
from ddistill.methods.rectified_flow import AlphaWeight, FlowConsistency, RectifiedFlow, Reflow
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net, retime
from ddistill.process import edm, flow, trig, vp
from ddistill.sample import sample
from ddistill.sharding import make_mesh
from ddistill.stages import stages_of

C, FLOW = 0.5, flow()
PAIRS = Pairs(100, 8)
LINE = Mixture.from_covariances([0.4, 0.6], [[-0.6], [0.4]], [[[0.01]], [[0.04]]])
PLANE = Mixture.from_covariances([0.5, 0.3, 0.2], [[0.6, 0.0], [-0.6, 0.4], [0.0, -0.6]], [0.02 * np.eye(2)] * 3)


@dataclasses.dataclass(frozen=True)
class At:
    """Every time the same."""

    t: float

    def __call__(self, process, key, n):
        return jnp.full((n,), self.t)


def gaussian(process=FLOW):
    def denoise(params, rest, x, t, cond, *, s=None, key=None):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return alpha * C**2 * x / (alpha**2 * C**2 + sigma**2)

    return Net({}, {}, denoise)


def affine_flow(a, b):
    """The flow of the coupling x0 = a z + b with a > 0, whose lines do not cross."""

    def denoise(params, rest, x, t, cond, *, s=None, key=None):
        t = t[:, None]
        return a * (x - (1 - t) * b) / ((1 - t) * a + t) + b

    return Net({}, {}, denoise)


def velocity_net(k):
    """û = k x."""
    return Net({"k": jnp.asarray(k)}, {}, lambda p, r, x, t, c, **_: x - t[:, None] * p["k"] * x)


def loss_of(config, student, batch, key=1):
    loss = config(edm()).losses["student"]
    return jax.jit(lambda net: loss({"student": net}, batch, Progress(0), jax.random.key(key))[0])(student)


def coupled(a, b, n=512):
    z = jax.random.normal(jax.random.key(0), (n, 2))
    return {"noise": z, "x": a * z + b}


def quantile_map(z):
    """The monotone map of N(0, 1) to LINE."""
    grid = np.linspace(-2.5, 2.5, 20_001)
    parts = zip(LINE.weights, LINE.means[:, 0], LINE.scales[:, 0], strict=True)
    cdf = sum(w * stats.norm.cdf(grid, m, np.sqrt(v)) for w, m, v in parts)
    return np.interp(stats.norm.cdf(z), cdf, grid)


def test_a_straight_coupling_has_a_constant_velocity_no_loss_and_is_exact_in_one_step():
    batch, exact = coupled(0.7, 0.3), affine_flow(0.7, 0.3)
    for times in (Uniform(), UShaped(), Nodes(4)):
        config = RectifiedFlow(times=times, pairs=PAIRS)
        assert loss_of(config, exact, batch) < 1e-9
        assert loss_of(dataclasses.replace(config, distance=None, data_distance=L2()), exact, batch) < 1e-9
        # Another coupling's flow, and the same pairs the other way round, data at t = 1: neither is a minimum.
        assert loss_of(config, affine_flow(0.7, -0.3), batch) > 0.1
        assert loss_of(config, exact, {"noise": batch["x"], "x": batch["noise"]}) > 0.1
    for t in (1.0, 0.6, 0.1):
        x_t = FLOW.diffuse(batch["x"], batch["noise"], t)
        np.testing.assert_allclose(FLOW.velocity(exact(x_t, t), x_t, t), batch["noise"] - batch["x"], atol=1e-5)
    for steps in (1, 2, 8):
        x = sample(exact, FLOW, RectifiedFlow()(edm()).sampling.times(steps), batch["noise"]).x
        np.testing.assert_allclose(x, batch["x"], atol=1e-6)
    found = straightness(exact, FLOW, batch["noise"], scale=1.0)
    assert found["straightness"] < 1e-9
    np.testing.assert_allclose(found["transport_cost"], np.mean((batch["noise"] - batch["x"]) ** 2), rtol=1e-4)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_independent_gaussians_are_regressed_on_the_slope_in_closed_form(t):
    n = 100_000
    batch = {"x": C * jax.random.normal(jax.random.key(0), (n, 1))}
    config, power = RectifiedFlow(times=At(t)), (1 - t) ** 2 * C**2 + t**2
    slope = (t - (1 - t) * C**2) / power  # E[(ε − x0) x_t]/E[x_t²]
    value, gradient = jax.value_and_grad(lambda k: loss_of(config, velocity_net(k), batch))(slope)
    curvature = jax.grad(lambda k: loss_of(config, velocity_net(k), batch))(slope + 0.5) - gradient
    np.testing.assert_allclose(curvature, power, rtol=0.02)  # 2 E[x_t²] times .5
    # What no velocity explains, Var(ε − x0 | x_t) = c²/E[x_t²]; the gradient's deviation is 2 √(that E[x_t²]/n).
    np.testing.assert_allclose(value, C**2 / power, rtol=0.02)
    assert abs(float(gradient)) < 4 * 2 * C / np.sqrt(n)
    np.testing.assert_allclose(slope, (1 - gaussian()(jnp.ones((1, 1)), t)[0, 0]) / t, atol=1e-5)


def test_the_terms_of_the_loss_worked_by_hand():
    # x̂0 = x0 + .3 at t = .25: velocity off by −1.2, data by .3; D = 2.
    batch, exact = coupled(1.0, 0.0), affine_flow(1.0, 0.0)
    student = Net({}, {}, lambda *a, **k: exact.apply(*a, **k) + 0.3)
    base = RectifiedFlow(times=At(0.25), pairs=PAIRS)
    np.testing.assert_allclose(loss_of(base, student, batch), 1.44, rtol=1e-4)
    both = dataclasses.replace(base, weighting=AlphaWeight(), data_distance=L2())
    np.testing.assert_allclose(loss_of(both, student, batch), 0.75 * 1.44 + 0.09, rtol=1e-4)
    alone = dataclasses.replace(base, distance=None, data_distance=L2())
    np.testing.assert_allclose(loss_of(alone, student, batch), 0.09, rtol=1e-4)
    huber = dataclasses.replace(base, distance=PseudoHuber(0.5, power=1.0))  # c = .5 D
    np.testing.assert_allclose(loss_of(huber, student, batch), np.sqrt(2 * 1.44 + 1) - 1, rtol=1e-4)


def test_labels_and_times_reach_the_student_and_no_second_time_does():
    seen = []

    def student(params, rest, x, t, cond, *, s, key):
        seen.append((cond, t, s))
        return x

    batch = {"x": jnp.ones((3, 2)), "noise": jnp.zeros((3, 2)), "cond": jnp.asarray([2, 0, 1])}
    loss = RectifiedFlow(times=At(0.3), pairs=PAIRS)(edm()).losses["student"]
    loss({"student": Net({}, {}, student)}, batch, Progress(0), jax.random.key(0))
    np.testing.assert_array_equal(seen[0][0], batch["cond"])
    np.testing.assert_allclose(seen[0][1], 0.3)
    assert seen[0][2] is None  # s is left to other methods: a flow's estimate does not depend on where it goes


def test_the_u_shaped_law_has_its_density_and_moments():
    a, n = 4.0, 40_000
    norm = a / (2 * np.expm1(a))

    def density(u):
        return norm * (np.exp(a * u) + np.exp(a * (1 - u)))

    assert integrate.quad(density, 0, 1)[0] == pytest.approx(1, abs=1e-10)
    t = np.asarray(UShaped(a)(FLOW, jax.random.key(0), n), np.float64)
    u = (t - FLOW.t_min) / (1 - FLOW.t_min)
    cdf = 0.5 + norm / a * (np.exp(a * u) - np.exp(a * (1 - u)))
    assert stats.kstest(cdf, "uniform").pvalue > 1e-3
    variance = integrate.quad(lambda u: (u - 0.5) ** 2 * density(u), 0, 1)[0]
    np.testing.assert_allclose(u.mean(), 0.5, atol=4 * np.sqrt(variance / n))
    np.testing.assert_allclose(u.var(), variance, rtol=0.02)
    assert variance > 1.3 / 12  # the ends have more than a uniform law's
    assert t.min() >= FLOW.t_min and t.max() <= 1


def test_nodes_are_drawn_with_their_probabilities():
    n = 20_000
    np.testing.assert_array_equal(Nodes(1)(FLOW, jax.random.key(0), 5), np.ones(5))
    values, counts = np.unique(np.asarray(Nodes(4, first=0.4)(FLOW, jax.random.key(0), n)), return_counts=True)
    np.testing.assert_allclose(values, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(counts / n, [0.2, 0.2, 0.2, 0.4], atol=4 * np.sqrt(0.24 / n))


def test_euler_on_rectified_flow_is_ddim_and_the_student_sampler():
    teacher, times = as_teacher(PLANE, FLOW), RectifiedFlow()(edm()).sampling.times(5)
    np.testing.assert_allclose(times, [1, 0.8, 0.6, 0.4, 0.2, 0])
    x = start = jax.random.normal(jax.random.key(0), (16, 2))
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * PLANE.velocity(FLOW, x, t)
    for solution in (
        sample(teacher, FLOW, times, start),
        euler(teacher.bind(), FLOW, jnp.asarray(times), start),
        ddim(teacher.bind(), FLOW, jnp.asarray(times), start),
    ):
        np.testing.assert_allclose(solution.x, x, rtol=1e-4, atol=1e-5)
        assert int(solution.nfe) == 5


@pytest.mark.parametrize("source", [edm(), vp(), trig()], ids=lambda p: type(p.schedule).__name__)
def test_a_teacher_of_another_process_is_carried_into_flow_exactly(source, x64):
    teacher = retime(as_teacher(PLANE, source), source, FLOW)
    t = jnp.asarray([0.02, 0.2, 0.5, 0.9, 0.985])
    x = FLOW.diffuse(
        PLANE.sample(jax.random.key(0), 5, dtype=jnp.float64), jax.random.normal(jax.random.key(1), (5, 2)), t
    )
    velocity = FLOW.velocity(teacher(x, t), x, t)
    np.testing.assert_allclose(velocity, PLANE.velocity(FLOW, x, t), atol=1e-9)
    if source == edm():
        denoised = PLANE.denoise(source, x / (1 - t)[:, None], t / (1 - t))
        np.testing.assert_allclose(velocity, (x - denoised) / t[:, None], atol=1e-12)  # rf++'s initialisation


def test_pairs_hold_the_noise_of_t_one_and_the_data_it_flows_to():
    source = edm()
    made = teacher_pairs(retime(gaussian(source), source, FLOW), FLOW, jax.random.key(0), 4000, (2,), steps=96)
    np.testing.assert_allclose(made["noise"].std(), 1, rtol=4 / np.sqrt(16_000))
    # The flow's map is z c; the teacher's own ends at σ = 80, where it is 1/80 of c² away from it.
    np.testing.assert_allclose(made["x"], C * made["noise"], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [0, 8], ids=["here", "over a mesh"])
def test_a_share_of_the_pairs_is_data_and_the_noise_it_flows_to(parts):
    rng = np.random.default_rng(0)
    stored = rng.normal(0, C, (6, 10, 2)).astype(np.float32)

    def data(step):
        return {"x": stored[step], "cond": np.full(10, step)}

    def pairs(teacher, process, wanted, number):
        return lambda step: {"x": np.zeros((10, 2), np.float32), "noise": np.ones((10, 2)), "cond": np.full(10, -1)}

    made = Reflow(k=2, count=40, teacher_steps=96, inverted=0.3)(edm())
    width = np.hypot((1 - FLOW.t_min) * C, FLOW.t_min)  # of data at t_min, which the flow takes to N(0, 1)
    place = Place(make_mesh(parts)) if parts else None  # whose eight devices do not divide three rows
    stage = stages_of(made, edm(), 10, data=lambda: data, pairs=pairs, optimizer=None, place=lambda: place)[0]
    source = stage.source(gaussian())
    for step in range(8):
        batch, there = source(step), step % 4  # 12 of 40 are inverted, three in each of four batches
        own = np.isin(np.arange(10), (3, 6, 9))
        np.testing.assert_array_equal(batch["cond"], np.where(own, there, -1))
        np.testing.assert_array_equal(batch["x"][own], stored[there, own])
        np.testing.assert_allclose(batch["noise"][own], stored[there, own] / width, rtol=1e-3)
        assert np.all(batch["noise"][~own] == 1) and np.all(batch["x"][~own] == 0)
    assert [r.method.pairs.inverted for r in made] == [0.3, 0.3] and Reflow()(edm())[0].method.pairs.inverted == 0
    for wrong in ({"inverted": 1.2}, {"inverted": 0.5, "points": 4}):
        with pytest.raises(ValueError, match="a share of pairs without path"):
            Pairs(10, 4, **wrong)


@pytest.mark.parametrize("processes", [2, 5])
def test_what_is_inverted_does_not_depend_on_the_number_of_processes(processes):
    stored = np.random.default_rng(0).normal(0, C, (4, 10, 2)).astype(np.float32)

    def source(part):
        def rows(step, of):
            return {"x": np.split(of, part[1])[part[0]]}

        return beside_inverted(
            lambda step: rows(step, np.zeros((10, 2), np.float32)) | {"noise": rows(step, np.ones((10, 2)))["x"]},
            lambda step: rows(step, stored[step]), gaussian(), edm(), share=0.2, count=40, steps=8, integrator=ddim,
            part=part,
        )  # fmt: skip

    whole, parts = source((0, 1)), [source((p, processes)) for p in range(processes)]
    for step in range(5):
        split = [part(step) for part in parts]
        for name in ("x", "noise"):
            np.testing.assert_allclose(np.concatenate([batch[name] for batch in split]), whole(step)[name], rtol=1e-6)
        assert np.sum(whole(step)["x"][:, 0] != 0) == 2


def test_straightness_and_cost_of_gaussian_data_in_closed_form():
    # Z_t = z r(t), r² = (1 − t)² c² + t², and so S = ∫ (r' − (r(1) − r(0)))² dt for unit z, at cost (1 − c)².
    def bend(t):
        r = np.sqrt((1 - t) ** 2 * C**2 + t**2)
        return ((t - (1 - t) * C**2) / r - (1 - C)) ** 2

    noise = jax.random.rademacher(jax.random.key(0), (8, 2)).astype(jnp.float32)
    found = straightness(gaussian(), FLOW, noise, steps=200, scale=1.0)
    assert found["straightness"] == pytest.approx(integrate.quad(bend, 0, 1)[0], rel=1e-3)
    assert found["transport_cost"] == pytest.approx((1 - C) ** 2, rel=1e-3)
    halved = straightness(gaussian(), FLOW, noise, steps=200)  # the default's unit, scale .5
    assert halved["straightness"] == pytest.approx(4 * found["straightness"], rel=1e-6)
    with pytest.raises(ValueError, match=r"given EDM: carry the network there with net.retime"):
        straightness(gaussian(edm()), edm(), noise)


def test_on_a_line_the_flow_is_monotone_and_reflow_makes_it_straight_at_the_same_cost():
    z = np.linspace(-2.5, 2.5, 41)
    noise = jnp.asarray(z[:, None], jnp.float32)
    teacher = as_teacher(LINE, FLOW)
    times = jnp.asarray(grids.uniform(FLOW, 2000))
    ends = np.asarray(jax.jit(lambda x: euler(teacher.bind(), FLOW, times, x).x)(noise))[:, 0]
    assert np.all(np.diff(ends) > 0)
    np.testing.assert_allclose(ends, quantile_map(z), atol=6e-3)  # the optimal coupling on a line, already

    table = np.linspace(-5, 5, 4001)
    image = quantile_map(table)

    def reflowed(params, rest, x, t, cond, *, s=None, key=None):
        """The flow of the monotone coupling: find the line through (x, t)."""

        def one(x, t):
            return jnp.interp(x, (1 - t) * jnp.asarray(image) + t * jnp.asarray(table), jnp.asarray(image))

        return jax.vmap(one)(x[:, 0], t)[:, None]

    drawn = jax.random.normal(jax.random.key(0), (256, 1))
    before, after = (straightness(net, FLOW, drawn, steps=40) for net in (teacher, Net({}, {}, reflowed)))
    assert before["straightness"] > 0.1 and after["straightness"] < 1e-3 * before["straightness"]
    assert after["transport_cost"] == pytest.approx(before["transport_cost"], rel=5e-3)
    batch = {"noise": drawn, "x": jnp.asarray(quantile_map(np.asarray(drawn)), jnp.float32)}
    assert loss_of(RectifiedFlow(times=At(0.5), pairs=PAIRS), Net({}, {}, reflowed), batch) < 1e-4
    np.testing.assert_allclose(sample(Net({}, {}, reflowed), FLOW, [1.0, 0.0], drawn).x, batch["x"], atol=5e-3)


def test_reflow_straightens_and_never_costs_more():
    # 2-RF as the minimum of its regression over the teacher's pairs, smoothed over a width of .02.
    width, n = 0.02, 2000
    fresh = jax.random.normal(jax.random.key(1), (100, 2))
    teacher = as_teacher(PLANE, FLOW)
    made = teacher_pairs(teacher, FLOW, jax.random.key(0), n, (2,), steps=32, integrator=rk4)
    noise, x = (jnp.asarray(made[name]) for name in ("noise", "x"))

    def regression(params, rest, y, t, cond, *, s=None, key=None):
        points = FLOW.diffuse(x[None], noise[None], t[:, None])
        weights = jax.nn.softmax(-jnp.sum((y[:, None] - points) ** 2, -1) / (2 * width**2), axis=1)
        return jnp.sum(weights[..., None] * x, 1)

    independent = transport_cost(noise, PLANE.sample(jax.random.key(2), n))
    first = straightness(teacher, FLOW, fresh, steps=30)
    second = straightness(Net({}, {}, regression), FLOW, fresh, steps=30)
    assert first["straightness"] > 0.3 and second["straightness"] < 0.02 * first["straightness"]
    assert independent > 2 * first["transport_cost"] and second["transport_cost"] < 1.05 * first["transport_cost"]
    one_step = [sample(net, FLOW, [1.0, 0.0], noise[:100]).x for net in (teacher, Net({}, {}, regression))]
    errors = [float(jnp.sqrt(jnp.mean((y - x[:100]) ** 2))) for y in one_step]
    assert errors[1] < 0.2 * errors[0]


def test_rounds_of_reflow_share_what_they_can():
    rounds = Reflow(k=4, nodes=8, count=77, teacher_steps=50, flow_steps=5, shares=(3.0, 1.0, 2.0))(edm())
    assert [r.name for r in rounds] == ["2-rf", "3-rf", "4-rf", "distilled"]
    assert [r.share for r in rounds] == [3, 1, 1, 2] and [r.number for r in rounds] == [0, 1, 2, 3]
    assert [r.method.pairs.steps for r in rounds] == [50, 5, 5, 5] and rounds[1].method is rounds[2].method
    assert all(r.method.needs == {"x", "noise"} and r.method.process == FLOW for r in rounds)
    np.testing.assert_allclose(rounds[-1].method.sampling.times(2), [1, 0.5, 0])
    assert [r.name for r in Reflow(k=2, nodes=0)(edm())] == ["2-rf"]
    alone = RectifiedFlow()(edm())
    assert alone.needs == {"x"} and alone.pairs is None and alone.process == FLOW
    with pytest.raises(ValueError, match="k = 1.*RectifiedFlow is 1-RF"):
        Reflow(k=1)(edm())


@pytest.mark.parametrize("nodes", [1, 10])
def test_consistency_of_a_straight_flow_has_no_loss_with_one_euler_step_for_an_interval(nodes):
    batch, straight = {"x": C * jax.random.normal(jax.random.key(0), (512, 2))}, affine_flow(0.7, 0.3)
    config = Consistency(nodes, nodes, solver=euler, solver_steps=1, distance=L2(), weighted=False)
    (last,) = FlowConsistency(consistency=config)(edm())
    assert last.method.process == FLOW

    def loss(teacher, student):
        nets = {"teacher": teacher, "student": student}
        return jax.jit(lambda: last.method.losses["student"](nets, batch, Progress(0), jax.random.key(1))[0])()

    assert loss(straight, straight) < 1e-10  # x̂0 of a straight flow is its consistency function
    assert loss(straight, affine_flow(0.7, -0.3)) > 1e-3
    if nodes > 1:
        assert loss(gaussian(), gaussian()) > 1e-4  # of a bent one it is not

    names = [r.name for r in FlowConsistency(k=3)(edm())]
    assert names == ["2-rf", "3-rf", "consistency"]
