"""Adversaries: losses by hand, what R1 is taken by, who learns from what, and features of networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ddistill.features import features
from ddistill.lora import LoRA, adapt
from ddistill.losses.adversarial import Hinge, Logistic
from ddistill.losses.times import KarrasRamp
from ddistill.methods.adversarial import Adversary, balance
from ddistill.methods.base import Progress, Space
from ddistill.methods.discriminators import FeatureHeads, Plain, TeacherHeads
from ddistill.methods.gan import GAN
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import EDMPrecondition, Net, from_nnx, guided, retime
from ddistill.networks import MLP
from ddistill.networks.discriminators import Head, Heads, PlainDiscriminator
from ddistill.process import edm, vp
from ddistill.stages import prepare
from ddistill.train import make_trainer

P = edm()
SPACE = Space((2, 3), 4)
X = 0.5 * jax.random.normal(jax.random.key(0), (6, 2, 3))
LABELS = jnp.asarray([0, 1, 2, 3, 4, -1])


@pytest.fixture(scope="module")
def module():
    module = MLP(6, 16, 3, num_classes=4, rngs=nnx.Rngs(0))
    for i, block in enumerate(module.blocks):
        block.contract.kernel.set_value(0.1 * jax.random.normal(jax.random.key(i), (16, 16)))
    return module


@pytest.fixture(scope="module")
def teacher(module):
    return from_nnx(module, P, EDMPrecondition())


def randomised(net, key=5):
    leaves, tree = jax.tree.flatten(net.params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    noise = [w + 0.3 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return net.replace(params=jax.tree.unflatten(tree, noise))


def made(choice, teacher, process=P):
    return randomised(choice(process, teacher, jax.random.key(1), SPACE))


def test_losses_by_hand():
    logits = jnp.asarray([[2.0, 0.0], [-1.0, 0.5]])  # two samples, two heads, all of one weight
    hinge, logistic = Hinge(), Logistic()
    np.testing.assert_allclose(hinge.real(logits), (0 + 1 + 2 + 0.5) / 4)
    np.testing.assert_allclose(hinge.fake(logits), (3 + 1 + 0 + 1.5) / 4)
    np.testing.assert_allclose(hinge.generator(logits), -1.5 / 4)
    soft = np.log1p(np.exp([-2.0, 0, 1, -0.5])).mean()
    np.testing.assert_allclose([logistic.real(logits), logistic.generator(logits)], soft, rtol=1e-6)
    np.testing.assert_allclose(logistic.fake(logits), np.log1p(np.exp([2.0, 0, -1, 0.5])).mean(), rtol=1e-6)
    assert hinge.real(logits.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("loss", [Hinge(), Logistic()], ids=["hinge", "logistic"])
def test_the_best_discriminator_measures_a_divergence(loss):
    real, fake = np.repeat(np.arange(3), [5, 3, 2]), np.repeat(np.arange(3), [2, 2, 6])
    p, q = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.2, 0.2, 0.6])
    middle = (p + q) / 2
    js = 0.5 * np.sum(p * np.log(p / middle)) + 0.5 * np.sum(q * np.log(q / middle))
    if loss == Hinge():
        best, bound = np.sign(p - q), 2 - np.abs(p - q).sum()
    else:
        best, bound = np.log(p / q), 2 * np.log(2) - 2 * js

    def value(d):
        return float(loss.real(jnp.asarray(d[real])[:, None]) + loss.fake(jnp.asarray(d[fake])[:, None]))

    assert value(best) == pytest.approx(bound, abs=1e-6)
    others = best + np.random.default_rng(0).normal(0, 1, (50, 3))
    assert min(value(d) for d in others) > bound - 1e-6


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """f = scale x and logits (½ a ‖f‖², ½ b ‖f‖²) with params a, b."""

    scale: float = 1.0

    def see(self, rest, x, t, cond):
        return {"f": self.scale * x}

    def judge(self, params, rest, seen, t, cond, s):
        return 0.5 * jnp.stack([params["a"], params["b"]]) * jnp.sum(seen["f"] ** 2, axis=(1, 2))[:, None]

    def __call__(self, params, rest, x, t, cond, *, s=None, key=None):
        return self.judge(params, rest, self.see(rest, x, t, cond), t, cond, s)


def nets_of(a=1.0, b=3.0, scale=1.0):
    return {"discriminator": Net({"a": jnp.asarray(a), "b": jnp.asarray(b)}, {}, Quadratic(scale))}


def test_r1_is_taken_by_the_features_and_not_by_the_sample():
    # D = ½ c ‖f‖², c = (a + b)/2: ∇_f D = c f, whose mean square is c² E‖f‖²; by x it would be scale² as much.
    config = Adversary(r1=0.7, r2=0.2, noise=None, loss=Hinge())
    fake, a, b = 0.3 * X[::-1], 1.0, 3.0

    def of(scale, x=X):
        return config.discriminator(P, nets_of(a, b, scale), x, fake, None, jax.random.key(0))

    for scale in (1.0, 2.0):
        loss, metrics = of(scale)
        square, square_fake = (float(jnp.mean(jnp.sum((scale * y) ** 2, axis=(1, 2)))) for y in (X, fake))
        c = (a + b) / 2
        assert float(metrics["slope"]) == pytest.approx(c**2 * square, rel=1e-5)
        penalty = 0.5 * (0.7 * c**2 * square + 0.2 * c**2 * square_fake)
        assert float(loss - metrics["gan"]) == pytest.approx(penalty, rel=1e-4)
    assert float(of(2.0, X / 2)[1]["slope"]) == pytest.approx(float(of(1.0)[1]["slope"]), rel=1e-5)
    loss, metrics = dataclasses.replace(config, r1=None, r2=None).discriminator(
        P, nets_of(), X, fake, None, jax.random.key(0)
    )
    squares = float(jnp.mean(jnp.sum(X**2 + fake**2, axis=(1, 2))))
    assert float(loss - metrics["gan"]) == pytest.approx(0.5 * 0.01 * X[0].size * c**2 * squares, rel=1e-4)
    plain = dataclasses.replace(config, r1=0.0, r2=0.0)
    loss, metrics = plain.discriminator(P, nets_of(), X, fake, None, jax.random.key(0))
    assert loss == metrics["gan"] and metrics["slope"] == 0


def test_the_gradient_of_r1_reaches_the_discriminator():
    # ½ γ c² E‖f‖² by a is ½ γ c E‖f‖²; the hinge is flat where all logits are far above 1 and below −1.
    config = Adversary(r1=0.7, noise=None, loss=Hinge())

    def loss(a):
        nets = {"discriminator": Net({"a": a, "b": jnp.asarray(9.0)}, {}, Quadratic())}
        return config.discriminator(P, nets, 100 * X, 0 * X, None, jax.random.key(0))[0]

    square = float(jnp.mean(jnp.sum((100 * X) ** 2, axis=(1, 2))))
    assert float(jax.grad(loss)(3.0)) == pytest.approx(0.5 * 0.7 * 6 * square, rel=1e-4)


@pytest.mark.parametrize("choice", [Plain(16, 2), TeacherHeads(), FeatureHeads(lambda x: [x, x.reshape(len(x), 6)])])
def test_the_slope_of_a_network_agrees_with_finite_differences(choice, teacher, x64):
    judge = made(choice, jax.tree.map(lambda a: a.astype(jnp.float64), teacher))
    judge = jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, judge)
    code, t = judge.apply, jnp.full(6, 0.7)
    seen = code.see(judge.rest, X.astype(jnp.float64), t, LABELS)

    def mean_logits(seen):
        return jnp.mean(code.judge(judge.params, judge.rest, seen, t, LABELS, None), axis=1)

    config = Adversary(noise=lambda process, key, n: t, loss=Hinge())
    x = X - process_noise(config)
    slope = config.discriminator(P, {"discriminator": judge}, x, x, LABELS, jax.random.key(3))[1]["slope"]
    total, h = 0.0, 1e-4
    leaves, tree = jax.tree.flatten(seen)
    for i, leaf in enumerate(leaves):
        flat = leaf.reshape(6, -1)
        for j in range(flat.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = flat.at[:, j].add(sign * h).reshape(leaf.shape)
                ends.append(mean_logits(jax.tree.unflatten(tree, [*leaves[:i], moved, *leaves[i + 1 :]])))
            total += float(jnp.mean(((ends[0] - ends[1]) / (2 * h)) ** 2))
    assert total > 0 and float(slope) == pytest.approx(total, rel=1e-3)


def process_noise(config):
    """The noise .7 ε that the adversary will add with the key of the test above."""
    x_t, _ = config._noised(P, jnp.zeros_like(X), jax.random.key(3))
    return x_t


def test_data_and_samples_meet_at_the_same_noise():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watched(Quadratic):
        def see(self, rest, x, t, cond):
            seen.append((x, t))
            return {"f": x}

    nets = {"discriminator": Net({"a": jnp.ones(()), "b": jnp.ones(())}, {}, Watched())}
    config, fake = Adversary(noise=KarrasRamp(0.3, 1.0), r1=0.0), 0 * X
    config.discriminator(P, nets, X, fake, None, jax.random.key(0))
    config.generator(P, nets, fake, None, jax.random.key(0))
    (real_t, t), (fake_t, t2), (again, t3) = seen
    np.testing.assert_allclose(real_t - fake_t, X, atol=2e-6 * float(jnp.abs(fake_t).max()))
    np.testing.assert_array_equal(fake_t, again)
    np.testing.assert_array_equal(t, t2)
    np.testing.assert_array_equal(t, t3)
    assert len(set(np.asarray(t).tolist())) == 6 and P.t_min <= t.min() and t.max() < 20
    seen.clear()
    dataclasses.replace(config, noise=None).generator(P, nets, X, None, jax.random.key(0))
    np.testing.assert_array_equal(seen[0][0], X)
    assert np.all(np.asarray(seen[0][1]) == np.float32(P.t_min))


def test_each_learns_from_its_own_loss_alone(teacher):
    judge = made(Plain(16, 1), teacher)

    def losses(params, fake):
        nets, key = {"discriminator": judge.replace(params=params)}, jax.random.key(0)
        config = Adversary()
        mine = config.discriminator(P, nets, X, fake, LABELS, key)[0]
        return config.generator(P, nets, fake, LABELS, key), mine

    by_params, by_fake = zip(*jax.jit(jax.jacrev(losses, argnums=(0, 1)))(judge.params, X + 1), strict=True)
    assert optax.tree.norm(by_params[0]) == 0 and optax.tree.norm(by_params[1]) > 0
    assert optax.tree.norm(by_fake[0]) > 0 and optax.tree.norm(by_fake[1]) == 0


def test_heads_answer_a_logit_for_every_token_of_every_map():
    heads = Heads([(5,), (4, 4, 3), (7, 2)], 8, num_classes=4, rngs=nnx.Rngs(0))
    maps = [jnp.ones((6, 5)), jax.random.normal(jax.random.key(0), (6, 4, 4, 3)), jnp.ones((6, 7, 2))]
    assert heads(maps, jnp.zeros(6), LABELS).shape == (6, 1 + 16 + 7)
    shifted = jnp.roll(maps[1].reshape(6, 16, 3), 3, axis=1).reshape(6, 4, 4, 3)  # tokens form a circle
    before, after = (heads([maps[0], m, maps[2]], jnp.zeros(6), LABELS) for m in (maps[1], shifted))
    np.testing.assert_allclose(after[:, 1:17], jnp.roll(before[:, 1:17], 3, axis=1), atol=1e-5)
    with pytest.raises(ValueError, match="3 heads cannot judge 2 feature maps"):
        heads(maps[:2], jnp.zeros(6), LABELS)


def test_a_head_projects_on_the_condition():
    head, f = Head(4, 3, 64, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 4, 3))
    h = nnx.leaky_relu(head.first(head.inward(f)), 0.2)
    h = (h + nnx.leaky_relu(head.second(head.mix(h)), 0.2)) / np.sqrt(2)
    e = jax.random.normal(jax.random.key(1), (2, 64))
    difference = head(f, e) - head(f, 0 * e)
    np.testing.assert_allclose(difference, np.einsum("btc,bc->bt", h, e) / 8, atol=1e-5)


def test_no_label_is_one_condition_and_vectors_are_another(teacher):
    for choice in (Plain(16, 1), TeacherHeads()):
        judge = made(choice, teacher)
        none = judge(X, 0.5)
        np.testing.assert_allclose(judge(X, 0.5, jnp.full(6, -1)), none, atol=1e-6)
        np.testing.assert_allclose(judge(X, 0.5, jnp.full(6, 4)), none, atol=1e-6)
        assert np.abs(judge(X, 0.5, jnp.zeros(6, jnp.int32)) - none).min() > 1e-4
    module = PlainDiscriminator(6, 16, 1, vector=3, rngs=nnx.Rngs(0))
    assert module(X, jnp.zeros(6), jnp.ones((6, 3))).shape == (6, 1)
    with pytest.raises(ValueError, match=r"takes cond \[B, 3\]; given None"):
        module(X, jnp.zeros(6))
    with pytest.raises(ValueError, match="without conditions"):
        PlainDiscriminator(6, 16, 1, rngs=nnx.Rngs(0))(X, jnp.zeros(6), LABELS)
    with pytest.raises(ValueError, match="made for the shape of a sample"):
        Plain()(P, teacher, jax.random.key(0), Space())


def test_samples_of_each_time_can_be_judged_apart(teacher):
    judge, origin = made(Plain(16, 1), teacher), jnp.asarray([80.0, 80, 80, 0.2, 0.2, 0.2])
    config = Adversary(noise=None, r1=0.0, loss=Hinge())
    nets, key = {"discriminator": judge}, jax.random.key(0)
    told = judge(X, P.t_min, LABELS, s=origin)
    assert np.abs(told - judge(X, P.t_min, LABELS)).min() > 1e-4
    np.testing.assert_allclose(config.generator(P, nets, X, LABELS, key, origin), -jnp.mean(told), rtol=1e-5)
    metrics = config.discriminator(P, nets, X, X, LABELS, key, origin)[1]
    np.testing.assert_allclose([metrics["real"], metrics["fake"]], jnp.mean(told), rtol=1e-4)


def test_features_are_the_blocks_computed_by_hand(module, teacher):
    t = jnp.full(6, 0.7)
    c_in, c_noise = EDMPrecondition()(P, t)[2:]
    flat = (c_in[:, None, None] * X).reshape(6, 6)
    h = module.time(module.fourier(c_noise)) + module.label(jnp.where(LABELS < 0, 4, LABELS))
    h = nnx.silu(module.embed(nnx.silu(h)))
    y = module.inward(jnp.concatenate([flat, module.waves(flat)], axis=-1))
    got = jax.jit(lambda net, x: features(net, x, 0.7, LABELS))(teacher, X)
    assert sorted(got) == ["blocks.0", "blocks.1", "blocks.2"]
    for i, block in enumerate(module.blocks):
        y = block(y, h, rngs=None)
        np.testing.assert_allclose(got[f"blocks.{i}"], y, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(features(teacher, x, 0.7, LABELS, layers=["blocks.1"])["blocks.1"]))(X)
    assert np.all(np.any(gradient != 0, axis=(1, 2)))
    assert list(features(teacher, X, 0.7, LABELS, layers=["inward", "blocks.0"])) == ["inward", "blocks.0"]


def test_features_of_networks_inside_others(teacher):
    moved, at = retime(teacher, P, vp()), 0.4
    rho = float(vp().rho(at))
    inside = features(teacher, X / float(vp().alpha(at)), rho, LABELS)
    for name, value in features(moved, X, at, LABELS).items():
        np.testing.assert_allclose(value, inside[name], rtol=1e-3, atol=1e-3)
    adapted = adapt(teacher, LoRA(rank=2), jax.random.key(0))
    np.testing.assert_allclose(
        features(adapted, X, 0.7, LABELS)["blocks.2"], features(teacher, X, 0.7, LABELS)["blocks.2"], atol=1e-5
    )
    exact = as_teacher(Mixture.load("ring8"), P)
    for net, name in ((guided(teacher, 2.0, -1), "Guided"), (exact, type(exact.apply).__name__.strip("_"))):
        with pytest.raises(ValueError, match=f"features come from NNX networks.* this is a {name}"):
            features(net, X, 0.7, LABELS)
    with pytest.raises(ValueError, match=r"no modules \['blocks.9'\] in this network, which calls .*'blocks.0'"):
        features(teacher, X, 0.7, LABELS, layers=["blocks.9"])


def test_teacher_heads_judge_the_frozen_teacher_at_the_noised_sample(teacher):
    judge = made(TeacherHeads(("blocks.2", "blocks.0")), teacher)
    assert not set(judge.params) & set(teacher.params)
    maps = list(features(teacher, X, 0.7, LABELS, layers=["blocks.2", "blocks.0"]).values())
    heads = judge.apply.heads(judge.params, judge.rest["heads"])
    by_hand = heads(maps, jnp.full(6, 0.25 * np.log(0.7)), LABELS)
    np.testing.assert_allclose(judge(X, 0.7, LABELS), by_hand, atol=1e-5)
    outside = made(FeatureHeads(teacher, ("blocks.1",)), teacher)
    assert outside(X, P.t_min, LABELS).shape == (6, 1)


def test_the_adaptive_weight_is_a_quotient_of_gradients(x64):
    net = Net({"last": jnp.asarray([0.3, -0.7]), "first": jnp.asarray(2.0)}, {}, Quadratic())

    def main(net):
        return jnp.sum(jnp.sin(net.params["first"] * net.params["last"]))

    def other(net):
        return jnp.prod(net.params["last"] + net.params["first"]) ** 2

    def norm(loss, h=1e-5):
        moved = [
            net.replace(params={**net.params, "last": net.params["last"].at[i].add(s)}) for i in (0, 1) for s in (h, -h)
        ]
        a, b, c, d = map(loss, moved)
        return np.hypot((a - b) / (2 * h), (c - d) / (2 * h))

    expected = norm(main) / (norm(other) + 1e-4)
    assert float(balance(main, other, net, "last")) == pytest.approx(float(expected), rel=1e-6)
    stopped = jax.grad(lambda p: balance(main, other, net.replace(params=p), "last"))(net.params)
    assert optax.tree.norm(stopped) == 0
    with pytest.raises(ValueError, match="no parameters 'head' in the student"):
        balance(main, other, net, "head")


def test_a_turn_of_the_discriminator_leaves_the_student_as_it_is(teacher):
    method = GAN(Adversary(Plain(16, 1)), every=2)(P)
    assert method.turn(1) == ("discriminator",) and method.turn(2) == ("discriminator", "student")
    trainer = make_trainer(method, dict.fromkeys(("student", "discriminator"), optax.adam(1e-2)))
    nets, state = prepare(trainer, teacher, teacher, jax.random.key(0), SPACE)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = trainer.step(
        state, nets, {"x": jnp.tile(X, (4, 1, 1)), "cond": jnp.tile(LABELS, 4)}, method.turn(1)
    )
    after = jax.tree.map(np.asarray, state.params)
    assert all(np.array_equal(after["student"][n], w) for n, w in before["student"].items())
    assert any(not np.array_equal(after["discriminator"][n], w) for n, w in before["discriminator"].items())
    assert np.isfinite(metrics["discriminator/loss"])


def test_samples_are_jumps_from_noised_data_at_the_times_of_the_sampler():
    seen = []

    def watched(p, rest, x, t, cond, *, s, key):
        seen.append((x, t, s))
        return 0 * x

    config, x = GAN(steps=4, first=0.7), jnp.ones((4000, 1))
    method = config(P)
    nets = {"student": Net({}, {}, watched), "discriminator": Net({}, {}, lambda p, r, x, t, c, **k: x)}
    method.losses["student"](nets, {"x": x}, Progress(0), jax.random.key(0))
    (x_t, t, s) = (np.asarray(a) for a in seen[0])
    nodes = np.asarray(method.sampling.times(4))
    np.testing.assert_allclose([np.mean(t == n) for n in nodes], [0.7, 0.1, 0.1, 0.1, 0], atol=0.025)
    assert np.all(s == 0)
    for node in nodes[:-1]:
        at = (x_t[t == node, 0] - 1) / node
        assert abs(at.mean()) < 4 / np.sqrt(len(at)) and at.std() == pytest.approx(1, abs=0.15)
    np.testing.assert_array_equal(method.sampling.times(1), [80, 0])
    np.testing.assert_array_equal(method.sampling.times(2), nodes[[0, 2, 4]])
    with pytest.raises(ValueError, match="knows 4 times and samples in a divisor of it; given 3 steps"):
        method.sampling.times(3)
    one = GAN(steps=1)
    seen.clear()
    one(P).losses["student"](nets, {"x": x}, Progress(0), jax.random.key(0))
    assert np.all(np.asarray(seen[0][1]) == 80)


def test_at_the_first_time_the_student_sees_noise_alone():
    process, seen = vp(), []

    def student(params, rest, x, t, cond, *, s=None, key=None):
        seen.append((x, t))
        return 0 * x

    batch = {"x": jnp.full((512, 2), 1e6)}  # of which α_T = .0066 would leave 6600
    GAN(steps=4, first=0.5).fakes(process, {"student": Net({}, {}, student)}, batch, jax.random.key(0))
    ((x, t),) = seen
    first = np.asarray(t) == process.t_max
    assert 200 < first.sum() < 312 and np.abs(x[first]).max() < 6 and np.abs(x[~first]).min() > 1e4
    assert float(jnp.std(x[first])) == pytest.approx(float(process.sigma(process.t_max)), rel=0.1)
