"""What a step computes and keeps: samples shared by losses, and rematerialisation by policy, counted in FLOPs."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ddistill.config import Imported
from ddistill.integrators import euler
from ddistill.methods import ADD, CTM, DMD, GAN, Adversary, Consistency
from ddistill.methods.base import Space
from ddistill.methods.sharing import Nets, once
from ddistill.net import EDMPrecondition, Net, from_nnx, split
from ddistill.networks.dit import DiT, DiTConfig
from ddistill.networks.edm import SongUNet, SongUNetConfig
from ddistill.networks.layers import Stack
from ddistill.overrides import override
from ddistill.process import edm
from ddistill.stages import prepare
from ddistill.train import make_trainer

pytestmark = pytest.mark.usefixtures("one_device")
SIDE, BATCH = 16, 4


@pytest.fixture(scope="module")
def flops():
    path = Path(__file__).parents[1] / "experiments" / "bench" / "networks.py"
    spec = importlib.util.spec_from_file_location("bench_networks", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return lambda function, *args: module.flops(jax.make_jaxpr(function)(*args).jaxpr)


def dit(remat=False):
    config = DiTConfig(
        num_attention_heads=2, attention_head_dim=32, in_channels=2, num_layers=3, sample_size=SIDE,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    return DiT(config, remat=remat, rngs=nnx.Rngs(0))


def song(remat=False):
    config = SongUNetConfig(
        img_resolution=SIDE, in_channels=2, out_channels=2, model_channels=16, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(SIDE,), dropout=0.0,
    )  # fmt: skip
    return SongUNet(config, remat=remat, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (Consistency(solver=euler), 5),  # student 3, target 1, teacher 1
        (DMD(), 8),  # student 3, teacher 1, fake score 1 for the student and 3 for itself
        (DMD(steps=2), 9),  # and one to renoise from
    ],
)
def test_a_step_takes_the_forward_passes_that_a_hand_counts(flops, method, passes):
    made = method(edm())
    trainer = make_trainer(made, dict.fromkeys(made.losses, optax.adam(1e-3)))
    teacher = jax.eval_shape(lambda: from_nnx(dit(), edm(), EDMPrecondition()))
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {"x": jnp.zeros((BATCH, SIDE, SIDE, 2)), "cond": jnp.zeros(BATCH, jnp.int32)}
    space = Space((SIDE, SIDE, 2), 5)
    nets, state = jax.eval_shape(lambda net, key: prepare(trainer, net, net, key, space), teacher, key)
    forward = flops(lambda net: net(batch["x"], jnp.ones(BATCH), batch["cond"]), teacher)
    step = flops(lambda state, nets: trainer.step(state, nets, batch, made.turn(0), 10), state, nets)
    assert step / forward == pytest.approx(passes, rel=0.01)


def test_what_is_computed_once_is_differentiated_by_its_own_network_and_by_no_other():
    def both(w, learners):
        made, key = {}, jax.random.key(0)
        count, losses = [], []
        for learner in learners:
            nets = Nets({"a": w}, learner, made)
            losses.append(once(nets, "a", key, lambda: count.append(1) or 3.0 * w))
        return sum(losses), len(count)

    assert jax.grad(both, has_aux=True)(2.0, ["a", "b", "c"]) == (3.0, 1)
    assert jax.grad(both, has_aux=True)(2.0, ["b", "a"]) == (6.0, 2)  # too early to share
    assert once({"a": 1}, "a", jax.random.key(0), lambda: 5) == 5


JUDGED = CTM(adversary=Adversary(), last_layer="map_layer1.kernel")


@pytest.mark.parametrize(
    ("config", "jumps"),
    [(GAN(), 1), (ADD(), 1), (JUDGED, 8)],  # CTM's samples and its goal take two each, and each weight takes two again
    ids=["gan", "add", "ctm"],
)
def test_a_discriminator_sees_the_samples_of_the_students_own_loss(config, jumps):
    calls, jump, method = [], Net.jump, config(edm())

    def counted(self, *args, **options):
        calls.append(1)
        return jump(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "jump", counted)
        teacher = jax.eval_shape(lambda: from_nnx(song(), edm(), EDMPrecondition()))
        trainer = make_trainer(method, dict.fromkeys(method.losses, optax.adam(1e-3)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        nets, state = jax.eval_shape(
            lambda net, key: prepare(trainer, net, net, key, Space((SIDE, SIDE, 2))), teacher, key
        )
        batch = {"x": jnp.zeros((BATCH, SIDE, SIDE, 2))}
        seen = jax.eval_shape(lambda *a: trainer.step(*a, method.turn(0), 10), state, nets, batch)
    assert len(calls) == jumps and "discriminator/loss" in seen[1]


@pytest.mark.parametrize(("make", "anew"), [(dit, 4.0), (song, 3.7)])
def test_blocks_compute_anew_what_the_policy_leaves_them(flops, make, anew):
    def passes(remat):
        params, rest, code = split(nnx.eval_shape(lambda: make(remat)))
        x = jnp.zeros((BATCH, SIDE, SIDE, 2))

        def loss(params, rest):
            return jnp.mean(code(params, rest)(x, jnp.ones(BATCH)) ** 2)

        return flops(jax.grad(loss), params, rest) / flops(loss, params, rest)

    assert passes(False) == pytest.approx(3, rel=0.01)
    assert passes(True) == pytest.approx(anew, rel=0.05)
    # Attention's two products without weights alone.
    assert 3.01 < passes("dots") < 3.3


def test_every_policy_gives_the_same_gradients():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(rngs.params()))

        def __call__(self, x):
            return x + jnp.tanh(self.linear(x))

    def gradient(remat):
        params, rest, code = split(Stack(Layer, 3, remat=remat, rngs=nnx.Rngs(0)))
        x = jnp.arange(8.0).reshape(2, 4) / 8
        return jax.tree.leaves(jax.grad(lambda p: jnp.sum(code(p, rest)(x) ** 2))(params))

    plain = gradient(False)
    for policy in (True, "dots"):
        for ours, theirs in zip(gradient(policy), plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_policy_is_a_flag():
    teacher = Imported(Path("teacher"))
    assert [override(teacher, ["--remat", given], "test").remat for given in ("dots", "True")] == ["dots", True]
