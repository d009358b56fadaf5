"""What published recipes need: RAdam, teachers held at a scale, pairs made batch by batch, and given times."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddistill import edm, sharding
from ddistill.config import Optimizer
from ddistill.data.pairs import fresh_pairs
from ddistill.integrators import heun
from ddistill.methods import DMD, GAN
from ddistill.methods.base import Pairs
from ddistill.methods.consistency import renoising_times
from ddistill.net import Net, Scaled, at_scale
from ddistill.networks.conditions import Prompt
from ddistill.process import discrete_vp, linear_betas


@pytest.mark.torch
def test_rectified_adam_steps_as_pytorch_does():
    torch = pytest.importorskip("torch")
    start, slopes = np.array([1.0, -2.0, 0.5], np.float32), np.random.default_rng(0).normal(size=(12, 3))
    theirs = torch.nn.Parameter(torch.tensor(start))
    radam = torch.optim.RAdam([theirs], lr=0.0, betas=(0.9, 0.9), weight_decay=0.1, decoupled_weight_decay=True)
    made = Optimizer(0.05, warmup=4, decay=False, b2=0.9, weight_decay=0.1, rectified=True).build(12)
    ours, state = jnp.asarray(start), made.init(jnp.asarray(start))
    for step, slope in enumerate(slopes):
        updates, state = made.update(jnp.asarray(slope, jnp.float32), state, ours)
        ours = optax.apply_updates(ours, updates)
        radam.param_groups[0]["lr"] = 0.05 * min(step / 4, 1.0)
        theirs.grad = torch.tensor(slope, dtype=torch.float32)
        radam.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5)
    assert np.abs(np.asarray(ours) - start).max() > 0.05


def test_a_teacher_held_at_a_scale_takes_plain_conditions():
    def code(params, rest, x, t, cond, *, s, key):
        assert isinstance(cond, Scaled)
        return params["a"] * x * cond.w[:, None] + cond.cond[:, None]

    net = at_scale(Net({"a": jnp.asarray(2.0)}, {}, code), 3.5)
    x, cond = jnp.ones((2, 3)), jnp.asarray([1.0, 10.0])
    np.testing.assert_array_equal(net(x, 1.0, cond), [[8.0] * 3, [17.0] * 3])


def test_pairs_made_batch_by_batch_follow_the_flow_under_the_datas_conditions():
    """Of data N(m, 1/4), m the prompt's: the flow takes z at σ = 80 to m + (z − m) .5/√(.25 + 80²)."""

    def code(params, rest, x, t, cond, *, s, key):
        m = cond.states[:, :1, 0]
        return m + (x - m) * 0.25 / (0.25 + t[:, None] ** 2)

    mesh, process = sharding.make_mesh(), edm()
    rows = 4 * mesh.size
    means = np.linspace(-2, 2, rows, dtype=np.float32)
    data = {"x": np.zeros((rows, 3), np.float32), "cond": Prompt(np.tile(means[:, None, None], (1, 2, 1)))}
    source = fresh_pairs(
        Net({}, {}, code), process, jax.random.key(3), lambda step: data, mesh, steps=64, integrator=heun
    )
    batch, other = source(0), source(1)
    noise, m = np.asarray(batch["noise"]), means[:, None]
    assert 60 < noise.std() < 100
    np.testing.assert_allclose(batch["x"], m + (noise - m) * 0.5 / np.sqrt(0.25 + 80**2), atol=0.02)
    np.testing.assert_array_equal(batch["cond"].states, data["cond"].states)
    np.testing.assert_array_equal(source(0)["noise"], noise)
    assert np.abs(np.asarray(other["noise"]) - noise).min() > 0
    placed = sharding.put_batch(mesh, batch)
    assert placed["x"] is batch["x"]
    with pytest.raises(ValueError, match="pairs made batch by batch .* have no path"):
        Pairs(count=0, steps=4, points=2)


def test_students_of_several_steps_take_given_times():
    process, inner = discrete_vp(linear_betas().tolist()), (750.0, 500.0, 250.0)
    np.testing.assert_array_equal(renoising_times(process, 4, inner), [1000, 750, 500, 250, 0])
    np.testing.assert_array_equal(DMD(steps=4, inner=inner).sampling_times(process, 4), [1000, 750, 500, 250, 0])
    np.testing.assert_array_equal(DMD(steps=4, inner=inner).sampling_times(process, 1), [1000, 0])
    np.testing.assert_array_equal(GAN(steps=4, inner=inner).times(process, 2), [1000, 500, 0])
    with pytest.raises(ValueError, match="3 are needed"):
        renoising_times(process, 4, inner[:2])
    student = Net({}, {}, lambda params, rest, x, t, cond, *, s, key: 0 * x)
    _, t = DMD(steps=4, inner=inner).start(process, student, (64, 2), None, jax.random.key(0))
    assert set(np.asarray(t)) == {1000, 750, 500, 250}
