"""KID, CMMD, Inception and CLIP score against their definitions, and moments against those of the whole."""

import math

import numpy as np
import pytest

from ddistill.evaluate import clip_score, cmmd, inception_score, kid, moments_of
from ddistill.evaluate.kernels import subsets_of
from ddistill.evaluate.moments import Moments


def mmd2_by_loops(x, y, kernel, unbiased):
    n, m = len(x), len(y)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j or not unbiased]
    xx = sum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)
    pairs = [(i, j) for i in range(m) for j in range(m) if i != j or not unbiased]
    yy = sum(kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_mean_over_subsets_of_a_double_loop():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((25, 6)).astype(np.float32), 0.8 * rng.standard_normal((19, 6)) + 0.3
    got = kid(a, b, subsets=11, size=13, seed=3)
    values = [
        mmd2_by_loops(a[i].astype(float), b[j], lambda x, y: (x @ y / 6 + 1) ** 3, unbiased=True)
        for i, j in zip(*subsets_of(25, 19, 11, 13, 3), strict=True)
    ]
    assert got == pytest.approx((np.mean(values), np.std(values), 13), rel=1e-10)
    assert kid(a, b, subsets=11, size=13, seed=4).mean != got.mean
    # Fewer samples than a subset wants: all of them, in every subset.
    whole = mmd2_by_loops(
        a[:20].astype(float), (a[:20] + 1.0).astype(float), lambda x, y: (x @ y / 6 + 1) ** 3, unbiased=True
    )
    few = kid(a[:20], a[:20] + 1.0, subsets=2)
    assert few.size == 20 and few.mean == pytest.approx(whole, rel=1e-10)


def test_subsets_draw_no_sample_twice_and_all_of_them_in_time():
    of_a, of_b = subsets_of(30, 40, 50, 20, 0)
    assert of_a.shape == of_b.shape == (50, 20)
    for rows, n in ((of_a, 30), (of_b, 40)):
        assert all(len(set(row)) == 20 for row in rows) and set(rows.reshape(-1)) == set(range(n))


def test_kid_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(1)
    values = [kid(*rng.standard_normal((2, 40, 3)), subsets=1, size=40).mean for _ in range(40)]
    assert abs(np.mean(values)) < 3.5 * np.std(values) / math.sqrt(40) and np.min(values) < 0


@pytest.mark.parametrize("limit", [1, 2**28])
def test_cmmd_is_its_definition_on_the_sphere(limit):
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((21, 5)), rng.standard_normal((18, 5)) + 1
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    expected = 1000 * mmd2_by_loops(x, y, lambda u, v: math.exp(-((u - v) ** 2).sum() / 200), unbiased=False)
    assert cmmd(a, 7 * b, limit=limit) == pytest.approx(expected, rel=1e-9)
    assert cmmd(a, a, limit=limit) == pytest.approx(0, abs=1e-12)


def test_cmmd_of_two_points_is_closed_form():
    # At right angles |x − y|² = 2: 2 (1 − exp(−2/(2 σ²))), in thousandths.
    got = cmmd([[1.0, 0.0]], [[0.0, 3.0]], sigma=2.0)
    assert got == pytest.approx(2000 * (1 - math.exp(-1 / 4)), rel=1e-12)


def test_inception_score_is_its_definition():
    rng = np.random.default_rng(3)
    logits = (3 * rng.standard_normal((40, 7)) + 1000).astype(np.float32)
    p = np.exp(logits.astype(float) - 1000)
    p /= p.sum(1, keepdims=True)
    kl = np.mean([sum(q * math.log(q / m) for q, m in zip(row, p.mean(0), strict=True)) for row in p])
    assert inception_score(logits, splits=1) == pytest.approx((math.exp(kl), 0), rel=1e-6)
    shuffled = np.random.default_rng(5).permutation(p)
    scores = [
        math.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part]))
        for part in (shuffled[:20], shuffled[20:])
    ]
    assert inception_score(logits, splits=2, seed=5) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-6)


def test_inception_score_at_its_limits():
    assert inception_score(np.zeros((50, 9)))[0] == pytest.approx(1, abs=1e-12)  # nothing is told
    sure = np.where(np.eye(8, dtype=bool)[np.arange(80) % 8], 1e4, 0.0)  # sure of each of eight classes alike
    assert inception_score(sure, splits=1)[0] == pytest.approx(8, rel=1e-12)
    assert inception_score(sure[:3], splits=10) == (pytest.approx(1), pytest.approx(0))  # one sample in each split


def test_clip_score_counts_agreement_alone():
    images = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0]])
    texts = np.array([[1.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
    assert clip_score(images, texts) == pytest.approx(100 * (1 + math.sqrt(0.5) + 0) / 3)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    rng = np.random.default_rng(4)
    x = (1e3 + rng.standard_normal((103, 5)) @ rng.standard_normal((5, 5))).astype(np.float32)
    total = moments_of(x[:0])
    for part in (x[:40], x[40:41], x[41:]):
        total = total + moments_of(part)
    assert total.count == 103
    np.testing.assert_allclose(total.mean, x.astype(float).mean(0), rtol=1e-13)
    np.testing.assert_allclose(total.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-10)


def test_what_cannot_be_told_is_said():
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match="size = 1"):
        kid(x, x, size=1)
    with pytest.raises(ValueError, match="must be positive"):
        cmmd(x, x, sigma=0)
    with pytest.raises(ValueError, match="Embedding 2 has length 0"):
        cmmd(x, np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="splits is 0"):
        inception_score(x, splits=0)
    with pytest.raises(ValueError, match="4 images and 3 prompts"):
        clip_score(x, x[:3])
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        _ = moments_of(x[:1]).covariance
    with pytest.raises(ValueError, match="NaN or Inf"):
        moments_of(np.full((2, 2), np.nan))
    assert Moments(0, np.zeros(1), np.zeros((1, 1))).count == 0
