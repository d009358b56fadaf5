"""Noise levels that descend while training goes on: their law in closed form; distribution matching asks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.losses.times import Descending, KarrasRamp, Uniform, law_at
from ddistill.methods.base import Progress
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Delta
from ddistill.net import Net
from ddistill.process import edm

EDM, KEY = edm(), jax.random.key(0)


def places(t):
    """Where on Karras' ramp times are: (80^⅐ − t^⅐)/(80^⅐ − .002^⅐)."""
    return (80 ** (1 / 7) - np.asarray(t, np.float64) ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_the_low_end_comes_down_linearly(share):
    law, n = Descending(low=0.1, high=0.9, start=0.5, until=0.25), 4000
    found = places(law_at(law, share)(EDM, KEY, n))
    high = 0.5 + 0.4 * share / 0.25
    # Uniform between .1 and high: its ends, and its mean within four standard errors.
    assert 0.1 <= found.min() < 0.1 + 0.01 and high - 0.01 < found.max() <= high + 1e-5
    assert abs(found.mean() - (0.1 + high) / 2) < 4 * (high - 0.1) / np.sqrt(12 * n)


def test_in_the_end_it_is_the_ramp_and_other_laws_do_not_change():
    for share in (0.5, 0.7, 1.0):
        np.testing.assert_array_equal(law_at(Descending(), share)(EDM, KEY, 64), KarrasRamp()(EDM, KEY, 64))
    assert law_at(Uniform(), 0.1) == Uniform()
    for wrong in ({"start": 0.01}, {"start": 0.99}, {"until": 0.0}, {"high": 1.1}):
        with pytest.raises(ValueError, match="places on the ramp fall"):
            Descending(**wrong)


def test_distribution_matching_begins_with_high_noise():
    asked = []

    def teacher(params, rest, x, t, cond, *, s, key):
        asked.append(t)
        return x

    def student(params, rest, x, t, cond, *, s, key):
        return params["scale"] * x

    nets = {"student": Net({"scale": jnp.ones(())}, {}, student), "teacher": Net({}, {}, teacher)}
    loss = DMD(Delta())(EDM).losses["student"]
    for step in (0, 60):
        loss(nets, {"x": jnp.zeros((500, 2))}, Progress(step, 100), KEY)
    first, later = (places(t) for t in asked)
    assert first.max() <= 0.65 + 1e-5 and first.max() > 0.64
    assert 0.97 < later.max() <= 0.98 + 1e-5
