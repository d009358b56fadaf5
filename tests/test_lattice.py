"""Where methods coincide: each equality is of two losses, written by two papers, on the same draws.

Random numbers are fixed for a test by their shape alone, so that two losses that split their keys differently see the
same noise and the same places in their ranges.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.integrators import ddim, ddpm, euler, heun, sde_dpmpp_2m
from ddistill.losses.distances import L2, PseudoHuber
from ddistill.losses.times import Nodes, Uniform
from ddistill.losses.weightings import DataWeight, VelocityWeight
from ddistill.methods import ADD, DMD, KD, SDS, Consistency, Denoising, LatentConsistency, MultiSample, sds_gradient
from ddistill.methods.add import ScoreDistillation
from ddistill.methods.base import Pairs, Progress, rounds
from ddistill.methods.consistency import node
from ddistill.methods.consistency_training import ConsistencyTraining
from ddistill.methods.ctm import CTM
from ddistill.methods.fake_scores import Delta
from ddistill.methods.guidance import Scales
from ddistill.methods.intervals import Segments
from ddistill.methods.invertible import Invertible
from ddistill.methods.multistep import MultistepConsistency
from ddistill.methods.phased import PhasedConsistency
from ddistill.methods.progressive import Progressive
from ddistill.methods.rectified_flow import RectifiedFlow
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net, diagonal
from ddistill.process import edm, flow, vp
from ddistill.sample import sample

MIXTURE = Mixture.from_covariances([0.6, 0.4], [[0.5, 0.1], [-0.7, 0.0]], [0.02 * np.eye(2)] * 2)
B = 8
X = np.random.default_rng(2).normal(size=(B, 2)).astype(np.float32) * 0.5


@pytest.fixture
def draws(monkeypatch):
    """Fix what jax.random answers: B places in (0, .8), and noise, alike for every key."""
    places = np.random.default_rng(0).uniform(0.02, 0.8, B).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(B, 2)).astype(np.float32)

    def uniform(key, shape=(), dtype=None, minval=0.0, maxval=1.0):
        return minval + (maxval - minval) * jnp.asarray(places[: shape[0]] if shape else places[0])

    monkeypatch.setattr(jax.random, "uniform", uniform)

    def normal(key, shape=(), dtype=None):
        return jnp.asarray(noise if len(shape) == 2 else noise[:, 0])

    monkeypatch.setattr(jax.random, "normal", normal)
    return places, noise


def student(process):
    """A student that reads everything: x, t and where it jumps to."""

    def apply(params, rest, x, t, cond, *, s, key):
        to = 0.0 if s is None else jnp.log1p(s)[:, None]
        return jnp.tanh(params["a"] * x + 0.1 * jnp.log1p(t)[:, None] + 0.3 * to)

    return Net({"a": jnp.asarray(0.7)}, {}, apply)


def loss_of(method, process, nets=None, **batch):
    """Loss and its gradient by the student's one parameter."""
    batch = {"x": X, **batch}
    nets = {"teacher": as_teacher(MIXTURE, process), "student": student(process), **(nets or {})}

    def value(a):
        trained = nets["student"].replace(params={"a": a})
        return method.losses["student"]({**nets, "student": trained}, batch, Progress(0), jax.random.key(0))[0]

    return np.asarray(jax.jit(jax.value_and_grad(value))(0.7))


def cd(**changes):
    return Consistency(intervals=6, max_intervals=6, weighted=False, **changes)


def test_ctm_to_the_data_from_neighbours_is_consistency_distillation(draws):
    process, config = edm(), cd(solver=heun, solver_steps=2)
    i, n = jnp.asarray(draws[0]) * 6, jnp.asarray(6.0)
    t, m, s = (node(process, i + k, n) for k in (0.0, 0.5, 1.0))

    class ToTheData(CTM):
        def times(self, process, key, count):
            return jnp.stack([t, m, s]), jnp.zeros_like(s)

    ctm = ToTheData(solver=heun, solver_steps=2, weighted=False, dsm=0.0)(process)
    np.testing.assert_allclose(loss_of(ctm, process), loss_of(config(process), process), rtol=1e-5)


def test_ctm_on_the_diagonal_is_denoising(draws):
    process = edm()
    ctm = CTM(dsm=1.0, dsm_times=Uniform(), dsm_weighting=VelocityWeight(), exact=False)(process)
    nets, batch = {"teacher": as_teacher(MIXTURE, process), "student": diagonal(student(process))}, {"x": X}
    part = ctm.losses["student"](nets, batch, Progress(0), jax.random.key(0))[1]["dsm"]
    denoising = Denoising(times=Uniform(), weighting=VelocityWeight())(process)
    np.testing.assert_allclose(part, loss_of(denoising, process, nets)[0], rtol=1e-5)


def test_latent_consistency_without_guidance_is_consistency_distillation(draws):
    process, cond = edm(), jnp.arange(B) % 2
    nets = {"teacher": as_teacher(dataclasses.replace(MIXTURE, labels=np.asarray([0, 1])), process)}
    lcm = LatentConsistency(nodes=60, skip=10, scales=Scales(1.0, 1.0, 1.0))(process)
    consistency = dataclasses.replace(cd(), weighted=True)(process)
    found = [loss_of(method, process, nets, cond=cond) for method in (lcm, consistency)]
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_phased_consistency_with_one_phase_is_consistency_distillation(draws):
    process = edm()
    phased = PhasedConsistency(Segments(phases=(1,), intervals=6, max_intervals=6), weighted=False)
    np.testing.assert_allclose(loss_of(phased(process), process), loss_of(cd()(process), process), rtol=1e-4)


def test_multistep_consistency_with_one_segment_is_consistency_distillation(draws):
    process = edm()
    one = Segments(phases=(1,), intervals=6, max_intervals=6)
    multistep = MultistepConsistency(one, weighting=DataWeight())
    np.testing.assert_allclose(loss_of(multistep(process), process), loss_of(cd()(process), process), rtol=1e-4)


def test_one_interval_per_phase_is_a_regression_on_one_step_of_the_teacher(draws):
    """Of phased and of multistep consistency alike; the first in the space of the edge, the second in that of x0."""
    process, teacher = edm(), as_teacher(MIXTURE, edm())
    one = Segments(phases=(4,), intervals=1, max_intervals=1, solver=ddim)
    pair = one.draw(process, Progress(0), jax.random.key(0), B)
    np.testing.assert_array_equal(pair.s, pair.edge)
    x_t = process.diffuse(jnp.asarray(X), jnp.asarray(draws[1]), pair.t)
    x0 = teacher(x_t, pair.t)

    def regression(a):
        estimate = student(process).replace(params={"a": a})(x_t, pair.t, s=pair.edge)
        there = [process.step(x, x_t, pair.t, pair.edge) for x in (estimate, x0)]
        return jnp.stack([jnp.mean(L2()(*there)), jnp.mean(L2()(estimate, x0))])

    phased = PhasedConsistency(one, distance=L2(), weighted=False)(process)
    multistep = MultistepConsistency(one, distance=L2(), weighting=DataWeight())(process)
    found = np.stack([loss_of(method, process) for method in (phased, multistep)], axis=1)
    expected = np.stack([regression(0.7), jax.jacobian(regression)(0.7)])
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_reverse_half_of_invertible_consistency_is_phased_consistency(draws):
    process = edm()

    class Alike(Segments):
        def draw(self, process, progress, key, count):
            phase = invertible.draw(process, key, count)
            p = jnp.minimum(jnp.asarray(draws[0]) * phase.intervals, phase.intervals - 0.01)
            nodes = invertible.nodes(process, phase, p, jnp.minimum(p + 1, phase.intervals))
            return Segments.draw(self, process, progress, key, count)._replace(
                t=nodes[0], s=nodes[-1], edge=phase.landing, nodes=nodes
            )

    class Absolute(Invertible):
        def apart(self, process, a, b, t):
            return self.distance(a, b)

    invertible = Absolute(phases=(4,), preserve=0.0)
    both = invertible(process).losses["reverse"]

    def reverse(nets, *rest):
        return both({**nets, "reverse": nets["student"], "forward": nets["student"]}, *rest)

    phased = PhasedConsistency(Alike(phases=(4,)))(process)
    np.testing.assert_allclose(
        loss_of(SimpleNamespace(losses={"student": reverse}), process), loss_of(phased, process), rtol=1e-4
    )


def test_consistency_training_is_distillation_of_a_teacher_that_knows_the_data(draws):
    process, x = edm(), jnp.asarray(X)
    oracle = Net({}, {}, lambda p, r, y, t, c, **k: x)
    distillation = loss_of(cd(solver=ddim, solver_steps=1)(process), process, {"teacher": oracle})

    @dataclasses.dataclass(frozen=True)
    class Same:
        def __call__(self, process, progress, key, count):
            i, n = jnp.asarray(draws[0]) * 6, jnp.asarray(6.0)
            return node(process, i, n), node(process, i + 1, n)

    training = loss_of(ConsistencyTraining(neighbours=Same(), weighted=False)(process), process)
    np.testing.assert_allclose(training, distillation, rtol=1e-4)


def test_consistency_training_against_the_data_is_denoising(draws):
    process = edm()
    nets = {"student": student(process)}

    @dataclasses.dataclass(frozen=True)
    class ToTheData:
        def __call__(self, process, progress, key, count):
            t = Uniform()(process, key, count)
            return t, jnp.zeros_like(t)

    training = ConsistencyTraining(neighbours=ToTheData(), distance=L2(), weighted=False)(process)
    # The student's estimate must not depend on s here: the diffusion model has none.
    plain = Net({"a": jnp.asarray(0.7)}, {}, lambda p, r, x, t, c, **k: jnp.tanh(p["a"] * x))
    nets = {"student": plain}
    denoising = Denoising(times=Uniform(), weighting=DataWeight())(process)
    np.testing.assert_allclose(loss_of(training, process, nets), loss_of(denoising, process, nets), rtol=1e-5)


def test_consistency_on_one_interval_is_knowledge_distillation(draws):
    process, teacher = edm(), as_teacher(MIXTURE, edm())
    config = Consistency(
        intervals=1,
        max_intervals=1,
        between=False,
        weighted=False,
        solver=euler,
        solver_steps=1,
        distance=PseudoHuber(),
    )
    x = jnp.asarray(X)
    noise = process.diffuse(x, jnp.asarray(draws[1]), process.t_max)
    made = euler(teacher.bind(), process, jnp.asarray([process.t_max, 0.0]), noise).x
    kd = KD(steps=(1,), distance=PseudoHuber())(process)
    distilled = loss_of(kd, process, noise=noise, **{"x": made})
    np.testing.assert_allclose(loss_of(config(process), process), distilled, rtol=1e-5)


def test_rectified_flow_on_independent_pairs_is_denoising_with_the_weight_of_the_velocity(draws):
    process = flow()
    plain = {"student": Net({"a": jnp.asarray(0.7)}, {}, lambda p, r, x, t, c, **k: jnp.tanh(p["a"] * x))}
    rectified = RectifiedFlow(times=Uniform())(process)
    denoising = Denoising(times=Uniform(), weighting=VelocityWeight())(process)
    np.testing.assert_allclose(loss_of(rectified, process, plain), loss_of(denoising, process, plain), rtol=1e-4)


def test_a_distilled_rectified_flow_is_knowledge_distillation(draws):
    process = flow()
    pairs = {"noise": jnp.asarray(draws[1]), "x": X}
    distilled = RectifiedFlow(Nodes(1), distance=None, data_distance=L2(), pairs=Pairs(1, 1))(process)
    # A flow's estimate does not depend on where it goes.
    plain = {"student": Net({"a": jnp.asarray(0.7)}, {}, lambda p, r, x, t, c, **k: jnp.tanh(p["a"] * x))}
    kd = KD(steps=(1,))(process)
    np.testing.assert_allclose(
        loss_of(distilled, process, plain, **pairs), loss_of(kd, process, plain, **pairs), rtol=1e-5
    )


@pytest.mark.parametrize("process", [edm(), vp(), flow()], ids=lambda p: type(p.schedule).__name__)
def test_score_distillation_is_distribution_matching_by_point_masses_and_by_one_sample(process):
    matching = [DMD(fake, SDS().times, SDS().weight) for fake in (Delta(), MultiSample())]
    sds, *others = (loss_of(config(process), process, x=jnp.zeros((1, 2))) for config in (SDS(), *matching))
    for other in others:
        np.testing.assert_allclose(other, sds, rtol=1e-5)


@pytest.mark.parametrize("process", [edm(), vp()], ids=lambda p: type(p.schedule).__name__)
def test_adversarial_distillation_without_an_adversary_is_score_distillation(process, draws):
    teacher, t = as_teacher(MIXTURE, process), jnp.linspace(0.2, 0.9, B)
    x, noise = jnp.asarray(X), jnp.asarray(draws[1])
    add = ADD(weighting=ScoreDistillation(), times=lambda process, key, n: t)
    by_add = jax.grad(lambda x: add.distillation(process, teacher, x, None, jax.random.key(0)))(x)
    np.testing.assert_allclose(by_add * x.size, sds_gradient(teacher, process, x, t, noise), rtol=1e-3, atol=1e-5)


def test_progressive_distillation_is_multistep_consistency_with_one_step_per_segment(monkeypatch):
    """With as many segments as steps nothing is left for the student to be consistent with but the teacher."""
    process, n = edm(), 4
    x, noise = jnp.full((n, 2), 0.4), jnp.asarray([[0.3, -1.1]] * n)
    places = jnp.arange(n) / n + 1e-6  # the upper end of each segment, one sample in each

    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), dtype=None: noise)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(), *a, **k: places)
    progressive = Progressive(
        start=2 * n, solver=ddim, solver_steps=1, weighting=DataWeight(), distance=L2(), rehearsal=0.0
    )

    def edges(process, steps):
        return progressive.node(process, jnp.arange(steps, -1, -1) / steps)

    class Halves(Segments):
        def draw(self, process, progress, key, count):
            u = 1 - jnp.arange(n) / n
            nodes = jnp.stack([progressive.node(process, u - k / (2 * n)) for k in range(3)])
            pair = Segments.draw(self, process, progress, key, count)
            return pair._replace(t=nodes[0], s=nodes[2], edge=nodes[2], nodes=nodes)

    segments = Halves(phases=(n,), edges=edges, intervals=n, max_intervals=n, solver=ddim, solver_steps=2)
    multistep = MultistepConsistency(segments, distance=L2(), weighting=DataWeight())
    halving = rounds(progressive(process))[0].method
    np.testing.assert_allclose(loss_of(halving, process, x=x), loss_of(multistep(process), process, x=x), rtol=1e-4)


@pytest.mark.parametrize("process", [edm(), flow()], ids=lambda p: type(p.schedule).__name__)
def test_euler_is_ddim_where_signal_and_noise_are_linear_in_time(process):
    teacher, times = as_teacher(MIXTURE, process).bind(), jnp.linspace(process.t_max, 0.0, 6)
    x = process.prior(jax.random.key(0), (5, 2))
    paths = [solver(teacher, process, times, x).x for solver in (euler, ddim)]
    np.testing.assert_allclose(*paths, rtol=1e-4, atol=1e-5)
    curved = [
        solver(as_teacher(MIXTURE, vp()).bind(), vp(), jnp.linspace(1.0, 0.0, 6), x).x for solver in (euler, ddim)
    ]
    assert np.abs(curved[0] - curved[1]).max() > 1e-2


def test_ddpm_is_ddim_with_full_noise_and_the_first_step_of_the_sde_solver():
    process, key = vp(), jax.random.key(1)
    teacher, times = as_teacher(MIXTURE, process).bind(), jnp.asarray([1.0, 0.4, 0.1])
    x = process.prior(jax.random.key(0), (5, 2))
    ends = [
        ddpm(teacher, process, times, x, key).x,
        ddim(teacher, process, times, x, key, eta=1.0).x,
    ]
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-5)
    one = jnp.asarray([1.0, 0.4])
    first = [s(teacher, process, one, x, key).x for s in (ddpm, sde_dpmpp_2m)]
    np.testing.assert_allclose(*first, rtol=1e-4, atol=1e-5)


def test_gamma_zero_is_the_flow_map_and_gamma_one_the_consistency_sampler():
    process, net = edm(), student(edm())
    times, x, key = jnp.asarray([80.0, 2.0, 0.0]), 80 * jax.random.normal(jax.random.key(0), (4, 2)), jax.random.key(7)
    by_hand = net.jump(process, net.jump(process, x, 80.0, 2.0), 2.0, 0.0)
    np.testing.assert_allclose(sample(net, process, times, x).x, by_hand, rtol=1e-5)
    renoised = net.jump(process, x, 80.0, 0.0) + 2 * jax.random.normal(jax.random.fold_in(key, 0), x.shape)
    by_hand = net.jump(process, renoised, 2.0, 0.0)
    np.testing.assert_allclose(sample(net, process, times, x, key, gamma=1.0).x, by_hand, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [Consistency(), ConsistencyTraining(), MultistepConsistency(), PhasedConsistency(), CTM(dsm=0.0), Invertible()],
    ids=lambda c: type(c).__name__,
)
def test_both_sides_of_a_loss_drop_the_same_units(config):
    process, keys = edm(), []
    teacher = as_teacher(MIXTURE, process)

    def apply(params, rest, x, t, cond, *, s, key):
        keys.append(None if key is None else tuple(np.asarray(jax.random.key_data(key))))
        return jax.lax.stop_gradient(x)

    nets = {"teacher": teacher, **dict.fromkeys(("student", "forward", "reverse"), Net({}, {}, apply))}
    for loss in config(process).losses.values():
        keys.clear()
        loss(nets, {"x": jnp.asarray(X)}, Progress(0), jax.random.key(1))
        assert len(keys) >= 2 and None not in keys
        assert len(set(keys)) == 1 + isinstance(config, CTM)  # whose denoising is a loss of its own
