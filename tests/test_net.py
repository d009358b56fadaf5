"""Net: preconditionings, guidance, retiming, and the student's second time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddistill import process as P
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import (
    BoundaryPrecondition,
    DataPrecondition,
    EDMPrecondition,
    EpsPrecondition,
    Net,
    VelocityPrecondition,
    VPrecondition,
    from_nnx,
    frozen,
    guided,
    retime,
)
from ddistill.networks import MLP

PROCESSES = [P.vp(), P.sub_vp(), P.vp_cosine(), P.cosine(), P.ve(), P.edm(), P.flow(), P.trig()]


class Constant(nnx.Module):
    """F = a given constant, whatever it sees."""

    def __init__(self, value):
        self.value = nnx.Param(jnp.asarray(value))

    def __call__(self, x, c_noise, cond=None, s_noise=None, *, rngs=None):
        return jnp.broadcast_to(self.value, x.shape)


@jax.jit
def answer(net, x, t, cond=None, s=None):
    return net(x, t, cond, s=s)


@functools.cache
def mlp(process, seed=0, **kwargs):
    return from_nnx(MLP(3, width=16, blocks=2, rngs=nnx.Rngs(seed), **kwargs), process, EDMPrecondition())


def randomised(net, scale=0.3):
    rng = np.random.default_rng(9)
    return net.replace(params=jax.tree.map(lambda p: p + np.float32(scale * rng.standard_normal(p.shape)), net.params))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.schedule).__name__)
def test_each_output_is_converted_by_its_own_linear_map(process, rng=np.random.default_rng(0)):
    x0, noise = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    t = jnp.linspace(0.2, 0.8, 5) * process.t_max

    @jax.jit
    def noised(x0):
        x = process.diffuse(x0, noise, t)
        return x, process.v(x0, x, t), process.velocity(x0, x, t)

    x, v, velocity = noised(x0)
    outputs = {EpsPrecondition: noise, VPrecondition: v, VelocityPrecondition: velocity, DataPrecondition: x0}
    for kind, output in outputs.items():
        if kind is EpsPrecondition and float(process.alpha(process.t_max)) == 0:
            continue
        net = from_nnx(Constant(output), process, kind())
        np.testing.assert_allclose(answer(net, x, t), x0, rtol=2e-3, atol=2e-3 if kind is EpsPrecondition else 1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.schedule).__name__)
def test_edm_precondition_has_unit_variances(process):
    # Var[c_in x] = Var[(x0 − c_skip x)/c_out] = 1 for data of standard deviation σ_d (Karras et al. 2022, app. B.6).
    sd = 0.5
    t = jnp.linspace(0.3, 1.0, 7) * process.t_max
    c_skip, c_out, c_in, _ = map(np.asarray, jax.jit(lambda t: EDMPrecondition(sd)(process, t))(t))
    alpha, sigma = np.asarray(process.alpha(t)), np.asarray(process.sigma(t))
    np.testing.assert_allclose(c_in**2 * (alpha**2 * sd**2 + sigma**2), 1, rtol=1e-5)
    target = ((1 - c_skip * alpha) ** 2 * sd**2 + c_skip**2 * sigma**2) / c_out**2
    np.testing.assert_allclose(target, 1, rtol=1e-4)


def test_edm_precondition_is_the_papers_table():
    t, sd = jnp.asarray([0.002, 0.3, 80.0]), 0.5
    c_skip, c_out, c_in, c_noise = EDMPrecondition(sd)(P.edm(), t)
    np.testing.assert_allclose(c_skip, sd**2 / (t**2 + sd**2), rtol=1e-6)
    np.testing.assert_allclose(c_out, t * sd / np.sqrt(t**2 + sd**2), rtol=1e-6)
    np.testing.assert_allclose(c_in, 1 / np.sqrt(t**2 + sd**2), rtol=1e-6)
    np.testing.assert_allclose(c_noise, np.log(t) / 4, rtol=1e-6)


@pytest.mark.parametrize("process", [P.edm(), P.vp(), P.flow()], ids=lambda p: type(p.schedule).__name__)
def test_boundaries_are_the_identity_whatever_the_network(process):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    net = from_nnx(Constant(jnp.full((3,), 7.0)), process, BoundaryPrecondition())
    expected = x / process.alpha(jnp.asarray(process.t_min))
    np.testing.assert_allclose(answer(net, x, process.t_min), expected, rtol=1e-6)
    if float(process.sigma(0.0)) == 0:
        net = from_nnx(Constant(jnp.full((3,), 7.0)), process, EDMPrecondition())
        np.testing.assert_array_equal(answer(net, x, 0.0), x)


@pytest.mark.parametrize("process", [P.cosine(), P.flow(), P.discrete_vp(P.zero_terminal_snr(P.linear_betas()))])
def test_eps_prediction_is_refused_where_alpha_is_zero(process):
    with pytest.raises(ValueError, match="alpha = 0.*zero terminal SNR.*v- or x0-prediction"):
        from_nnx(Constant(jnp.zeros(3)), process, EpsPrecondition())


def test_a_student_equals_its_teacher_for_every_s_before_training():
    net = mlp(P.edm())
    net = net.replace(params={**randomised(net).params, "target.kernel": net.params["target.kernel"]})
    x, t = jax.random.normal(jax.random.key(1), (6, 3)), jnp.linspace(0.1, 50, 6)
    for s in (0.0, 0.05, 10.0):
        np.testing.assert_array_equal(answer(net, x, t, s=s), answer(net, x, t))
    assert np.abs(answer(randomised(net), x, t, s=0.05) - answer(randomised(net), x, t)).max() > 1e-3
    assert set(net.params) > {"target.kernel"}


def test_jump_to_the_present_is_the_identity_bit_for_bit():
    net, x, t = randomised(mlp(P.edm())), jax.random.normal(jax.random.key(1), (6, 3)), jnp.linspace(0.1, 50, 6)
    np.testing.assert_array_equal(jax.jit(lambda net: net.jump(P.edm(), x, t, t))(net), x)


def test_labels_steer_and_the_null_label_is_no_label():
    net = randomised(mlp(P.edm(), num_classes=4))
    x = jax.random.normal(jax.random.key(1), (3, 3))
    np.testing.assert_array_equal(answer(net, x, 1.0, jnp.full(3, 4)), answer(net, x, 1.0))
    assert np.abs(answer(net, x, 1.0, jnp.full(3, 1)) - answer(net, x, 1.0)).max() > 1e-3
    with pytest.raises(ValueError, match="without classes"):
        mlp(P.edm())(x, 1.0, jnp.zeros(3, jnp.int32))


def test_guidance_is_linear_in_w_and_none_at_one():
    net = randomised(mlp(P.edm(), num_classes=4))
    x, t, cond = jax.random.normal(jax.random.key(1), (3, 3)), jnp.asarray([0.1, 1.0, 9.0]), jnp.asarray([0, 1, 3])
    null = jnp.full(3, 4)
    conditional, without = answer(net, x, t, cond), answer(net, x, t, null)
    for w in (0.0, 1.0, 3.5):
        expected = without + w * (conditional - without)
        np.testing.assert_allclose(answer(guided(net, w, 4), x, t, cond), expected, rtol=1e-4, atol=1e-5)
    interval = answer(guided(net, 5.0, 4, interval=(0.5, 2.0)), x, t, cond)
    np.testing.assert_allclose(interval[0], conditional[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(interval[1], (without + 5 * (conditional - without))[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs cond"):
        guided(net, 2.0, 4)(x, t)


def test_guidance_takes_one_doubled_forward_pass():
    batches = []

    def apply(params, rest, x, t, cond, *, s, key):
        batches.append(x.shape[0])
        return x

    guided(Net({}, {}, apply), 2.0, 4)(jnp.ones((5, 3)), 1.0, jnp.zeros(5, jnp.int32))
    assert batches == [10]


@pytest.mark.parametrize("target", [P.vp(), P.flow(), P.trig(), P.cosine(), P.sub_vp()])
def test_a_retimed_teacher_is_the_mixtures_own_denoiser_on_the_other_process(target):
    mixture, source = Mixture.load("ring8"), P.edm()
    retimed = retime(as_teacher(mixture, source), source, target)
    exact = as_teacher(mixture, target)
    x0, noise = mixture.sample(jax.random.key(0), 16), jax.random.normal(jax.random.key(1), (16, 2))

    @jax.jit
    def both(t):
        x = target.diffuse(x0, noise, t)
        return retimed(x, t), exact(x, t)

    for fraction in (0.05, 0.3, 0.7):
        np.testing.assert_allclose(*both(fraction * target.t_max), atol=2e-4)
    ends = answer(retimed, noise[:4], jnp.asarray([0.0, target.t_min, 0.5, target.t_max]))
    assert np.all(np.isfinite(ends))


def test_frozen_stops_parameters_and_not_inputs():
    net = randomised(mlp(P.edm()))
    x = jax.random.normal(jax.random.key(1), (3, 3))
    gradient = jax.jit(jax.grad(lambda p, x: frozen(net.replace(params=p))(x, 1.0).sum(), argnums=(0, 1)))
    by_params, by_x = gradient(net.params, x)
    assert all(not np.any(g) for g in jax.tree.leaves(by_params))
    assert np.abs(by_x).min() > 0


def test_equal_networks_share_a_compilation_and_match_parameters_by_name():
    f = jax.jit(lambda net, x: net(x, 1.0))
    x = jnp.ones((2, 3))
    nets = [from_nnx(MLP(3, width=8, blocks=12, rngs=nnx.Rngs(i)), P.edm(), EDMPrecondition()) for i in range(2)]
    results = [f(randomised(net), x) for net in nets]
    assert f._cache_size() == 1
    assert np.abs(results[0] - results[1]).max() > 0
    # Twelve blocks: "blocks.10" sorts before "blocks.2", and a match by position would permute them.
    net = randomised(nets[0])
    shuffled = net.replace(params=dict(sorted(net.params.items(), reverse=True)))
    np.testing.assert_array_equal(f(shuffled, x), results[0])


def test_networks_compute_in_bfloat16_and_answer_in_float32():
    net = mlp(P.edm(), dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(net.params))
    x = jax.random.normal(jax.random.key(1), (3, 3))
    jaxpr = jax.make_jaxpr(lambda x: net(x, 1.0))(x)
    assert jaxpr.out_avals[0].dtype == jnp.float32
    assert "bf16" in str(jaxpr)
