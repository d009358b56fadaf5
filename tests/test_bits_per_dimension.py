"""Bits per dimension of samples under a teacher whose density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.evaluate.likelihood import bits_per_dimension
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import edm, vp

C, NOISE, N, D, KEY = 0.5, 0.05, 400, 4, jax.random.key(7)
# Two classes, one at the origin and one away from it.
MIXTURE = Mixture.from_covariances([0.5, 0.5], [[0.0] * D, [1.0] * D], [C**2 * np.eye(D)] * 2, labels=[0, 1])


def bits(variance, squares):
    """−log₂ of N(0, variance) per coordinate, where coordinates have the given mean square."""
    return 0.5 * np.log2(2 * np.pi * variance) + 0.5 * squares / variance / np.log(2)


@pytest.mark.parametrize(("process", "noise"), [(edm(), NOISE), (vp(), 0.5)], ids=["edm", "vp"])
@pytest.mark.parametrize("shrunk", [1.0, 0.3])
def test_gaussian_samples_of_a_class(process, noise, shrunk):
    labels = jnp.arange(N) % 2
    x = labels[:, None] + shrunk * C * jax.random.normal(jax.random.key(0), (N, D))
    got = bits_per_dimension(as_teacher(MIXTURE, process), process, x, labels, key=KEY, noise=noise)
    variance = C**2 + noise**2  # of the data with noise; the samples' own is another
    squares = (shrunk * C) ** 2 + noise**2
    # A mean of N D squares strays by √(2/(N D)) of itself.
    error = 0.5 * squares / variance / np.log(2) * np.sqrt(2 / (N * D))
    assert got == pytest.approx(bits(variance, squares), abs=4 * error + 0.01)


def test_samples_of_the_wrong_class_are_less_likely():
    process, labels = edm(), jnp.arange(N) % 2
    x = labels[:, None] + C * jax.random.normal(jax.random.key(0), (N, D))
    right, wrong = (
        bits_per_dimension(as_teacher(MIXTURE, process), process, x, c, key=KEY) for c in (labels, 1 - labels)
    )
    # A shift by 1 costs ½/variance nats, and its cross term with the samples averages out.
    variance = C**2 + NOISE**2
    assert wrong - right == pytest.approx(0.5 / variance / np.log(2), abs=4 / np.sqrt(variance * N * D) / np.log(2))


def test_noise_must_be_some():
    with pytest.raises(ValueError, match="noise = 0.0"):
        bits_per_dimension(as_teacher(MIXTURE, edm()), edm(), jnp.zeros((2, D)), key=KEY, noise=0.0)
