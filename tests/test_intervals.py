"""Consistency on intervals for data N(0, c²): exact segment maps, single teacher steps, and the edges themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.integrators import Solution, ddim
from ddistill.losses.distances import L2
from ddistill.losses.weightings import DataWeight, EpsWeight
from ddistill.methods import Consistency
from ddistill.methods.base import Progress
from ddistill.methods.consistency import position
from ddistill.methods.intervals import Edges, Segments
from ddistill.methods.multistep import MultistepConsistency, addim
from ddistill.methods.phased import PhasedConsistency
from ddistill.net import Net
from ddistill.process import edm, flow, trig, vp
from ddistill.sample import sample

C = 0.5
PROCESSES = [edm(), vp(), flow(), trig()]
X = C * jax.random.normal(jax.random.key(0), (256, 2))


def by_name(process):
    return type(process.schedule).__name__


def width(process, t):
    return jnp.sqrt(process.alpha(t) ** 2 * C**2 + process.sigma(t) ** 2)


def teacher_of(process):
    def denoise(params, rest, x, t, cond, *, s, key):
        return (process.alpha(t) * C**2 / width(process, t) ** 2)[:, None] * x

    return Net({}, {}, denoise)


def exact_student(process, factor=1.0):
    """Jumps along the exact flow of N(0, c²), x · width(s)/width(t), to any s; times a factor."""

    def toward(params, rest, x, t, cond, *, s, key):
        there = factor * x * (width(process, s) / width(process, t))[:, None]
        return process.destination(x, t, there, s)

    return Net({}, {}, toward)


def exact_solver(denoise, process, nodes, x):
    return Solution(x * (width(process, nodes[-1]) / width(process, nodes[0]))[:, None], 1)


def loss_of(config, process, student, x=X, progress=Progress(0), **nets):
    loss = config(process).losses["student"]
    nets = {"teacher": teacher_of(process), "student": student, **nets}
    return jax.jit(lambda nets: loss(nets, {"x": x}, progress, jax.random.key(1))[0])(nets)


EXACT = Segments(solver=exact_solver)
PLAIN = {"distance": L2()}


@pytest.mark.parametrize(
    ("process", "config"),
    [(edm(), PhasedConsistency), (flow(), PhasedConsistency), (vp(), MultistepConsistency)],
    ids=lambda a: getattr(a, "__name__", ""),
)
def test_exact_segment_maps_have_no_loss(process, config):
    method = config(EXACT, **PLAIN)
    assert loss_of(method, process, exact_student(process)) < 1e-9
    assert loss_of(method, process, teacher_of(process)) > 1e-3


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_chained_phases_are_the_flow_map(process, steps):
    sampling = PhasedConsistency()(process).sampling
    x = process.prior(jax.random.key(0), (8, 2))
    assert sampling.gamma == 0
    there = sample(exact_student(process), process, sampling.times(steps), x).x
    np.testing.assert_allclose(there, x * C / width(process, process.t_max), rtol=1e-3)


def test_one_phase_is_consistency_distillation():
    process = edm()
    student = Net({}, {}, lambda p, r, x, t, c, *, s, key: jnp.tanh(x / (1 + t[:, None])) + 0.1 * s[:, None])
    segments, plain = Segments(phases=(1,)), dataclasses.replace(Consistency(), distance=L2())
    phased = loss_of(PhasedConsistency(segments, **PLAIN), process, student)
    np.testing.assert_allclose(phased, loss_of(plain, process, student), rtol=1e-3)
    # With the edge at the data the x0 that leads there is where it leads: a consistency model read out by DDIM.
    multistep = loss_of(MultistepConsistency(segments, weighting=DataWeight(), **PLAIN), process, student)
    np.testing.assert_allclose(
        multistep, loss_of(dataclasses.replace(plain, weighted=False), process, student), rtol=1e-3
    )


@pytest.mark.parametrize("process", [edm(), flow()], ids=by_name)
def test_one_interval_per_segment_regresses_on_one_step_of_the_teacher(process):
    one = Segments(phases=(4, 8), intervals=1, max_intervals=1, solver=ddim, solver_steps=1)
    # The x0 that DDIM's own step leads to is the teacher's estimate, whatever the student: a zero of the loss.
    config = MultistepConsistency(one, weighting=DataWeight(), **PLAIN)
    assert loss_of(config, process, teacher_of(process)) < 1e-5
    teacher = teacher_of(process)
    shifted = Net({}, {}, lambda *a, **k: teacher.apply(*a, **k) + 0.3)
    np.testing.assert_allclose(loss_of(config, process, shifted), 0.09, rtol=1e-2)
    # Weights are those of squared distances: of noise prediction α_t/σ_t, the root of 1/ρ².
    weighted = dataclasses.replace(config, weighting=EpsWeight())
    t = one.draw(process, Progress(0), jax.random.split(jax.random.key(1), 3)[0], len(X)).t
    expected = 0.09 * jnp.mean(process.alpha(t) / process.sigma(t))
    np.testing.assert_allclose(loss_of(weighted, process, shifted), expected, rtol=1e-2)
    # With the data for the teacher it is the regression on x0 that trains denoisers.
    trained = dataclasses.replace(config, from_data=True)
    zero = Net({}, {}, lambda p, r, x, t, c, **k: jnp.zeros_like(x))
    np.testing.assert_allclose(loss_of(trained, process, zero, teacher=None), jnp.mean(X**2), rtol=1e-2)
    assert loss_of(trained, process, teacher_of(process)) < loss_of(trained, process, exact_student(process))


@pytest.mark.parametrize("config", [MultistepConsistency, PhasedConsistency], ids=lambda c: c.__name__)
def test_no_gradient_reaches_the_landing(config):
    # The teacher's step ends at 0, from where the student, x̂0 = a everywhere, lands at (1 − e/s) a.
    process, e = edm(), 1.0

    def edges(process, steps):
        return jnp.asarray([process.t_max, e, 0.0])

    segments = Segments((2,), edges=edges, solver=lambda d, p, nodes, x: Solution(0 * x, 1))
    options = {"weighting": DataWeight()} if config is MultistepConsistency else {"weighted": False}
    method = config(segments, distance=lambda a, b: jnp.mean(a - b, axis=1), **options)

    def loss(a):
        return loss_of(method, process, Net(a, {}, lambda p, r, x, t, c, **k: jnp.full_like(x, p)))

    gradient = jax.grad(loss)(2.0)
    pair = segments.draw(process, Progress(0), jax.random.split(jax.random.key(1), 3)[0], len(X))
    # A distance linear in its first argument: what reaches the gradient is ∂/∂a of the estimate alone.
    own = 1.0 if config is MultistepConsistency else jnp.mean(1 - pair.edge / pair.t)
    np.testing.assert_allclose(gradient, own, rtol=1e-4)


def test_edges_are_nested_quantiles():
    for process in PROCESSES:
        edges = {k: np.asarray(Edges()(process, k)) for k in (1, 2, 4, 8)}
        for k, times in edges.items():
            assert len(times) == k + 1 and times[0] == np.float32(process.t_max) and times[-1] == 0
            assert np.all(np.diff(times) < 0)
            if k > 1:
                np.testing.assert_allclose(edges[k // 2], times[::2], rtol=1e-4)
    # Quartiles of the normal are at ±.6745.
    np.testing.assert_allclose(
        Edges(0.8, 1.2)(edm(), 4)[1:4], 0.8 * np.exp(1.2 * 0.67449 * np.asarray([1, 0, -1])), rtol=1e-4
    )


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
def test_pairs_stay_in_their_segment(process):
    count, n = 8000, 10
    segments = Segments((4,), intervals=n, max_intervals=n)
    t, s, edge, nodes = (np.asarray(a) for a in segments.draw(process, Progress(0), jax.random.key(0), count))
    edges = np.asarray(Edges()(process, 4))
    # The edge of t is the nearest below it, constant in each segment, and that of s too unless s is there.
    at = np.searchsorted(-edges, -t, side="right") - 1
    np.testing.assert_array_equal(edge, edges[at + 1])
    assert np.all((s >= edge) & (s < t)) and np.all(np.searchsorted(-edges, -s[s > edge]) - 1 == at[s > edge])
    np.testing.assert_allclose(np.bincount(at) / count, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / count))
    there, below = position(process, jnp.asarray(t), n), position(process, jnp.asarray(edge), n)
    expected = np.where(there + 1 < below, np.where(there > n - 2, n - 1, there + 1), below)  # t_min before the data
    np.testing.assert_allclose(position(process, jnp.asarray(s), n), expected, atol=5e-3)
    assert 0.1 < np.mean(s == edge) < 0.9
    assert np.all(np.diff(nodes, axis=0) <= 0) and np.array_equal(nodes[0], t) and np.array_equal(nodes[-1], s)


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
def test_solver_steps_divide_an_interval_and_intervals_shrink_while_training(process):
    segments = Segments(phases=(2,), intervals=10, max_intervals=40, solver_steps=2)
    pairs = [segments.draw(process, Progress(step, 100), jax.random.key(0), 256) for step in (0, 99)]
    lengths = []
    for pair, n in zip(pairs, (10.0, 40.0), strict=True):
        t, middle, s = (position(process, time, n, 7.0) for time in pair.nodes)
        whole = (pair.s > pair.edge) & (pair.s > process.t_min * 1.01)  # the last interval, to the data, is no ramp
        np.testing.assert_allclose(middle[whole], (t + s)[whole] / 2, atol=2e-2)
        assert np.mean(whole) > 0.5 and np.all(pair.nodes >= pair.edge)
        lengths.append(np.median((s - t)[whole]) / n)
    np.testing.assert_allclose(lengths, [1 / 10, 1 / 40], rtol=0.02)


def test_shares_are_those_of_the_phases():
    segments, process = Segments((1, 8), shares=(3.0, 1.0), edges=Edges()), edm()
    edge = np.asarray(segments.draw(process, Progress(0), jax.random.key(0), 16_000).edge)
    lowest = np.mean(edge == 0)  # of one phase all, of eight one in eight
    assert lowest == pytest.approx(0.75 + 0.25 / 8, abs=4 * np.sqrt(0.2 / 16_000))


def test_at_an_edge_the_jump_is_the_identity():
    wild = Net({}, {}, lambda p, r, x, t, c, **k: 100 * jnp.sin(x) + t[:, None])
    for process in PROCESSES:
        for edge in np.asarray(Edges()(process, 4))[:-1]:
            np.testing.assert_array_equal(wild.jump(process, X, edge, edge), X)


@pytest.mark.parametrize("process", [edm(), trig()], ids=by_name)
def test_addim_has_the_second_moment_of_steps_with_samples_of_the_data(process):
    x0, eps = jnp.asarray([[0.6, 0.0, 0.3], [0.0, 0.2, 0.0]]), jnp.asarray([[1.0, 2.0, -2.0], [1.1, 0.0, 0.7]])
    np.testing.assert_allclose(jnp.sum(x0 * eps, axis=1), 0, atol=1e-6)  # its assumption
    t, s, variance = jnp.full(2, 0.8), jnp.full(2, 0.3), jnp.asarray([0.04, 0.09])
    x = process.diffuse(x0, eps, t)
    np.testing.assert_allclose(addim(process, x0, x, t, s, 0 * variance), process.step(x0, x, t, s), rtol=1e-4)
    # x0 ± δ e over the coordinates e, δ² = 3 v: samples of variance v per coordinate about x0.
    shifts = jnp.sqrt(3 * variance)[None, :, None] * jnp.concatenate([jnp.eye(3), -jnp.eye(3)])[:, None]
    steps = jax.vmap(lambda shift: process.step(x0 + shift, x, t, s))(shifts)
    expected = jnp.mean(jnp.sum(steps**2, axis=2), axis=0)
    np.testing.assert_allclose(jnp.sum(addim(process, x0, x, t, s, variance) ** 2, axis=1), expected, rtol=1e-4)


def test_addim_is_the_teachers_step_where_it_is_asked_for():
    # One interval per segment and a student that is right where aDDIM leads.
    process = edm()
    config = MultistepConsistency(
        Segments((4,), intervals=1, max_intervals=1), addim=0.75, weighting=DataWeight(), **PLAIN
    )
    plain = dataclasses.replace(config, addim=1e-9)
    teacher = teacher_of(process)
    assert loss_of(plain, process, teacher) < 1e-6  # η → 0 is DDIM, whose x0 is the teacher's
    pair = config.segments.draw(process, Progress(0), jax.random.split(jax.random.key(1), 3)[0], len(X))
    noise = jax.random.normal(jax.random.split(jax.random.key(1), 3)[1], X.shape)
    x_t = process.diffuse(X, noise, pair.t)
    estimate = teacher(x_t, pair.t)
    x_s = addim(process, estimate, x_t, pair.t, pair.s, 0.75 * jnp.mean((estimate - X) ** 2, axis=1))
    expected = jnp.mean((estimate - process.destination(x_t, pair.t, x_s, pair.edge)) ** 2)
    np.testing.assert_allclose(loss_of(config, process, teacher), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="addim = 0.75 is of the teacher's step, and from_data takes none"):
        dataclasses.replace(config, from_data=True)


def test_segments_that_cannot_be_are_met_with_words():
    for wrong in ({"phases": ()}, {"phases": (1, 0)}, {"phases": (1, 2), "shares": (1.0,)}, {"shares": (1, 1, 1, 0)}):
        with pytest.raises(ValueError, match="phases = "):
            Segments(**wrong)


def test_other_numbers_of_steps_are_met_with_words():
    times = MultistepConsistency(Segments((1, 4)))(edm()).sampling.times
    assert len(times(4)) == 5
    with pytest.raises(ValueError, match=r"samples in \[1, 4\] steps; asked for 2: add it to phases"):
        times(2)
