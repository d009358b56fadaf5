"""Curvature of trajectories against closed forms, and the laws of times that follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids
from ddistill.losses.curvature import Curved, curvature, curved, flat
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import cosine, edm, flow, trig, vp

C = 0.5
GAUSSIAN = Mixture.from_covariances([1.0], [[0.0, 0.0]], [C**2 * np.eye(2)])
THREE = Mixture.from_covariances(
    [0.5, 0.3, 0.2], [[2.0, 0.0], [-1.5, 1.0], [0.0, -2.0]], [v * np.eye(2) for v in (0.1, 0.2, 0.15)]
)
PROCESSES = pytest.mark.parametrize(
    "process", [edm(), vp(), flow(), trig(), cosine()], ids=lambda p: type(p.schedule).__name__
)


@PROCESSES
def test_a_gaussian_has_the_curvature_of_its_linear_flow(process):
    # x̄ = z √(c² + ρ²), ε̂ = z ρ/√(c² + ρ²): dε̂/dλ = −ρ dε̂/dρ = −z c² ρ/(c² + ρ²)^{3/2}, E z² = 1.
    lam = jnp.linspace(-2.5, 3.5, 13)
    rho = np.exp(-np.asarray(lam))
    x0 = GAUSSIAN.sample(jax.random.key(0), 20_000)
    found = curvature(as_teacher(GAUSSIAN, process).bind(), process, x0, lam, jax.random.key(1))
    np.testing.assert_allclose(found, C**2 * rho / (C**2 + rho**2) ** 1.5, rtol=0.03)


def test_it_is_the_change_of_the_noise_estimate_along_an_integrated_trajectory(x64):
    process, teacher = edm(), as_teacher(THREE, edm())
    x0 = THREE.sample(jax.random.key(0), 50, dtype=jnp.float64)
    lam = 0.3
    found = curvature(teacher.bind(), process, x0, jnp.asarray([lam]), jax.random.key(1))[0]
    x = x0 + np.exp(-lam) * jax.random.normal(jax.random.key(1), x0.shape, x0.dtype)

    def eps(x, rho):
        return (x - teacher(x, rho)) / rho

    def walk(rho):
        """ε̂ at a near ρ, carried there by one step of the midpoint rule."""
        step = rho - np.exp(-lam)
        return eps(x + step * eps(x + step / 2 * eps(x, np.exp(-lam)), np.exp(-lam) + step / 2), rho)

    h = 1e-4
    slope = (walk(np.exp(-lam - h)) - walk(np.exp(-lam + h))) / (2 * h)
    np.testing.assert_allclose(found, jnp.sqrt(jnp.mean(slope**2)), rtol=1e-6)


def test_three_modes_bend_most_at_a_ratio_of_point_eight_within_a_fifth_of_the_range():
    process, lam = edm(), jnp.linspace(-4.0, 6.0, 101)
    x0 = THREE.sample(jax.random.key(0), 4000)
    k2 = np.asarray(curvature(as_teacher(THREE, process).bind(), process, x0, lam, jax.random.key(1))) ** 2
    assert np.exp(-lam[k2.argmax()]) == pytest.approx(0.8, abs=0.15)
    top = np.sort(k2)[::-1]
    assert top[:20].sum() / top.sum() > 0.6


@PROCESSES
def test_the_warp_is_the_inverse_of_the_cumulative_law(process):
    law = Curved((-3.0, -1.0, 0.0, 2.0), (0.2, 0.7, 0.1))
    lam = process.half_log_snr(law.warp(process, jnp.asarray([0.1, 0.2, 0.55, 0.9, 0.95])))
    np.testing.assert_allclose(lam, [-2.0, -1.0, -0.5, 0.0, 1.0], atol=2e-3)
    ends = law.warp(process, jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(ends, np.asarray([process.t_max, process.t_min], np.float32))
    u = jnp.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(law.position(process, law.warp(process, u)), u, atol=2e-3)
    t = law(process, jax.random.key(0), 20_000)
    share = np.histogram(process.half_log_snr(t), law.nodes)[0] / t.size
    np.testing.assert_allclose(share, law.shares, atol=0.01)


def test_shares_are_the_curvatures_mixed_with_the_grids_own():
    process, grid = edm(), grids.log_snr_uniform(edm(), 40, start=20.0, end=0.02)
    teacher, x0, key = (
        as_teacher(GAUSSIAN, process).bind(),
        GAUSSIAN.sample(jax.random.key(0), 20_000),
        jax.random.key(1),
    )
    edges = -np.log(grid)
    rho = np.exp(-(edges[1:] + edges[:-1]) / 2)
    kappa = C**2 * rho / (C**2 + rho**2) ** 1.5
    for power in (1.0, 2.0):
        pure = curved(teacher, process, x0, key, grid, uniform=0.0, power=power)
        np.testing.assert_allclose(pure.shares, kappa**power / np.sum(kappa**power), rtol=0.1)
        mixed = curved(teacher, process, x0, key, grid, uniform=0.3, power=power)
        np.testing.assert_allclose(mixed.shares, 0.7 * np.asarray(pure.shares) + 0.3 / 40, rtol=1e-5)
    uniform = curved(teacher, process, x0, key, grid, uniform=1.0)
    np.testing.assert_allclose(uniform.shares, 1 / 40)
    assert hash(mixed) == hash(curved(teacher, process, x0, key, grid, uniform=0.3, power=2.0))
    # A grid that is uneven in λ: mass is κ times the interval, not κ.
    karras = grids.karras(process, 30, final=None)
    law = curved(teacher, process, x0, key, karras, uniform=0.0)
    i = [5, 15, 25]
    edges = -np.log(karras)
    rho = np.exp(-(edges[1:] + edges[:-1]) / 2)
    mass = C**2 * rho / (C**2 + rho**2) ** 1.5 * np.diff(edges)
    np.testing.assert_allclose(np.asarray(law.shares)[i] / law.shares[10], mass[i] / mass[10], rtol=0.1)


def test_weights_turn_means_under_the_law_into_means_under_the_uniform_one():
    process = edm()
    law = Curved((-4.0, -1.0, 0.5, 2.0, 4.0), (0.1, 0.5, 0.3, 0.1))
    t = law(process, jax.random.key(0), 100_000)
    weight, values = law.weight(process, t, flat(law)), np.exp(-np.log(t) / 3)
    even = flat(law)(process, jax.random.key(1), 100_000)
    np.testing.assert_allclose(np.mean(weight), 1, rtol=0.01)
    np.testing.assert_allclose(np.mean(weight * values), np.mean(np.exp(-np.log(even) / 3)), rtol=0.02)
    np.testing.assert_allclose(law.weight(process, jnp.exp(-jnp.asarray([0.0])), flat(law)), 0.25 / 0.5)


def test_mistakes_are_answered_in_words():
    with pytest.raises(ValueError, match="one more than shares; given 2"):
        Curved((0.0, 1.0), (0.5, 0.5))
    with pytest.raises(ValueError, match="increasing"):
        Curved((1.0, 0.0), (1.0,))
    with pytest.raises(ValueError, match="sum to 0.9"):
        Curved((0.0, 1.0, 2.0), (0.5, 0.4))
    with pytest.raises(ValueError, match="same nodes"):
        Curved((0.0, 1.0), (1.0,)).weight(edm(), jnp.ones(1), Curved((0.0, 2.0), (1.0,)))
    teacher, x0 = as_teacher(GAUSSIAN, flow()).bind(), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="uniform = 1.5"):
        curved(teacher, flow(), x0, jax.random.key(0), [0.9, 0.1], uniform=1.5)
    with pytest.raises(ValueError, match="half-log-SNR is infinite"):
        curved(teacher, flow(), x0, jax.random.key(0), [0.5, 0.1, 0.0])


def test_a_grid_that_begins_without_signal_begins_at_the_largest_ratio():
    process, grid = flow(), grids.karras(flow(), 20, final=None)
    law = curved(as_teacher(GAUSSIAN, process).bind(), process, jnp.ones((8, 2)), jax.random.key(0), grid)
    assert grid[0] == 1 and law.nodes[0] == pytest.approx(-np.log(1000))
    t = law(process, jax.random.key(1), 1000)
    assert np.all((t >= process.t_min) & (t <= process.t_max))
