"""What adversarial methods tell their networks: conditions, and where samples began; of all others see test_seen.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.losses.distances import L2
from ddistill.methods import ADD, CTM, GAN, Adversary
from ddistill.methods.base import Progress
from ddistill.methods.consistency import renoising_times
from ddistill.net import Net
from ddistill.process import edm

LABELS = jnp.asarray([3, 1, 4, 1, 5, 2])
BATCH = {"x": 0.5 * jax.random.normal(jax.random.key(0), (6, 2)), "cond": LABELS}
JUDGED = Adversary(r1=0.0, r2=0.0)


class Judge:
    """A discriminator that notes what it is told."""

    def __init__(self, notes):
        self.notes = notes

    def see(self, rest, x, t, cond):
        return x

    def judge(self, params, rest, seen, t, cond, s):
        self.notes.append((cond, s))
        return params["w"] * seen[:, :1]

    def __call__(self, params, rest, x, t, cond, *, s=None, key=None):
        return self.judge(params, rest, x, t, cond, s)


def noting(notes):
    def apply(params, rest, x, t, cond, *, s=None, key=None):
        notes.append((cond, None))
        return params["w"] * x

    return Net({"w": jnp.asarray(0.5)}, {}, apply)


@pytest.mark.parametrize(
    ("config", "networks", "begun"),
    [
        (GAN(JUDGED), ("student", "discriminator"), True),
        (ADD(JUDGED), ("student", "teacher", "discriminator"), True),
        (CTM(distance=L2(), adversary=JUDGED, last_layer="w"), ("student", "teacher", "discriminator"), False),
    ],
    ids=["gan", "add", "ctm"],
)  # fmt: skip
def test_every_network_is_told_the_conditions_and_the_discriminator_where_samples_began(config, networks, begun):
    notes = {name: [] for name in networks}
    nets = {name: noting(notes[name]) for name in networks}
    if "discriminator" in networks:
        nets["discriminator"] = Net({"w": jnp.asarray(0.5)}, {}, Judge(notes["discriminator"]))
    method = config(edm())
    for name, loss in method.losses.items():
        called = {k: len(v) for k, v in notes.items()}
        loss(nets, BATCH, Progress(0, jnp.asarray(1.0)), jax.random.key(1))
        assert len(notes[name]) > called[name]
    assert all(notes.values())
    for name, calls in notes.items():
        for cond, s in calls:
            np.testing.assert_array_equal(cond, LABELS)
            if name == "discriminator":
                assert (s is not None) == begun
                assert s is None or set(np.asarray(s).tolist()) <= set(np.asarray(renoising_times(edm(), 4)).tolist())
