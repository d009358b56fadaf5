"""Naive distillation of data N(0, c²), whose trajectories are multiples of √(α² c² + σ²)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids
from ddistill.losses.distances import L1, Perceptual
from ddistill.methods import KD
from ddistill.methods.base import Progress
from ddistill.mixture import Mixture
from ddistill.net import Net
from ddistill.process import edm, expand, flow, trig, vp
from ddistill.sample import sample

C = 0.5
ONE = KD(steps=(1,))
PROCESSES = pytest.mark.parametrize("process", [edm(), vp(), flow(), trig()], ids=lambda p: type(p.schedule).__name__)
MIXTURE = Mixture.from_covariances(
    [0.5, 0.3, 0.2], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.02 * np.eye(2)] * 3, labels=[0, 1, 2]
)


def affine(slope, offset=0.0):
    """A student whose jump to the data is slope · x + offset."""
    return Net({"a": jnp.asarray(slope), "m": jnp.asarray(offset)}, {}, lambda p, r, x, t, c, **k: p["a"] * x + p["m"])


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_of(process, student, batch, config=ONE):
    return config(process).losses["student"]({"student": student}, batch, Progress(0), jax.random.key(0))[0]


def width(process, t):
    return jnp.sqrt((process.alpha(t) * C) ** 2 + process.sigma(t) ** 2)


def integrator(process, error=0.0):
    """The student that knows the trajectories, its estimate of x0 wrong by a constant."""

    def x0(params, rest, x, t, cond, *, s, key):
        return process.destination(x, t, x * expand(width(process, s) / width(process, t), x), s) + params["error"]

    return Net({"error": jnp.asarray(error)}, {}, x0)


def exact_paths(process, n=64, points=8):
    noise = process.prior(jax.random.key(0), (n, 2))
    widths = width(process, jnp.asarray(grids.karras(process, points), jnp.float32))
    return {"path": noise[:, None] * (widths / widths[0])[None, :, None]}


def exact_pairs(process, n=256):
    noise = process.prior(jax.random.key(0), (n, 2))
    alpha, sigma = (float(f(process.t_max)) for f in (process.alpha, process.sigma))
    return {"noise": noise, "x": noise * C / np.sqrt(alpha**2 * C**2 + sigma**2)}


@PROCESSES
def test_the_exact_map_has_no_loss_and_others_the_loss_worked_by_hand(process):
    batch = exact_pairs(process)
    exact = float(batch["x"][0, 0] / batch["noise"][0, 0])
    assert loss_of(process, affine(exact), batch) < 1e-12
    # a x against k x: loss (a − k)² mean x², gradient 2 (a − k) mean x².
    power = float(jnp.mean(batch["noise"] ** 2))
    value, gradient = jax.value_and_grad(lambda a: loss_of(process, affine(a), batch))(exact + 0.25)
    np.testing.assert_allclose([value, gradient], [0.0625 * power, 0.5 * power], rtol=1e-4)
    absolute = loss_of(process, affine(exact + 0.25), batch, KD(steps=(1,), distance=L1()))
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

    labels, loss = jnp.asarray([2, 0, 1]), ONE(edm()).losses["student"]
    batch = {"noise": jnp.ones((3, 2)), "x": jnp.ones((3, 2)), "cond": labels}
    loss({"student": Net({}, {}, student)}, batch, Progress(0), jax.random.key(0))
    cond, t, s = seen[0]
    np.testing.assert_array_equal(cond, labels)
    np.testing.assert_array_equal(np.stack([t, s]), [[80.0] * 3, [0.0] * 3])


@PROCESSES
def test_the_exact_integrator_has_no_loss_and_samples_exactly_in_any_number_of_steps(process):
    batch, config = exact_paths(process), KD()
    scale = float(jnp.mean(batch["path"][:, -1] ** 2))
    assert loss_of(process, integrator(process), batch, config) < 1e-7 * scale
    # An x0 that is wrong by a constant is so at every jump: the loss is its square, the gradient twice it.
    value, gradient = jax.value_and_grad(lambda s: loss_of(process, s, batch, config))(integrator(process, 0.25))
    np.testing.assert_allclose([value, gradient.params["error"]], [0.0625, 0.5], rtol=2e-4)
    for steps in config.steps:
        times = config(process).sampling.times(steps)
        assert len(times) == steps + 1 and (times[0], times[-1]) == (process.t_max, 0)
        x = sample(integrator(process), process, times, batch["path"][:, 0]).x
        np.testing.assert_allclose(x, batch["path"][:, -1], rtol=2e-4, atol=1e-5)


def test_the_loss_is_the_average_over_the_law_of_jumps():
    # One path for all samples and a student that says 0: the loss is the mean square of x0 over the jumps drawn.
    n, config, process = 40_000, KD(steps=(1, 2, 4), few=0.4), edm()
    path = np.asarray([[3.0], [-1.0], [0.5], [2.0], [1.5]])
    nodes = grids.karras(process, 4)
    values, law = [], []
    for steps, share in ((1, 0.4), (2, 0.2), (4, 0.4)):
        for k in range(steps):
            i, j = k * 4 // steps, (k + 1) * 4 // steps
            x0 = (nodes[i] * path[j] - nodes[j] * path[i]) / (nodes[i] - nodes[j])  # the line through both, at σ = 0
            values.append(float(x0[0] ** 2))
            law.append(share / steps)
    mean = np.dot(law, values)
    deviation = np.sqrt(np.dot(law, np.square(values)) - mean**2)
    loss = loss_of(process, affine(0.0), {"path": jnp.broadcast_to(jnp.asarray(path, jnp.float32), (n, 5, 1))}, config)
    np.testing.assert_allclose(loss, mean, atol=4 * deviation / np.sqrt(n))


def test_a_perceptual_distance_adds_that_of_its_features():
    process = edm()
    batch = exact_pairs(process)
    exact = float(batch["x"][0, 0] / batch["noise"][0, 0])
    config = KD(steps=(1,), distance=Perceptual(lambda x: (x**2,), pixel=0.5))
    assert loss_of(process, affine(exact), batch, config) < 1e-12
    fourth, power = (float(jnp.mean(batch["noise"] ** k)) for k in (4, 2))
    by_hand = 0.5 * 0.01 * power + ((exact + 0.1) ** 2 - exact**2) ** 2 * fourth
    np.testing.assert_allclose(loss_of(process, affine(exact + 0.1), batch, config), by_hand, rtol=1e-4)


def test_it_asks_for_the_pairs_it_needs_and_samples_in_the_steps_it_was_taught():
    method = KD(steps=(1,), pairs=77, teacher_steps=5)(edm())
    assert method.needs == {"x", "noise"}
    assert (method.pairs.count, method.pairs.steps, method.pairs.points) == (77, 5, 0)
    assert list(method.sampling.times(1)) == [80.0, 0.0] and method.sampling.gamma == 0
    with pytest.raises(ValueError, match=r"taught \(1,\) steps; given 2 steps"):
        method.sampling.times(2)
    method = KD(steps=(2, 4))(edm())
    assert method.needs == {"path"} and method.pairs.points == 4
    np.testing.assert_array_equal(method.sampling.times(2), grids.karras(edm(), 4)[[0, 2, 4]])


@pytest.mark.parametrize("steps", [(), (0, 2), (3, 8)])
def test_numbers_of_steps_must_divide_the_largest(steps):
    with pytest.raises(ValueError, match="divides the largest"):
        KD(steps=steps)
