"""Guidance, its distillation into an input of the student, latent consistency, and guidance that changes with time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ddistill.integrators import ddim
from ddistill.losses.distances import L2
from ddistill.methods import DMD, KD, Consistency, Denoising, MultiSample
from ddistill.methods.base import Progress, Round
from ddistill.methods.guidance import GuidanceDistillation, Guided, Scales, with_guidance
from ddistill.methods.lcm import LatentConsistency
from ddistill.methods.progressive import Progressive
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import (
    DynamicScale,
    EDMPrecondition,
    Net,
    Scaled,
    from_extra_scale,
    from_nnx,
    guided,
    guided_by_condition,
    noise_share,
    rescaled,
    time_share,
    to_extra_scale,
)
from ddistill.networks.mlp import MLP
from ddistill.process import discrete_vp, edm, flow, linear_betas
from ddistill.sample import sample
from ddistill.stages import run, stages_of

MIXTURE = Mixture.from_covariances(
    [0.5, 0.3, 0.2], [[0.6, 0.0], [-0.5, 0.4], [-0.3, -0.6]], [0.02 * np.eye(2)] * 3, labels=[0, 1, 2]
)
PROCESS = edm()
X = np.asarray(MIXTURE.sample(jax.random.key(9), 64))
LABELS = jnp.arange(64) % 3
BATCH = {"x": X, "cond": LABELS}


def network(seed=0, random=False):
    net = from_nnx(MLP(2, width=16, blocks=1, num_classes=3, rngs=nnx.Rngs(seed)), PROCESS, EDMPrecondition())
    if not random:
        return net
    keys = jax.random.split(jax.random.key(seed), len(net.params))
    return net.replace(
        params={n: p + 0.3 * jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, net.params.items(), strict=True)}
    )


def loss_of(method, nets, batch=BATCH, key=1):
    return jax.jit(lambda nets: method.losses["student"](nets, batch, Progress(0), jax.random.key(key))[0])(nets)


def noised(t):
    return PROCESS.diffuse(X, jax.random.normal(jax.random.key(2), X.shape), t)


def both(x, t):
    teacher = as_teacher(MIXTURE, PROCESS)
    return teacher(x, t, LABELS), teacher(x, t, jnp.full(64, -1))


def test_a_scale_in_the_condition_guides_sample_by_sample_and_linearly():
    teacher, t, w = as_teacher(MIXTURE, PROCESS), jnp.geomspace(0.1, 10, 64), jnp.linspace(0, 8, 64)
    x = noised(t)
    conditional, without = both(x, t)
    by_condition = guided_by_condition(teacher)
    answer = by_condition(x, t, Scaled(LABELS, w))
    np.testing.assert_allclose(answer, without + w[:, None] * (conditional - without), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer, guided(teacher, w, -1)(x, t, LABELS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_condition(x, t, Scaled(LABELS, jnp.ones(64))), conditional, rtol=1e-4, atol=1e-5)
    # Linear: the answer at the mean of two scales is the mean of the answers.
    ends = [by_condition(x, t, Scaled(LABELS, jnp.full(64, v))) for v in (2.0, 6.0, 4.0)]
    np.testing.assert_allclose(0.5 * (ends[0] + ends[1]), ends[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Scaled\(cond, w\); given"):
        by_condition(x, t, LABELS)


def test_the_two_conventions_differ_by_one():
    teacher, t = as_teacher(MIXTURE, PROCESS), 1.0
    x = noised(t)
    conditional, without = both(x, t)
    for extra in (0.0, 0.5, 7.0):
        meng = (1 + extra) * conditional - extra * without  # Meng et al. 2023, sec. 3.1
        lcm = conditional + extra * (conditional - without)  # Luo et al. 2023, eq. 13
        ours = guided(teacher, from_extra_scale(extra), -1)(x, t, LABELS)
        np.testing.assert_allclose(ours, meng, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours, lcm, rtol=1e-4, atol=1e-4)
        assert to_extra_scale(from_extra_scale(extra)) == extra
    # None is Imagen's 1 and LCM's 0; diffusers embeds guidance_scale − 1.
    assert to_extra_scale(1.0) == 0 and to_extra_scale(8.5) == 7.5


def test_scales_are_drawn_uniformly_in_their_measure():
    for law, cdf in (
        (Scales(1, 8), lambda w: np.log((1 + w) / 2) / np.log(9 / 2)),
        (Scales(6, 16, sampled=8, logarithmic=False), lambda w: (w - 6) / 10),
        (Scales(0, 4), lambda w: np.log1p(w) / np.log(5)),
    ):
        w = np.sort(np.asarray(law(jax.random.key(0), 20_000), np.float64))
        assert w[0] >= law.low and w[-1] <= law.high * (1 + 1e-6)
        np.testing.assert_allclose(cdf(w), (np.arange(20_000) + 0.5) / 20_000, atol=0.0125)  # Kolmogorov–Smirnov, .1 %
    for low, sampled, high in ((2, 1, 8), (1, 9, 8), (-1, 2, 8)):
        with pytest.raises(ValueError, match="0 <= low <= sampled <= high"):
            Scales(low, high, sampled)


def test_before_training_a_student_is_its_teacher_at_every_scale():
    net, t = network(), jnp.geomspace(0.1, 10, 64)
    plain = network(random=True)
    untouched = {n: (p if n.startswith("guidance") else plain.params[n]) for n, p in net.params.items()}
    assert any(n.startswith("guidance") for n in untouched)
    for w in (0.0, 1.0, 8.0):
        scaled = Scaled(LABELS, jnp.full(64, w))
        student = net.replace(params=untouched)
        np.testing.assert_array_equal(student(noised(t), t, scaled), student(noised(t), t, LABELS))
    assert np.abs(plain(noised(t), t, scaled) - plain(noised(t), t, LABELS)).max() > 1e-3


def test_stage_one_has_no_loss_at_the_guided_denoiser_and_else_what_guidance_adds():
    teacher = as_teacher(MIXTURE, PROCESS)
    stage = GuidanceDistillation(scales=Scales(1, 8))(PROCESS)[0].method
    assert loss_of(stage, {"teacher": teacher, "student": guided_by_condition(teacher)}) < 1e-9

    def by_label(params, rest, x, t, cond, *, s, key):
        return teacher(x, t, cond.cond)

    # The conditional teacher errs by (w − 1) (D_c − D_∅): 0 without guidance, and quadratic in w − 1.
    unguided = {"teacher": teacher, "student": Net({}, {}, by_label)}
    values = [
        float(loss_of(GuidanceDistillation(scales=Scales(w, w, w))(PROCESS)[0].method, unguided)) for w in (1, 2, 4)
    ]
    assert values[0] < 1e-9 < 1e-3 < values[1]
    assert values[2] / values[1] == pytest.approx(9, rel=1e-4)


def test_only_the_first_rounds_teacher_is_guided_and_rounds_of_a_method_stay_so():
    seen = []

    def loss(nets, batch, progress, key):
        seen.append((nets["teacher"], batch["cond"]))
        return jnp.zeros(()), {}

    method = dataclasses.replace(Denoising()(PROCESS), losses={"student": loss})
    made = [Round("a", method), Round("b", method, 2.0, 1), Round("c", method, 2.0, 2)]
    teacher = as_teacher(MIXTURE, PROCESS)

    def teachers(parts):
        seen.clear()
        for part in parts:
            part.method.losses["student"]({"teacher": teacher}, BATCH, Progress(0), jax.random.key(0))
        assert all(isinstance(cond, Scaled) and cond.w.shape == (64,) and cond.cond is LABELS for _, cond in seen)
        return [net is teacher for net, _ in seen]

    parts = with_guidance(made, Scales(sampled=3))
    assert teachers(parts) == [False, True, True] and parts[1].method is parts[2].method
    assert [(r.name, r.share, r.number) for r in parts] == [("a", 1.0, 0), ("b", 2.0, 1), ("c", 2.0, 2)]
    assert parts[0].method.sampling.guidance == 3
    taught = with_guidance(made, Scales(), taught=True)
    assert teachers(taught) == [True] * 3 and len({id(r.method) for r in taught}) == 1
    single = with_guidance(method, Scales())
    assert teachers([Round("", single)]) == [False]


def test_all_losses_of_a_step_see_the_same_scales():
    def loss(nets, batch, progress, key):
        return batch["cond"].w.sum(), {}

    method = Denoising()(PROCESS)
    method = dataclasses.replace(method, losses={"student": loss, "fake": loss}, init={"student": None, "fake": None})
    losses = with_guidance(method, Scales()).losses
    values = [f({"teacher": network()}, BATCH, Progress(0), jax.random.key(3))[0] for f in losses.values()]
    assert values[0] == values[1]


def test_what_guidance_cannot_be_distilled_from_is_said():
    with pytest.raises(ValueError, match="learns from teacher pairs"):
        with_guidance(KD()(PROCESS), Scales())
    with pytest.raises(ValueError, match=r"keeps samples from step to step \(queue\) cannot draw a guidance scale"):
        with_guidance(DMD(MultiSample(queue=8))(PROCESS), Scales())
    with pytest.raises(ValueError, match="no cond"):
        loss_of(Guided(Consistency())(PROCESS), {"teacher": network(), "student": network()}, {"x": X})
    with pytest.raises(ValueError, match="exact=True"):
        GuidanceDistillation(stage_one=Denoising())
    with pytest.raises(ValueError, match="between 0 and 1"):
        GuidanceDistillation(share=1.0)
    for skip in (0, 300, 600):
        with pytest.raises(ValueError, match="must divide nodes = 1000"):
            LatentConsistency(skip=skip)


def test_guidance_distillation_is_stage_one_and_then_the_other_method():
    then = Progressive(start=8)
    parts = GuidanceDistillation(then=then, share=0.4)(PROCESS)
    assert [r.name for r in parts] == ["guidance", "4-steps", "2-steps", "1-steps"]
    assert parts[0].share / sum(r.share for r in parts) == pytest.approx(0.4)
    assert [r.number for r in parts[1:]] == [0, 1, 2] and len({id(r.method) for r in parts[1:]}) == 1
    single = GuidanceDistillation(then=Consistency())(PROCESS)
    assert [r.name for r in single] == ["guidance", "student"]


@pytest.mark.parametrize("method", [LatentConsistency(), GuidanceDistillation(then=Progressive(start=4))])
def test_a_student_of_guidance_is_trained_and_sampled_with_its_scale(method, one_device):
    made = method(PROCESS)
    plan = stages_of(
        made, PROCESS, 9, data=lambda: lambda step: BATCH, pairs=None, optimizer=lambda n: optax.adam(1e-2),
        guide=lambda _: as_teacher(MIXTURE, PROCESS),
    )  # fmt: skip
    student = run(plan, network(), jax.random.key(0))[-1]
    sampling = plan[-1].method.sampling
    assert sampling.guidance == 2.0
    x = PROCESS.prior(jax.random.key(1), X.shape)

    def draw(w):
        cond = Scaled(LABELS, jnp.full(64, w))
        return sample(student, PROCESS, sampling.times(2), x, jax.random.key(2), gamma=sampling.gamma, cond=cond).x

    assert np.all(np.isfinite(draw(2.0))) and np.any(draw(2.0) != draw(6.0))


def test_latent_consistency_is_consistency_on_the_guided_teacher():
    teacher, student, w = as_teacher(MIXTURE, PROCESS), network(random=True), 3.0
    lcm = LatentConsistency(nodes=100, skip=10, solver=ddim, solver_steps=1, distance=L2(), scales=Scales(w, w, w))
    plain = Consistency(intervals=10, max_intervals=10, solver=ddim, solver_steps=1, distance=L2())(PROCESS)

    def fixed(params, rest, x, t, cond, *, s, key):
        return student(x, t, Scaled(cond, jnp.full(x.shape[0], w)), s=s)

    value = lcm(PROCESS).losses["student"](
        {"teacher": teacher, "student": student}, BATCH, Progress(0), jax.random.key(5)
    )[0]
    nets = {"teacher": guided(teacher, w, -1), "student": Net({}, {}, fixed)}
    expected = plain.losses["student"](nets, BATCH, Progress(0), jax.random.split(jax.random.key(5))[1])[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    unguided = plain.losses["student"](
        {**nets, "teacher": teacher}, BATCH, Progress(0), jax.random.split(jax.random.key(5))[1]
    )[0]
    assert abs(float(unguided / expected) - 1) > 1e-3


def test_latent_consistency_hands_its_settings_on():
    made = LatentConsistency(target_ema=0.9, ema=0.5)(edm())
    assert dict(made.ema) == {"ema": ("student", 0.5), "target": ("student", 0.9)}


def test_the_teacher_without_a_condition_sees_the_label_that_means_none():
    seen = []

    def apply(params, rest, x, t, cond, *, s, key):
        seen.append(np.asarray(cond))
        return x

    method = Guided(Denoising(exact=True), null=7)(edm())
    nets = {"teacher": Net({}, {}, apply), "student": Net({}, {}, lambda p, r, x, t, c, *, s, key: x)}
    method.losses["student"](nets, {"x": jnp.ones((3, 2)), "cond": jnp.arange(3)}, Progress(0), jax.random.key(0))
    np.testing.assert_array_equal(np.concatenate(seen), [0, 1, 2, 7, 7, 7])


def test_the_scale_reaches_both_branches_of_latent_consistency():
    seen = []

    def apply(params, rest, x, t, cond, *, s, key):
        seen.append(cond.w)
        return x

    loss_of(LatentConsistency()(PROCESS), {"teacher": as_teacher(MIXTURE, PROCESS), "student": Net({}, {}, apply)})
    assert len(seen) == 2 and seen[0] is seen[1]  # one traced value


def test_dynamic_guidance_falls_between_its_breakpoints():
    process = discrete_vp(linear_betas(1000))
    law = DynamicScale(process, low=0.4, high=0.8, axis=time_share)
    t = jnp.asarray([0.0, 399.0, 400.0, 500.0, 600.0, 799.0, 800.0, 1000.0])
    expected = [7.0, 7.0, 7.0, 5.5, 4.0, 1 + 6 * 0.001 / 0.4, 1.0, 1.0]  # 1 + (w − 1)(τ2 − t)/(τ2 − τ1)
    np.testing.assert_allclose(law(jnp.asarray(7.0), t), expected, rtol=1e-5)
    np.testing.assert_allclose(law(jnp.ones(8), t), 1)
    np.testing.assert_allclose(np.asarray(law(jnp.zeros(8), t))[[0, -1]], [0, 1])
    # σ/(α + σ) is the time of rectified flow, and EDM's σ in units of itself.
    np.testing.assert_allclose(noise_share(flow(), jnp.asarray([0.0, 0.3, 1.0])), [0, 0.3, 1], rtol=1e-6)
    np.testing.assert_allclose(
        DynamicScale(PROCESS)(jnp.asarray(3.0), jnp.asarray([2 / 3, 1.5, 4.0])), [3, 2, 1], rtol=1e-5
    )
    with pytest.raises(ValueError, match="0 <= low < high"):
        DynamicScale(process, low=0.8, high=0.4)


def test_a_rescaled_network_sees_the_scale_of_its_time():
    teacher, law = as_teacher(MIXTURE, PROCESS), DynamicScale(PROCESS)
    t, w = jnp.geomspace(0.1, 40, 64), jnp.linspace(1, 8, 64)
    x, dynamic = noised(t), rescaled(guided_by_condition(teacher), law)
    expected = guided(teacher, law(w, t), -1)(x, t, LABELS)
    np.testing.assert_allclose(dynamic(x, t, Scaled(LABELS, w)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"Scaled\(cond, w\); given"):
        dynamic(x, t, LABELS)

    # Under an integrator and under the students' sampler, whose jump takes the scale at its start: both are DDIM here.
    times = jnp.asarray([80.0, 3.0, 1.2, 0.5, 0.0])
    x = PROCESS.prior(jax.random.key(0), X.shape)
    by_hand = x
    for here, there in itertools.pairwise(times):
        here, there = jnp.full(64, here), jnp.full(64, there)
        by_hand = PROCESS.step(guided(teacher, law(w, here), -1)(by_hand, here, LABELS), by_hand, here, there)
    integrated = ddim(dynamic.bind(Scaled(LABELS, w)), PROCESS, times, x).x
    sampled = sample(dynamic, PROCESS, times, x, cond=Scaled(LABELS, w)).x
    np.testing.assert_allclose(integrated, by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sampled, by_hand, rtol=1e-4, atol=1e-5)


def test_guidance_outside_its_interval_is_none():
    teacher, t = as_teacher(MIXTURE, PROCESS), jnp.geomspace(0.1, 10, 64)
    x, w = noised(t), jnp.full(64, 5.0)
    answer = guided_by_condition(teacher, interval=(0.5, 2.0))(x, t, Scaled(LABELS, w))
    inside = (t >= 0.5) & (t <= 2.0)
    expected = guided(teacher, jnp.where(inside, w, 1.0), -1)(x, t, LABELS)
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
