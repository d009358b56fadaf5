"""Naive distillation of data N(0, c²), exact map x c/√(α² c² + σ²), and the pairs that teachers make for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids
from ddistill.data.pairs import teacher_pairs
from ddistill.integrators import ddim, dpmpp_3m
from ddistill.losses.distances import L1
from ddistill.methods import KD
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net
from ddistill.process import edm, flow, trig, vp

C = 0.5
MIXTURE = Mixture.from_covariances(
    [0.5, 0.3, 0.2], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.02 * np.eye(2)] * 3, labels=[0, 1, 2]
)


def affine(slope, offset=0.0):
    """A student whose jump to the data is slope · x + offset."""
    return Net({"a": jnp.asarray(slope), "m": jnp.asarray(offset)}, {}, lambda p, r, x, t, c, **k: p["a"] * x + p["m"])


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_of(process, student, batch, config=KD()):
    return config(process).losses["student"]({"student": student}, batch, jnp.asarray(0), jax.random.key(0))[0]


def exact_pairs(process, n=256):
    noise = process.prior(jax.random.key(0), (n, 2))
    alpha, sigma = (float(f(process.t_max)) for f in (process.alpha, process.sigma))
    return {"noise": noise, "x": noise * C / np.sqrt(alpha**2 * C**2 + sigma**2)}


@pytest.mark.parametrize("process", [edm(), vp(), flow(), trig()], ids=lambda p: type(p.schedule).__name__)
def test_the_exact_map_has_no_loss_and_others_the_loss_worked_by_hand(process):
    batch = exact_pairs(process)
    exact = float(batch["x"][0, 0] / batch["noise"][0, 0])
    assert loss_of(process, affine(exact), batch) < 1e-12
    # a x against k x: loss (a − k)² mean x², gradient 2 (a − k) mean x².
    power = float(jnp.mean(batch["noise"] ** 2))
    value, gradient = jax.value_and_grad(lambda a: loss_of(process, affine(a), batch))(exact + 0.25)
    np.testing.assert_allclose([value, gradient], [0.0625 * power, 0.5 * power], rtol=1e-4)
    absolute = loss_of(process, affine(exact + 0.25), batch, KD(distance=L1()))
    np.testing.assert_allclose(absolute, 0.25 * jnp.mean(jnp.abs(batch["noise"])), rtol=1e-4)


def test_independent_pairs_teach_the_data_mean():
    process, n = edm(), 4096
    batch = {"noise": process.prior(jax.random.key(0), (n, 2)), "x": MIXTURE.sample(jax.random.key(1), n)}
    x = np.asarray(batch["x"], np.float64)
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    value, gradient = jax.value_and_grad(lambda s: loss_of(process, s, batch))(affine(0.0, mean.astype(np.float32)))
    np.testing.assert_allclose(value, np.trace(covariance) / 2, rtol=1e-5)  # not 0: the least loss there is
    np.testing.assert_allclose(gradient.params["m"], 0, atol=1e-6)
    # The noise says nothing of x: its slope's gradient, 2 E[noise (m − x)], is 0 within its Monte Carlo error.
    assert abs(float(gradient.params["a"])) < 4 * 80 * np.sqrt(2 * np.trace(covariance) / n)
    # The same noise with the x that belongs to it is learnt without a rest.
    coupled = {name: np.asarray(a) for name, a in exact_pairs(process).items()}
    slope = np.linalg.lstsq(coupled["noise"], coupled["x"], rcond=None)[0]
    np.testing.assert_allclose(slope, np.eye(2) * C / np.sqrt(C**2 + 80**2), atol=1e-8)
    assert loss_of(process, affine(float(slope[0, 0])), coupled) < 1e-12


def test_labels_reach_the_student():
    seen = []

    def student(params, rest, x, t, cond, *, s, key):
        seen.append((cond, t, s))
        return x

    labels, loss = jnp.asarray([2, 0, 1]), KD()(edm()).losses["student"]
    batch = {"noise": jnp.ones((3, 2)), "x": jnp.ones((3, 2)), "cond": labels}
    loss({"student": Net({}, {}, student)}, batch, jnp.asarray(0), jax.random.key(0))
    cond, t, s = seen[0]
    np.testing.assert_array_equal(cond, labels)
    np.testing.assert_array_equal(np.stack([t, s]), [[80.0] * 3, [0.0] * 3])


def test_it_samples_in_one_step_and_says_so():
    method = KD(pairs=77, teacher_steps=5)(edm())
    assert method.needs == {"x", "noise"} and (method.pairs.count, method.pairs.steps) == (77, 5)
    assert list(method.sampling.times(1)) == [80.0, 0.0] and method.sampling.gamma == 0
    with pytest.raises(ValueError, match="one step, from t_max to 0; given 2 steps"):
        method.sampling.times(2)


def pairs(count, batch_size, key=0, **kwargs):
    kwargs = {"steps": 6, "num_classes": 3, **kwargs}
    teacher = as_teacher(MIXTURE, edm())
    return teacher_pairs(teacher, edm(), jax.random.key(key), count, (2,), batch_size=batch_size, **kwargs)


@pytest.fixture(scope="module")
def whole():
    return pairs(11, 64)


def test_a_pair_depends_on_the_key_and_its_number_alone(whole):
    assert {name: a.shape for name, a in whole.items()} == {"noise": (11, 2), "x": (11, 2), "cond": (11,)}
    part = pairs(7, 3)
    np.testing.assert_array_equal(part["noise"], whole["noise"][:7])
    np.testing.assert_array_equal(part["cond"], whole["cond"][:7])
    np.testing.assert_allclose(part["x"], whole["x"][:7], rtol=1e-5, atol=1e-6)
    assert len(np.unique(whole["noise"])) == 22
    assert not np.any(pairs(11, 64, key=1)["noise"] == whole["noise"])


def test_a_pair_is_where_the_integrator_takes_its_noise(whole):
    teacher, grid = as_teacher(MIXTURE, edm()), grids.karras(edm(), 6)

    @functools.partial(jax.jit, static_argnums=0)
    def again(integrator, x, cond):
        return integrator(teacher.bind(cond), edm(), grid, x).x

    by_ddim = pairs(11, 64, integrator=ddim)
    assert np.abs(by_ddim["x"] - whole["x"]).max() > 1e-3
    for made, integrator in ((whole, dpmpp_3m), (by_ddim, ddim)):
        np.testing.assert_allclose(made["x"], again(integrator, made["noise"], made["cond"]), rtol=1e-5, atol=1e-6)
        # A label's only mode attracts its samples: 1 is seven of its standard deviations.
        assert np.abs(made["x"] - MIXTURE.means[made["cond"]]).max() < 1


def test_noise_is_normal_and_labels_are_uniform():
    n = 6000
    made = pairs(n, n, steps=1)
    np.testing.assert_allclose(made["noise"].std() / 80, 1, atol=4 / np.sqrt(2 * 2 * n))
    np.testing.assert_allclose(made["noise"].mean() / 80, 0, atol=4 / np.sqrt(2 * n))
    counts = np.bincount(made["cond"], minlength=3)
    assert made["cond"].min() == 0 and made["cond"].max() == 2
    np.testing.assert_allclose(counts / n, 1 / 3, atol=4 * np.sqrt(2 / 9 / n))
    assert set(pairs(3, 3, steps=1, num_classes=0)) == {"noise", "x"}
