"""A fake score that is one thing at high noise and another at low noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.methods.fake_scores import Auxiliary, Delta, Drawn, Hybrid, MultiSample
from ddistill.process import edm, flow, vp


@pytest.mark.parametrize("process", [edm(), vp(), flow()], ids=["VE", "VP", "flow"])
def test_each_side_answers_for_its_noise_levels(process):
    fake = Hybrid(0.5, above=MultiSample(queue=16), below=Delta())
    x, noise = (jax.random.normal(jax.random.key(i), (4, 3)) for i in range(2))
    t = process.time_of(-jnp.log(jnp.asarray([0.1, 0.49, 0.51, 3.0])))
    x_t = process.diffuse(x, noise, t)
    memory = {"x": jnp.zeros((16, 3)), "filled": jnp.zeros(16, bool)}
    drawn = Drawn(x, None, {}, {"queue": memory}, jax.random.key(2))
    both = fake(process, x_t, t, drawn)
    np.testing.assert_array_equal(both[:2], x[:2])
    np.testing.assert_allclose(both[2:], MultiSample()(process, x_t, t, drawn)[2:], rtol=1e-6)
    assert float(jnp.abs(both[2:] - x[2:]).min()) > 1e-3


def test_networks_and_memories_are_those_of_both():
    process, draw = edm(), lambda nets, batch, key: None
    fake = Hybrid(0.5, above=MultiSample(queue=16), below=Auxiliary())
    assert set(fake.networks(process, draw)) == {"fake"} and set(fake.memory(draw)) == {"queue"}
    assert Hybrid(0.5, below=Delta()).networks(process, draw) == {}
