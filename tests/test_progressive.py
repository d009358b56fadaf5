"""Progressive distillation where everything is linear: data N(0, c²), whose DDIM steps are factors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ddistill.integrators import ddim, heun
from ddistill.losses.weightings import DataWeight, EpsWeight, TruncatedSNRWeight, VWeight
from ddistill.methods.base import Progress
from ddistill.methods.progressive import Progressive, karras_node, uniform_node
from ddistill.net import EDMPrecondition, Net, from_nnx
from ddistill.networks.mlp import MLP
from ddistill.process import cosine, edm, flow, trig, vp, vp_cosine
from ddistill.sample import sample
from ddistill.stages import run, stages_of

C = 0.5
PROCESSES = pytest.mark.parametrize(
    "process", [edm(), vp(), vp_cosine(), flow(), trig()], ids=lambda p: type(p.schedule).__name__
)
SIMPLE = Progressive(start=8, solver=ddim, solver_steps=1, weighting=DataWeight())


def scale(process, t):
    return jnp.sqrt(process.alpha(t) ** 2 * C**2 + process.sigma(t) ** 2)


def gaussian_teacher(process):
    def denoise(params, rest, x, t, cond, *, s, key):
        return (process.alpha(t) * C**2 / scale(process, t) ** 2)[:, None] * x

    return Net({}, {}, denoise)


def jumper(process, slope):
    """A student that takes x at t to x · slope(s)/slope(t) at s; more so where it is bent."""

    def toward(params, rest, x, t, cond, *, s, key):
        s = jnp.zeros_like(t) if s is None else s
        here, there = (slope(u) * (1 + params["bend"] * u / process.t_max) for u in (t, s))
        return process.destination(x, t, x * (there / here)[:, None], s)

    return Net({"bend": jnp.asarray(0.0)}, {}, toward)


@functools.cache
def exact_student(process):
    return jumper(process, functools.partial(scale, process))


def everywhere(params, rest, x, t, cond, *, s, key):
    return params["a"] * jnp.ones_like(x)


def constant(value):
    return Net({"a": jnp.asarray(value)}, {}, everywhere)


@functools.cache
def compiled(config, process, batch):
    loss = config(process)[0].method.losses["student"]

    @jax.jit
    def value(nets, round):
        x = C * jax.random.normal(jax.random.key(0), (batch, 2))
        return loss(nets, {"x": x}, Progress(0, 1, round), jax.random.key(1))[0]

    return value


def loss_of(config, process, student, teacher, round=0, batch=256):
    value, nets = compiled(config, process, batch), {"teacher": teacher, "student": student}
    values = [value(nets, np.int32(r)) for r in np.atleast_1d(round)]
    return values[0] if isinstance(round, int) else np.asarray(values)


@PROCESSES
@pytest.mark.parametrize("node", [karras_node, uniform_node], ids=["karras", "uniform"])
def test_a_teacher_that_jumps_exactly_leaves_the_exact_student_without_loss(process, node):
    config = dataclasses.replace(SIMPLE, node=node)
    exact = exact_student(process)
    bent = exact.replace(params={"bend": jnp.asarray(1.0)})
    assert np.all(loss_of(config, process, exact, exact, (1, 2)) < 1e-9)
    assert np.all(loss_of(config, process, bent, exact, (1, 2)) > 1e-3)


@PROCESSES
def test_ddim_through_the_target_lands_where_the_teachers_two_steps_do(process, x64):
    u = jnp.arange(1, 9) / 8
    t, m, s = (karras_node(process, v) for v in (u, u - 1 / 16, u - 1 / 8))
    x_t = process.prior(jax.random.key(0), (8, 3), jnp.float64)
    x_s = ddim(gaussian_teacher(process).bind(), process, jnp.stack([t, m, s]), x_t).x
    target = process.destination(x_t, t, x_s, s)
    np.testing.assert_allclose(process.step(target, x_t, t, s), x_s, rtol=1e-10, atol=1e-10)
    single = [a.astype(jnp.float32) for a in (x_t, t, x_s, s)]
    landed = process.step(process.destination(*single), *single[:2], single[3])
    np.testing.assert_allclose(landed, x_s, rtol=1e-5, atol=1e-5)
    # ε and v of the target are those of the line from x_t to x_s: (x_t, x_s) = (α x0 + σ ε) at t and at s.
    eps = process.eps(target, x_t, t)
    alpha, sigma = process.alpha(s)[:, None], process.sigma(s)[:, None]
    np.testing.assert_allclose(alpha * target + sigma * eps, x_s, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(process.x0_from_v(process.v(target, x_t, t), x_t, t), target, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("process", "start"), [(edm(), 8), (vp(), 16), (flow(), 8)], ids=["EDM", "VP", "Flow"])
def test_a_linear_student_composes_the_fine_ddim_factors_at_every_halving(process, start):
    config = dataclasses.replace(SIMPLE, start=start)
    nodes = karras_node(process, jnp.arange(start, -1, -1) / start)
    teacher, ones = gaussian_teacher(process), jnp.ones((start, 1))
    step = jax.jit(lambda nodes: ddim(teacher.bind(), process, jnp.stack([nodes[:-1], nodes[1:]]), ones).x[:, 0])
    slopes = np.exp(np.append(np.cumsum(np.log(step(nodes))[::-1])[::-1], 0.0))  # x at 0 for x = 1 at a node
    student = jumper(process, lambda t: jnp.interp(t, nodes[::-1], 1 / slopes[::-1]))
    assert loss_of(config, process, student, teacher) < 1e-9
    assert np.all(loss_of(config, process, student, student, range(1, len(config.halvings))) < 1e-9)
    x = process.prior(jax.random.key(2), (4, 2))
    times = config(process)[-1].method.sampling.times

    @jax.jit
    def ends(x):
        fine = ddim(teacher.bind(), process, nodes, x).x
        return fine, [sample(student, process, times(steps), x).x for steps in (1, 2, 4)]

    fine, coarse = ends(x)
    for end in coarse:
        np.testing.assert_allclose(end, fine, rtol=2e-4, atol=1e-6)
    # The map of the fine steps is not the exact one, whose slope is C/scale(t_max).
    assert abs(float(fine[0, 0] / x[0, 0] * scale(process, process.t_max) / C) - 1) > 0.01


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2)])
def test_steps_of_the_first_solver_refine_the_first_target(solver, order):
    """The loss of the exact student is the square of the solver's error."""
    process, losses = flow(), []
    for steps in (4, 8):
        config = Progressive(
            start=4, stop=2, solver=solver, solver_steps=steps, weighting=DataWeight(), node=uniform_node
        )
        losses.append(float(loss_of(config, process, exact_student(process), gaussian_teacher(process), batch=512)))
    assert 0.5 * np.log2(losses[0] / losses[1]) == pytest.approx(order, abs=0.25)


def test_the_last_interval_regresses_on_the_teachers_own_answer_halfway():
    process = edm()
    config = dataclasses.replace(SIMPLE, start=2)
    teacher, m = gaussian_teacher(process), karras_node(process, jnp.asarray(0.5))

    def halfway(params, rest, x, t, cond, *, s, key):
        return teacher(process.step(teacher(x, t), x, t, m), m)

    assert loss_of(config, process, Net({}, {}, halfway), teacher) < 1e-12


def test_weights_are_those_of_the_outputs_and_truncation_takes_the_larger_loss():
    process, t = vp(), jnp.linspace(0.05, 0.9, 7)
    x_t, target, answer = (jax.random.normal(jax.random.key(i), (7, 3)) for i in range(3))

    def error(f):
        return np.mean((np.asarray(f(answer)) - np.asarray(f(target))) ** 2, axis=1)

    x0, eps = error(lambda a: a), error(lambda a: process.eps(a, x_t, t))
    expected = {
        DataWeight(): x0, EpsWeight(): eps, TruncatedSNRWeight(): np.maximum(x0, eps),
        VWeight(): error(lambda a: process.v(a, x_t, t)),
    }  # fmt: skip
    for weight, value in expected.items():
        np.testing.assert_allclose(weight(process, t) * x0, value, rtol=1e-3)
    snr = np.exp(process.log_snr(t))
    np.testing.assert_allclose(VWeight()(process, t), snr + 1, rtol=1e-4)
    assert np.any(x0 > eps) and np.any(eps > x0)


@pytest.mark.parametrize("weighting", [DataWeight(), EpsWeight(), TruncatedSNRWeight(), VWeight()])
def test_the_loss_is_the_weighted_error_worked_by_hand(weighting):
    # A teacher that answers 0 brings everything to 0; the student answers 2 at both nodes of two steps.
    process = vp()
    config = Progressive(start=4, stop=2, solver=ddim, weighting=weighting, node=uniform_node)
    value, gradient = jax.value_and_grad(lambda a: loss_of(config, process, constant(a), constant(0.0), batch=8192))(
        2.0
    )
    mean = np.mean(weighting(process, jnp.asarray([0.5, 1.0])))
    np.testing.assert_allclose(value, 4 * mean, rtol=0.05)
    np.testing.assert_allclose(gradient, 4 * mean, rtol=0.05)


@pytest.mark.parametrize("round", [0, 1])
def test_no_gradient_reaches_the_teacher(round):
    def loss(student, teacher):
        return loss_of(SIMPLE, edm(), constant(student), constant(teacher), round)

    by_student, by_teacher = jax.grad(loss, argnums=(0, 1))(1.0, 2.0)
    assert by_teacher == 0 and by_student != 0


def test_rehearsal_repeats_former_rounds_and_no_others():
    config = Progressive(start=64, rehearsal=0.25, serves=8)
    draw = jax.jit(lambda round, n: config._steps_of_each(jax.random.key(0), n, round, 40_000))
    former = {0: [], 1: [], 2: [], 3: [8], 4: [4, 8], 5: [2, 4, 8]}
    assert config.halvings == [32, 16, 8, 4, 2, 1]
    for round, now in enumerate(config.halvings):
        n, old = map(np.asarray, draw(round, float(now)))
        assert sorted(set(n[old])) == former[round] and set(n[~old]) == {now}
        share = 0.25 if former[round] else 0.0
        np.testing.assert_allclose(old.mean(), share, atol=0.01)
        for steps in former[round]:
            np.testing.assert_allclose((n == steps).mean(), share / len(former[round]), atol=0.01)


def test_former_steps_are_learnt_from_the_teachers_one_jump():
    """In rehearsal s is the teacher's own step away: a student that makes it has no loss, two half steps would not."""
    process = edm()

    # A teacher whose jumps do not compose: each jump scales by 1/2, however long it is.
    def toward(params, rest, x, t, cond, *, s, key):
        return process.destination(x, t, params["factor"] * x, jnp.zeros_like(t) if s is None else s)

    halves, quarters = (Net({"factor": jnp.asarray(factor)}, {}, toward) for factor in (0.5, 0.25))
    always = dataclasses.replace(SIMPLE, rehearsal=1.0)
    assert loss_of(always, process, halves, halves, round=2) < 1e-10 < loss_of(always, process, quarters, halves, 2)
    never = dataclasses.replace(SIMPLE, rehearsal=0.0)
    assert loss_of(never, process, quarters, halves, round=2) < 1e-10 < loss_of(never, process, halves, halves, 2)


@PROCESSES
def test_nodes_are_nested_and_uniform_in_their_warp(process):
    for node in (karras_node, uniform_node):
        fine, coarse = (np.asarray(node(process, jnp.arange(n + 1) / n)) for n in (16, 8))
        np.testing.assert_array_equal(fine[::2], coarse)
        assert fine[0] == 0 and fine[-1] == np.float32(process.t_max) and np.all(np.diff(fine) > 0)
    inner = np.asarray(karras_node(process, jnp.arange(1, 16) / 16))
    warped = np.exp(-np.asarray(process.half_log_snr(inner), np.float64)) ** (1 / 7)
    np.testing.assert_allclose(np.diff(warped), np.diff(warped).mean(), rtol=2e-3)


def test_a_process_without_signal_at_its_end_is_served():
    process = cosine()
    config = dataclasses.replace(SIMPLE, start=4)
    values = [
        loss_of(config, process, exact_student(process), teacher, round)
        for round, teacher in enumerate((gaussian_teacher(process), exact_student(process)))
    ]
    assert np.all(np.isfinite(values)) and values[1] < 1e-9


def test_rounds_halve_share_one_method_and_name_what_they_serve():
    rounds = Progressive(start=32, stop=2, last=3.0)(edm())
    assert [r.name for r in rounds] == ["16-steps", "8-steps", "4-steps", "2-steps"]
    assert [r.share for r in rounds] == [1.0, 1.0, 3.0, 3.0] and [r.number for r in rounds] == [0, 1, 2, 3]
    assert len({id(r.method) for r in rounds}) == 1
    times = rounds[-1].method.sampling.times
    assert [len(times(n)) - 1 for n in (2, 4, 8)] == [2, 4, 8]
    with pytest.raises(ValueError, match="2 or 4 or 8 steps, not in 1"):
        times(1)
    only = Progressive(start=32, rehearsal=0.0)(edm())[-1].method.sampling.times
    np.testing.assert_array_equal(only(1), [np.float32(80.0), 0.0])
    with pytest.raises(ValueError, match="samples in 1 steps, not in 2"):
        only(2)


@pytest.mark.parametrize(("start", "stop"), [(48, 1), (64, 3), (4, 4), (8, 0), (3, 2)])
def test_what_cannot_be_halved_is_said(start, stop):
    with pytest.raises(ValueError, match=f"halves start = {start} down to stop = {stop}"):
        Progressive(start=start, stop=stop)


def test_all_rounds_are_compiled_once(one_device):
    process, traces = edm(), []
    rounds = Progressive(start=8, solver_steps=1)(process)
    method = rounds[0].method

    def counted(*args):
        traces.append(1)
        return method.losses["student"](*args)

    one = dataclasses.replace(method, losses={"student": counted})
    rounds = [dataclasses.replace(r, method=one) for r in rounds]
    x = np.random.default_rng(0).normal(0, C, (16, 2)).astype(np.float32)
    plan = stages_of(
        rounds, process, 8, data=lambda: lambda step: {"x": x}, pairs=None, optimizer=lambda n: optax.adam(1e-3)
    )
    network = from_nnx(MLP(2, width=8, blocks=1, rngs=nnx.Rngs(0)), process, EDMPrecondition())
    results = run(plan, network, jax.random.key(0))
    assert len(results) == 3 and len(traces) == 1


def test_the_stochastic_sampler_finds_its_jumps_taught():
    """It takes a step of 1/n from every node of 2n (Meng et al. 2023, sec. 3.2)."""
    process, n, seen = edm(), 4, []
    config = dataclasses.replace(SIMPLE, start=4 * n, rehearsal=0.0, stochastic=True, node=uniform_node)
    loss, exact = config(process)[1].method.losses["student"], exact_student(process)

    def recorded(params, rest, x, t, cond, *, s, key):
        seen.append((np.asarray(t), np.asarray(s)))
        return exact.apply(params, rest, x, t, cond, s=s, key=key)

    nets = {"teacher": exact, "student": exact.replace(apply=recorded)}
    x = C * jax.random.normal(jax.random.key(0), (4096, 2))
    assert loss(nets, {"x": x}, Progress(0, 1, 1), jax.random.key(1))[0] < 1e-9  # the teacher's steps meet halfway
    taught, counts = np.unique(np.stack(seen[0]), axis=1, return_counts=True)
    nodes = np.arange(2 * n + 1, dtype=np.float32) / (2 * n) * process.t_max
    np.testing.assert_array_equal(taught, [nodes[2:], nodes[:-2]])
    # Of the n steps the lowest has no lower start; the others' halves are alike.
    np.testing.assert_allclose(counts / 4096, [1 / n, *[0.5 / n] * (2 * n - 2)], atol=4 * np.sqrt(0.25 * 0.75 / 4096))
