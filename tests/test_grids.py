import functools
import math

import jax
import numpy as np
import pytest

from ddistill import grids, process

EDM, FLOW = process.edm(), process.flow()
DISCRETE = process.discrete_vp(process.linear_betas(1000))
CONTINUOUS = {
    "karras": grids.karras,
    "exponential": grids.exponential,
    "poly_exponential": functools.partial(grids.poly_exponential, rho=2.0),
    "log_snr_uniform": grids.log_snr_uniform,
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
}
INDEX = {
    "leading": grids.leading,
    "linspace": grids.linspace,
    "trailing": grids.trailing,
    "lcm": grids.lcm,
    "tcd": grids.tcd,
}
PLAIN = {"flow_shifted": lambda n: grids.flow_shifted(n, 3.0), "trig": grids.trig, "dyadic": grids.dyadic}


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("proc", [EDM, process.vp(), process.ve(), process.sub_vp(), DISCRETE], ids=str)
def test_ends_are_exact_and_nodes_decrease(proc, name, n):
    grid = CONTINUOUS[name](proc, n)
    assert grid.shape == (n + 1,) and grid.dtype == np.float64
    assert grid[0] == proc.t_max
    assert grid[-1] == (proc.t_min if name == "log_snr_uniform" else 0)
    assert np.all(np.diff(grid) < 0)


@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize("n", [1, 4, 10, 50])
def test_index_grids(name, n):
    grid = INDEX[name](DISCRETE, n)
    assert grid.shape == (n + 1,) and grid[-1] == 0 and np.all(np.diff(grid) < 0)
    assert np.all(grid == np.round(grid)) and grid[-2] >= 1 and grid[0] <= 1000


def test_index_grids_hold_what_their_names_say():
    assert grids.trailing(DISCRETE, 7)[0] == 1000
    np.testing.assert_array_equal(grids.leading(DISCRETE, 4), [751, 501, 251, 1, 0])
    np.testing.assert_array_equal(grids.leading(DISCRETE, 4, offset=1), [752, 502, 252, 2, 0])
    np.testing.assert_array_equal(grids.linspace(DISCRETE, 4), [1000, 667, 334, 1, 0])
    np.testing.assert_array_equal(grids.trailing(DISCRETE, 4), [1000, 750, 500, 250, 0])
    np.testing.assert_array_equal(grids.lcm(DISCRETE, 4), [1000, 760, 500, 260, 0])
    np.testing.assert_array_equal(grids.tcd(DISCRETE, 4), grids.lcm(DISCRETE, 4))


def test_tcd_targets():
    grid = grids.tcd(DISCRETE, 4)
    np.testing.assert_array_equal(grids.tcd_targets(grid, 0.0), grid[1:])
    np.testing.assert_array_equal(grids.tcd_targets(grid, 1.0), [1, 1, 1, 0])
    np.testing.assert_array_equal(
        grids.tcd_targets(grid, 0.3), [math.floor(0.7 * i) + 1 for i in (759, 499, 259)] + [0]
    )


def test_karras_follows_its_formula_and_tends_to_the_exponential_grid(x64):
    i = np.arange(18)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grids.karras(EDM, 18), np.append(sigma, 0), rtol=1e-12)
    np.testing.assert_allclose(grids.karras(EDM, 17, final=None), sigma, rtol=1e-12)
    far = grids.karras(EDM, 18, rho=1e7)
    np.testing.assert_allclose(far, grids.exponential(EDM, 18), rtol=1e-4)
    np.testing.assert_allclose(grids.exponential(EDM, 18)[:-1], np.geomspace(80, 0.002, 18), rtol=1e-12)


@pytest.mark.parametrize("proc", [process.vp(), process.vp_cosine(), process.sub_vp()], ids=str)
def test_karras_is_one_grid_in_rho_for_every_process(x64, proc):
    low, high = (float(proc.rho(np.float64(t))) for t in (proc.t_min, proc.t_max))
    same = grids.karras(process.edm(low, high), 9, final=None)
    np.testing.assert_allclose(proc.rho(grids.karras(proc, 9, final=None)), same, rtol=1e-6)


@pytest.mark.parametrize("proc", [FLOW, process.cosine(), process.trig()], ids=str)
@pytest.mark.parametrize("name", ["karras", "exponential", "log_snr_uniform"])
def test_where_nothing_of_the_data_is_left_a_grid_in_rho_begins_at_1000(x64, proc, name):
    grid = CONTINUOUS[name](proc, 9)
    # The same nodes as on an EDM process that ends at 1000, but for the first, which is t_max itself.
    same = CONTINUOUS[name](process.edm(float(proc.rho(proc.t_min)), process.LARGEST_RHO), 9)
    assert grid[0] == proc.t_max and np.all(np.diff(grid) < 0)
    np.testing.assert_allclose(proc.rho(grid[1:-1]), same[1:-1], rtol=1e-6)


def test_log_snr_uniform_is_uniform(x64):
    proc = process.vp()
    lam = np.asarray(proc.half_log_snr(grids.log_snr_uniform(proc, 12)))
    np.testing.assert_allclose(np.diff(lam), (lam[-1] - lam[0]) / 12, rtol=1e-9)


def test_ends_may_be_given(x64):
    grid = grids.karras(FLOW, 8, start=0.99, end=0.01, final=None)
    assert grid[0] == 0.99 and grid[-1] == 0.01
    np.testing.assert_allclose(grids.quadratic(EDM, 4, 16.0, 4.0), np.array([4, 3.5, 3, 2.5, 2]) ** 2)
    np.testing.assert_allclose(grids.uniform(process.vp(), 4, end=1e-3), np.linspace(1, 1e-3, 5))


def test_grids_of_a_process_whose_t_min_is_the_data_end_there():
    assert grids.karras(process.ve(), 6).shape == (7,)
    assert grids.karras(process.ve(), 6)[-1] == 0


def test_flow_shift_composes_and_inverts():
    plain, shifted = grids.flow_shifted(9, 1.0), grids.flow_shifted(9, 3.0)
    np.testing.assert_allclose(plain, np.linspace(1, 0, 10), atol=1e-15)
    np.testing.assert_allclose(process.flow_shift(shifted, 1 / 3), plain, atol=1e-15)
    np.testing.assert_allclose(process.flow_shift(shifted, 2.0), grids.flow_shifted(9, 6.0), atol=1e-15)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("n", [1, 2, 8])
def test_plain_grids(name, n):
    grid = PLAIN[name](n)
    assert grid.shape == (n + 1,) and grid[-1] == 0 and np.all(np.diff(grid) < 0)
    assert grid[0] == (math.pi / 2 if name == "trig" else 1)


def test_trig_and_dyadic_nodes():
    np.testing.assert_allclose(grids.trig(2), [math.pi / 2, 1.3, 0])
    np.testing.assert_allclose(grids.trig(2, 1.5, None), [1.5, 0.75, 0])
    np.testing.assert_array_equal(grids.dyadic(128) * 128, np.arange(128, -1, -1))


def test_grids_are_concrete_inside_jit():
    grid = jax.jit(lambda x: x + np.float32(grids.karras(EDM, 4)[1]))(0.0)
    assert float(grid) == pytest.approx(grids.karras(EDM, 4)[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: grids.uniform(EDM, 0), "n = 0"),
        (lambda: grids.karras(EDM, 2.5), "n = 2.5"),
        (lambda: grids.karras(EDM, 4, rho=0), "rho"),
        (lambda: grids.karras(EDM, 4, end=0.0), "noise-to-signal"),
        (lambda: grids.uniform(EDM, 4, start=90.0), "outside"),
        (lambda: grids.uniform(EDM, 4, start=1.0, end=2.0), "noisier"),
        (lambda: grids.leading(EDM, 4), "discrete"),
        (lambda: grids.leading(DISCRETE, 1001), "from 1 to 1000"),
        (lambda: grids.leading(DISCRETE, 1000, offset=1), "offset"),
        (lambda: grids.lcm(DISCRETE, 51), "from 1 to 50"),
        (lambda: grids.lcm(DISCRETE, 4, origin=2000), "origin"),
        (lambda: grids.tcd_targets(np.array([4.0, 0.0]), 1.5), "eta"),
        (lambda: grids.flow_shifted(4, 0.0), "shift"),
        (lambda: grids.trig(2, 1.2), "decrease"),
        (lambda: grids.dyadic(6), "power of two"),
    ],
)
def test_bad_requests_say_what_is_accepted(call, words):
    with pytest.raises(ValueError, match=words):
        call()
