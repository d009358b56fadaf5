"""The judge of exact benchmarks, in cases whose scores are known, and the benchmark itself on a tiny mixture."""

import dataclasses
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from ddistill.bench import exact as bench
from ddistill.bench import leaderboard
from ddistill.config import MLPNetwork
from ddistill.evaluate.metrics import sliced_wasserstein, sliced_wasserstein_to
from ddistill.evaluate.mixture import SCALE, floor, judge
from ddistill.integrators import dpmpp_2m, euler
from ddistill.methods import METHODS
from ddistill.mixture import Mixture
from ddistill.process import edm

N = 500
WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE = Mixture.from_covariances(
    WEIGHTS, [[3.0, 0.0], [-2.0, 2.0], [0.0, -2.0]], [0.04 * np.eye(2)] * 3, labels=[0, 1, 2]
).standardised(SCALE)


@pytest.fixture(scope="module")
def by():
    return judge(MIXTURE, N)


def test_exact_samples_score_about_the_floor(by):
    perfect = floor(by, N)
    scores = by(MIXTURE.sample(jax.random.key(3), N))
    assert abs(scores["sw2"] - perfect["sw2"]) < 4 * perfect["sw2_std"]
    # 1 % of exact samples lie below the threshold, itself known from 10 N of them.
    binomial = np.sqrt(0.01 * 0.99 / N * 1.1)
    assert abs(0.99 * scores["precision"] - 0.99) < 4 * binomial
    assert abs(0.99 * perfect["precision"] - 0.99) < 4 * binomial / np.sqrt(5) + 4 * binomial / np.sqrt(10)
    assert scores["recall"] == perfect["recall"] == 1
    # 2 N KL of a sample's shares is χ² with K − 1 degrees of freedom.
    assert 2 * N * scores["weights"] < stats.chi2(2).ppf(0.999)
    # The log-density of a mode varies by ½ χ²(2), of variance 1, that of log w by little.
    assert abs(scores["ll_gap"]) < 4 * np.sqrt((1 + np.log(WEIGHTS).var()) * 1.1 / N)
    assert scores["endpoint"] is None and scores["endpoint_median"] is None


@pytest.mark.parametrize("k", [0, 2])
def test_samples_of_one_mode_recall_one_and_miss_the_weights_of_the_rest(by, k):
    scores = by(np.asarray(MIXTURE.means)[k] + 0.02 * np.random.default_rng(0).standard_normal((N, 2)))
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["weights"] == pytest.approx(math.log(1 / WEIGHTS[k]), rel=1e-5)
    assert scores["precision"] > 0.95
    assert scores["sw2"] > 0.5


@pytest.mark.parametrize("shift", [0.001, 0.2])
def test_a_shift_by_delta_is_delta_over_the_scale(by, shift):
    x = MIXTURE.sample(jax.random.key(5), N)
    scores = by(x + shift, x)
    assert scores["endpoint"] == pytest.approx(shift / SCALE, rel=1e-3)
    assert scores["endpoint_median"] == pytest.approx(shift / SCALE, rel=1e-3)
    # One sample gone far moves the mean and not the median.
    far = by((x + shift).at[0].add(100.0), x)
    assert far["endpoint_median"] == pytest.approx(shift / SCALE, rel=1e-3)
    assert far["endpoint"] == pytest.approx(np.hypot(shift / SCALE, 100 / SCALE / np.sqrt(N)), rel=0.02)


def test_samples_far_off_or_not_finite_are_no_use(by):
    x = np.array(MIXTURE.sample(jax.random.key(6), N))
    good = by(x)["precision"]
    x[::2] = np.nan
    x[1] = np.inf
    scores = by(x, np.zeros_like(x))
    assert all(np.isfinite(v) for v in scores.values())
    assert scores["precision"] == pytest.approx(good / 2, rel=0.05)
    assert scores["sw2"] > 1e5 and scores["ll_gap"] > 1e5
    far = by(np.full_like(x, 50.0))
    assert far["precision"] == far["recall"] == 0


def test_the_log_likelihood_gap_of_a_shifted_gaussian():
    # Var = c² = scale² and the judge's noise ν: a shift δ costs ½ d δ²/(c² + ν²) nats.
    by = judge(Mixture.from_covariances([1.0], [[0.0, 0.0, 0.0]], [np.eye(3)]).standardised(SCALE), 2000)
    x = by.mixture.sample(jax.random.key(7), 2000)
    variance = SCALE**2 + by.noise**2
    gap = by(x + 0.5)["ll_gap"] - by(x)["ll_gap"]
    # ½ (|y + δ|² − |y|²)/variance also has the term δ · mean(y)/variance, of this standard deviation.
    error = 0.5 * np.sqrt(3 / 2000 / variance)
    assert abs(gap - 0.5 * 3 * 0.25 / variance) < 4 * error


@pytest.mark.parametrize("times", [1, 4])
def test_the_prepared_sliced_distance_is_the_sliced_distance(times):
    rng = np.random.default_rng(0)
    reference, x = rng.standard_normal((60 * times, 3)) * [1, 2, 3], rng.standard_normal((60, 3))
    expected = sliced_wasserstein(x, reference, directions=32, seed=4)
    assert sliced_wasserstein_to(reference, 60, directions=32, seed=4)(x) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="do not divide"):
        sliced_wasserstein_to(reference, 61)
    with pytest.raises(ValueError, match="was prepared for 60"):
        sliced_wasserstein_to(reference, 60)(x[:30])


def test_a_standardised_mixture_is_the_same_one_moved_and_scaled():
    rng = np.random.default_rng(1)
    roots = rng.standard_normal((3, 4, 4)) * 0.3
    mixture = Mixture.from_covariances(WEIGHTS, rng.standard_normal((3, 4)) + 2, roots @ roots.swapaxes(1, 2))
    standard = mixture.standardised(0.5)
    # E x = 0 and E |x|²/d = .25, from the moments of the parts.
    np.testing.assert_allclose(WEIGHTS @ standard.means, 0, atol=1e-12)
    np.testing.assert_allclose(WEIGHTS @ (standard.means**2 + standard.scales).sum(1) / 4, 0.25, rtol=1e-12)
    before, after = (np.asarray(m.sample(jax.random.key(0), 50)) for m in (mixture, standard))
    factor = np.ptp(after) / np.ptp(before)
    np.testing.assert_allclose(after, factor * (before - WEIGHTS @ mixture.means), atol=1e-4)
    again = standard.standardised(0.5)
    np.testing.assert_allclose(again.means, standard.means, atol=1e-12)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture") / "two.npz"
    np.savez(path, weights=[0.7, 0.3], means=[[1.0], [-2.0]], covariances=np.full((2, 1, 1), 0.05))
    return bench.problem(str(path), samples=200)


TINY = bench.Recipe(MLPNetwork(width=32, blocks=2), batch_size=128, fit_steps=500, steps=20)


def test_reference_rows_approach_the_exact_map(problem):
    rows = list(bench.reference_rows(problem, nfes=(1, 8, 35)))
    assert rows[0]["method"] == "teacher/exact-map" and rows[0]["endpoint"] == 0 == rows[0]["nfe"]
    assert rows[0]["sw2"] < 5 * problem.floor["sw2"]
    assert all(row.keys() == rows[0].keys() for row in rows)
    by = {(row["method"], row["nfe"]): row["endpoint"] for row in rows}
    assert by["teacher/euler", 1] > 3 * by["teacher/euler", 35]
    assert by["teacher/heun", 35] < by["teacher/euler", 35] / 3
    assert {nfe for method, nfe in by if method == "teacher/heun"} <= {1, 7, 9, 35}


def test_a_student_is_fitted_distilled_and_judged(problem, one_device):
    start = bench.fitted_network(problem, 0, TINY)
    untrained = TINY.network.build(problem.data, problem.process, jax.random.key(0))
    rows = [bench.teacher_row(problem, net, "n", dpmpp_2m, 8) for net in (start, untrained)]
    assert rows[0]["endpoint"] < 0.7 * rows[1]["endpoint"]
    config = METHODS["consistency"].make(intervals=4, max_intervals=4, solver=euler)
    rows = list(bench.student_rows(problem, "consistency", config(problem.process), start, 0, TINY, (1, 2, 4, 8)))
    assert [row["steps"] for row in rows] == [row["nfe"] for row in rows] == [1, 2, 4, 8]
    # Only one jump from the common noise has an exact end to be compared with.
    assert rows[0]["endpoint"] > 0 and all(row["endpoint"] is None for row in rows[1:])
    pairs = dataclasses.replace(METHODS["kd"].make(), pairs=128, teacher_steps=8, integrator=euler)
    (row,) = bench.student_rows(problem, "kd", pairs(problem.process), start, 0, TINY, (1,))
    assert (row["steps"], row["nfe"]) == (1, 1) and 0 < row["endpoint"] < 2 and row["floor_sw2"] == problem.floor["sw2"]


@pytest.fixture
def nothing_kept():
    yield
    leaderboard._case.cache_clear()
    leaderboard._start.cache_clear()


def test_a_leaderboard_goes_on_where_its_rows_end(monkeypatch, nothing_kept):
    trained = []

    def student(case, name, made, start, seed, plan, steps, keep):
        trained.append((name, seed, plan.steps))
        yield from ({"mixture": "ring8", "method": name, "steps": n, "seed": seed} for n in steps)

    def teacher(case, net, method, integrator, steps, seed=0):
        return {"mixture": "ring8", "method": method, "steps": steps, "seed": seed}

    case = SimpleNamespace(process=edm(), mixture=MIXTURE)
    exact_map = {"mixture": "ring8", "method": "teacher/exact-map", "steps": 0, "seed": 0}
    for name, fake in (
        ("problem", lambda name: case), ("reference_rows", lambda case: iter([exact_map])),
        ("fitted_network", lambda *a: None), ("student_rows", student), ("teacher_row", teacher),
    ):  # fmt: skip
        monkeypatch.setattr(leaderboard, name, fake)
    names = ["kd", "reflow"]
    everything = list(leaderboard.leaderboard(names, ["ring8"], 2))
    assert trained == [(name, seed, steps) for seed in (0, 1) for name, steps in (("kd", 6000), ("reflow", 12_000))]
    for cut in (0, 3, len(everything)):
        rest = list(leaderboard.leaderboard(names, ["ring8"], 2, everything[:cut]))
        again = {row["method"] for row in rest} & {row["method"] for row in everything[:cut]}
        assert [*everything[:cut], *rest][-1] == everything[-1]
        assert cut < len(everything) or not rest
        assert not again & {"teacher/exact-map"}

    def stopped(case, name, made, start, seed, plan, steps, keep=None):
        yield {"mixture": "ring8", "method": name, "steps": steps[-1], "seed": seed}
        raise KeyboardInterrupt

    monkeypatch.setattr(leaderboard, "student_rows", stopped)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        for row in leaderboard.leaderboard(names, ["ring8"], 1):
            kept.append(row["method"])
    assert "kd" not in kept and kept, "a student's rows are whole or not there"


def rows_of_a_process(n):
    flags, threads = os.environ["XLA_FLAGS"], os.environ["OMP_NUM_THREADS"]
    assert n, "no rows of 0"
    yield from ({"n": n, "process": os.getpid(), "flags": flags, "threads": threads} for _ in range(n))


def test_students_are_trained_side_by_side_in_processes_of_one_thread():
    before = dict(os.environ)
    rows = list(leaderboard._side_by_side([(rows_of_a_process, n) for n in (1, 2, 3)], 2))
    assert sorted(row["n"] for row in rows) == [1, 2, 2, 3, 3, 3]
    assert os.getpid() not in {row["process"] for row in rows} and len({row["process"] for row in rows}) <= 2
    assert all("intra_op_parallelism_threads=1" in row["flags"] and row["threads"] == "1" for row in rows)
    assert dict(os.environ) == before
    with pytest.raises(AssertionError, match="no rows of 0"):
        list(leaderboard._side_by_side([(rows_of_a_process, 0)], 2))
