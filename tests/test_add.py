"""Adversarial diffusion distillation: its distillation is SDS under one weight, and without it a GAN is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ddistill.losses.adversarial import Hinge
from ddistill.losses.times import LogNormal
from ddistill.methods.add import ADD, Exponential, ScoreDistillation
from ddistill.methods.adversarial import Adversary
from ddistill.methods.base import Progress, Space
from ddistill.methods.discriminators import Plain
from ddistill.methods.gan import GAN
from ddistill.net import EDMPrecondition, Net, from_nnx
from ddistill.networks import MLP
from ddistill.process import edm, flow, vp

X = 0.5 * jax.random.normal(jax.random.key(0), (8, 2))


def denoise(params, rest, x, t, cond, *, s=None, key=None):
    return params["a"] * jnp.sin(x) * jnp.cos(t)[:, None]


TEACHER = Net({"a": jnp.asarray(0.8)}, {}, denoise)


@dataclasses.dataclass(frozen=True)
class Times:
    """Fixed times, and the noise of `distillation` for its key."""

    t: tuple[float, ...] = tuple(np.linspace(0.2, 0.9, 8).tolist())

    def __call__(self, process, key, n):
        return jnp.asarray(self.t)


def noise_of(key):
    return jax.random.normal(jax.random.split(key)[1], X.shape)


@pytest.mark.parametrize("process", [vp(), edm(), flow()], ids=["vp", "edm", "flow"])
def test_under_its_weight_the_gradient_is_that_of_score_distillation(process):
    config, key, t = ADD(weighting=ScoreDistillation(), times=Times()), jax.random.key(3), Times()(process, None, 8)
    got = jax.grad(lambda x: config.distillation(process, TEACHER, x, None, key))(X)
    noise = noise_of(key)
    alpha, sigma = np.asarray(process.alpha(t))[:, None], np.asarray(process.sigma(t))[:, None]
    x_t = alpha * X + sigma * noise
    eps_hat = (x_t - alpha * TEACHER(x_t, t)) / sigma
    w = sigma**2 / (alpha**2 + sigma**2)
    np.testing.assert_allclose(got * X.size, w * (eps_hat - noise), rtol=2e-4, atol=1e-5)


def test_the_default_weight_is_the_signal_of_the_variance_preserving_process():
    t = jnp.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(Exponential()(vp(), t), vp().alpha(t), rtol=1e-5)
    np.testing.assert_allclose(Exponential()(edm(), t), 1 / np.sqrt(1 + t**2), rtol=1e-5)
    config, key = ADD(times=Times()), jax.random.key(3)
    t = Times()(edm(), None, 8)
    error = (X - TEACHER(X + t[:, None] * noise_of(key), t)) ** 2
    expected = np.mean(np.asarray(error) / np.sqrt(1 + t[:, None] ** 2))
    assert float(config.distillation(edm(), TEACHER, X, None, key)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def nets():
    student = from_nnx(MLP(2, 16, 1, rngs=nnx.Rngs(0)), edm(), EDMPrecondition())
    judge = Plain(16, 1)(edm(), student, jax.random.key(0), Space((2,)))
    judge = judge.replace(params=jax.tree.map(lambda w: w + 0.1, judge.params))
    return {"student": student, "teacher": TEACHER, "discriminator": judge}


def test_without_distillation_it_is_the_gan(nets):
    adversary = Adversary(Plain(16, 1), loss=Hinge())

    @jax.jit
    def of(nets):
        def loss(config, name):
            def by(params):
                changed = {**nets, name: nets[name].replace(params=params)}
                return config(edm()).losses[name](changed, {"x": X}, Progress(0), jax.random.key(1))[0]

            return jax.value_and_grad(by)(nets[name].params)

        whole = ADD(adversary, distill=2.5)
        alike = GAN(adversary, whole.steps, whole.first, whole.rate, whole.every, whole.ema)
        configs = (dataclasses.replace(whole, distill=0.0), alike, whole)
        return [(loss(config, "student"), loss(config, "discriminator")) for config in configs]

    without, gan, whole = of(nets)
    assert without[0][0] == gan[0][0] and without[1][0] == gan[1][0] == whole[1][0]
    np.testing.assert_array_equal(without[0][1]["outward.kernel"], gan[0][1]["outward.kernel"])
    assert whole[0][0] != gan[0][0]


def test_the_loss_is_the_sum_and_the_teacher_is_not_touched(nets):
    config = ADD(Adversary(Plain(16, 1)), distill=2.5, times=LogNormal())
    loss = config(edm()).losses["student"]

    def value(teacher):
        return loss({**nets, "teacher": teacher}, {"x": X}, Progress(0), jax.random.key(1))

    (total, metrics), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(TEACHER)
    assert float(total) == pytest.approx(float(metrics["adversarial"] + 2.5 * metrics["distillation"]), rel=1e-6)
    assert metrics["distillation"] > 0 and optax.tree.norm(gradient.params) == 0


def test_the_gradient_does_not_pass_the_teachers_input():
    # 2 c (x̂ − D): through the input there would be a term with D'.
    config, key, t = ADD(times=Times()), jax.random.key(3), Times()(edm(), None, 8)
    got = jax.grad(lambda x: config.distillation(edm(), TEACHER, x, None, key))(X)
    error = X - TEACHER(X + t[:, None] * noise_of(key), t)
    np.testing.assert_allclose(got * X.size, 2 * error / np.sqrt(1 + t[:, None] ** 2), rtol=1e-4, atol=1e-6)


def test_student_and_discriminator_have_rates_and_ratios_of_their_own():
    method = ADD(Adversary(rate=0.5), rate=0.25, every=2)(edm())
    assert method.rate == {"student": 0.25, "discriminator": 0.5} and method.every == {"student": 2}
    assert method.sampling.gamma == 1 and method.needs == {"x"}
    np.testing.assert_array_equal(method.sampling.times(1), [80, 0])
