"""Diversity by a perceptual distance, on distances that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.evaluate import perceptual
from ddistill.evaluate.perceptual import _pairs, perceptual_diversity
from ddistill.hub.features import random_lpips
from ddistill.networks.vgg import ConvolutionsConfig, Layer
from ddistill.sharding import local_mesh


def away(a, b):
    return jnp.abs(a - b).mean((1, 2, 3))


def test_diversity_is_the_mean_over_conditions_of_the_mean_over_pairs():
    # |0 − 1|, |0 − 3|, |1 − 3| have the mean 2; |5 − 5| is 0: conditions count alike
    levels, labels = np.asarray([0, 5, 1, 5, 3]), np.asarray(["a", "b", "a", "b", "a"])
    images = np.broadcast_to(levels[:, None, None, None], (5, 2, 2, 3)).astype(np.float32)
    for batch in (1, 2, 32):
        assert perceptual_diversity(away, images, labels, batch=batch) == 1.0
    # The ten distances have the mean 2.8 and the standard deviation 1.6; means of four of them vary by .65.
    some = [perceptual_diversity(away, images, np.zeros(5), pairs=4, seed=seed) for seed in range(100)]
    assert perceptual_diversity(away, images, np.zeros(5)) == pytest.approx(2.8)
    assert np.mean(some) == pytest.approx(2.8, abs=0.2) and np.std(some) == pytest.approx(0.65, abs=0.15)


def test_pairs_are_all_or_as_many_as_asked_for_and_never_twice():
    rng = np.random.default_rng(0)
    for count in (2, 3, 50):
        assert {tuple(p) for p in _pairs(count, 10**6, rng)} == {(i, j) for j in range(count) for i in range(j)}
    drawn = _pairs(100_000, 1000, rng)
    assert len({tuple(p) for p in drawn}) == 1000 and np.all((drawn[:, 0] >= 0) & (drawn[:, 0] < drawn[:, 1]))
    assert drawn.max() < 100_000 and drawn[:, 1].mean() == pytest.approx(2 / 3 * 100_000, rel=0.05)


def test_pairs_lie_over_the_devices_and_bytes_become_floats_there(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 7, 7, 3)).astype(np.uint8)
    labels = np.arange(20) % 3
    distance = random_lpips(ConvolutionsConfig("two", (Layer(0, 4, seen=True), Layer(3, 4, pool=2, seen=True))))
    places, shapes = [], []

    def watched(a, b):
        jax.debug.inspect_array_sharding(a, callback=places.append)
        shapes.append((a.shape, a.dtype))
        return distance(a, b)

    spread = perceptual_diversity(watched, images, labels, batch=5)
    assert {len(place.device_set) for place in places} == {8} and set(shapes) == {((8, 7, 7, 3), np.dtype(np.float32))}
    monkeypatch.setattr(perceptual, "local_mesh", lambda: local_mesh(jax.devices()[:1]))
    for given in (images, images.astype(np.float32) / 127.5 - 1):
        assert perceptual_diversity(distance, given, labels) == pytest.approx(spread, rel=1e-6)


def test_what_has_no_pairs_is_refused():
    images = np.zeros((3, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match="Condition 7 has 1 image"):
        perceptual_diversity(away, images, [1, 1, 7])
    with pytest.raises(ValueError, match="3 images and labels of shape"):
        perceptual_diversity(away, images, [1, 1])
    with pytest.raises(ValueError, match="pairs is 0"):
        perceptual_diversity(away, images, [1, 1, 1], pairs=0)
