"""Recall and diversity of guided samples, condition by condition, against the exact guided flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.bench import exact, guided
from ddistill.methods import METHODS
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import edm

CORNERS = [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
MIXTURE = Mixture.from_covariances([0.25] * 4, CORNERS, [0.01 * np.eye(2)] * 4, labels=[0, 0, 1, 1])


def draw(key, n=400):
    labels = jnp.arange(n) % 2
    return *MIXTURE.sample_with_modes(jax.random.key(key), n, labels), labels


def test_a_mode_that_was_dropped_is_missed_in_its_class():
    reference, _, labels = draw(0)
    x, modes, _ = draw(1)

    def recall(x, **more):
        return guided.mode_recall(MIXTURE, edm(), x, reference, labels, **more)

    assert recall(x) == 1
    upper = jnp.where((modes == 0)[:, None], x + jnp.array([0.0, 2.0]), x)  # class 0 has moved to its upper mode
    assert recall(upper) == 3 / 4
    # Samples of class 0 among those of class 1 are found there by the eye, but belong to modes of their own class.
    mirrored = x * jnp.where(labels[:, None] == 0, jnp.array([-1.0, 1.0]), 1.0)
    assert recall(mirrored) == 1
    # A fifth of the samples is what a mode must hold.
    for kept, found in ((0.1, 3 / 4), (0.3, 1)):
        lost = (modes == 0) & (jnp.arange(400) >= 400 * kept)
        assert recall(jnp.where(lost[:, None], x + jnp.array([0.0, 2.0]), x)) == found
    assert recall(x, least=300) is None


def test_the_exact_teacher_with_many_steps_is_as_varied_as_its_flow(monkeypatch):
    process, mixture = edm(), MIXTURE.standardised(0.5)
    noise = process.prior(jax.random.key(0), (800, 2))
    problem = exact.Problem(
        "corners", mixture, process, as_teacher(mixture, process), None, {"sw2": 0.0}, noise, None, 0.0, None
    )  # judge, exact flow and data are those of plain students
    monkeypatch.setattr(guided, "fitted_network", lambda *_: None)
    monkeypatch.setattr(guided, "distilled", lambda *_: None)
    made = METHODS["guidance"].make()(process)
    few, many = guided.guided_rows(problem, "guidance", made, 0, exact.recipe(2), (), scales=(3.0,), samples=400)
    assert (few["steps"], many["steps"], many["method"], many["w"]) == (8, 35, "teacher/dpmpp_2m", 3)
    # 200 samples of a class in two modes of equal weight: the share of pairs from different modes varies by 1/200.
    assert many["recall"] == 1 and many["diversity"] == pytest.approx(1, abs=0.1)
    assert many["sw2"] < 3 * many["floor_sw2"] and few.keys() == many.keys()
