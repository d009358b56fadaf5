"""What losses show their networks: samples of the process at the times they are told, their conditions, dropout's keys.

Where all data are one point K and every network answers K, whatever a loss makes of them lies at α_t K + σ_t ε, on any
process; on EDM, where α is 1, a factor that is forgotten would not be seen.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.methods import (
    ADD,
    CTM,
    DMD,
    GAN,
    KD,
    Adversary,
    Consistency,
    ConsistencyTraining,
    Denoising,
    Invertible,
    MultistepConsistency,
    PhasedConsistency,
    Progressive,
    RectifiedFlow,
)
from ddistill.methods.base import Progress, home, rounds
from ddistill.methods.fake_scores import Auxiliary
from ddistill.net import Net
from ddistill.process import vp

VP, K, B = vp(), 100.0, 64
LABELS = jnp.arange(B) % 3
BATCH = {
    "x": jnp.full((B, 2), K), "cond": LABELS,
    "noise": VP.alpha(VP.t_max) * K + VP.sigma(VP.t_max) * jax.random.normal(jax.random.key(1), (B, 2)),
}  # fmt: skip
UNSEEN = Adversary(r1=0.0, r2=0.0)  # whose penalties look through the discriminator's gradient


class Code:
    """Answers K, and notes what it was asked: its name, x, t, cond, s and key."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __call__(self, params, rest, x, t, cond, *, s=None, key=None):
        self.seen.append((self.name, x, t, cond, s, key))
        return K + 0 * x


class Judge(Code):
    """A discriminator, of all as good."""

    def see(self, rest, x, t, cond):
        return x

    def judge(self, params, rest, seen, t, cond, s):
        self.seen.append((self.name, seen, t, cond, s, None))
        return 0 * seen[:, :1]

    def __call__(self, params, rest, x, t, cond, *, s=None, key=None):
        return self.judge(params, rest, self.see(rest, x, t, cond), t, cond, s)


METHODS = {
    "denoising": Denoising(), "kd": KD(steps=(1,)), "progressive": Progressive(), "rectified_flow": RectifiedFlow(),
    "consistency": Consistency(), "consistency_training": ConsistencyTraining(), "ctm": CTM(dsm=0.3),
    "multistep": MultistepConsistency(), "addim": MultistepConsistency(addim=0.5), "phased": PhasedConsistency(),
    "invertible": Invertible(), "dmd": DMD(steps=3), "dmd_alone": DMD(Auxiliary(stable=False)),
    "gan": GAN(UNSEEN, steps=4), "add": ADD(UNSEEN),
}  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def asked(request):
    """The method's losses by the names of their networks, and what each of its networks was asked by each."""
    made = METHODS[request.param](VP)
    process, method, found = home(made, VP), rounds(made)[0].method, {}
    for trained, loss in method.losses.items():
        seen = []
        nets = {name: Net({}, {}, Code(name, seen)) for name in {"teacher", *method.init, *method.ema}}
        nets |= {"discriminator": Net({}, {}, Judge("discriminator", seen))}
        with jax.disable_jit():
            loss(nets, BATCH, Progress(0), jax.random.key(0))
        found[trained] = seen
    return process, found


def test_samples_are_those_of_the_process_at_their_times(asked):
    process, found = asked
    for trained, calls in found.items():
        for name, x, t, *_, key in calls:
            if key is None and name != "discriminator":  # solvers and samplers also ask where a step is masked
                continue
            t = jnp.broadcast_to(t, (B,))
            off = np.abs(x - process.alpha(t)[:, None] * K) / (process.sigma(t)[:, None] + 1e-3)
            assert np.all(off < 7), (trained, name, float(off.max()))


def test_every_network_is_told_the_conditions(asked):
    for trained, calls in asked[1].items():
        assert trained in {name for name, *_ in calls}
        for name, _, _, cond, *_ in calls:
            assert cond is not None and np.array_equal(cond, LABELS), (trained, name)


def test_the_network_that_is_trained_has_dropout_and_the_teacher_has_none(asked):
    for trained, calls in asked[1].items():
        keys = [key for name, *_, key in calls if name == trained]
        assert trained == "discriminator" or any(key is not None for key in keys), trained
        assert not any(key is not None for name, *_, key in calls if name == "teacher")
