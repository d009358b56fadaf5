"""Distribution matching in linear worlds: the generator is m + s z, the data N(0, c²)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddistill.lora import LoRA
from ddistill.losses.score import Likelihood, NoisePrediction
from ddistill.losses.times import KarrasRamp, karras_time
from ddistill.losses.weightings import DataWeight, EDMWeight
from ddistill.methods import GAN, KD, Adversary, Progressive, RectifiedFlow
from ddistill.methods.base import UNKNOWN, Progress, Space
from ddistill.methods.consistency import renoising_times
from ddistill.methods.discriminators import Plain
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Auxiliary, Delta, Drawn, MultiSample
from ddistill.methods.guidance import Guided
from ddistill.methods.sds import SDS, particles, sds_gradient
from ddistill.methods.sharing import Nets, once
from ddistill.methods.together import Together
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net, Scaled, from_extra_scale, guided
from ddistill.process import edm, flow, vp
from ddistill.stages import Stage, prepare, run
from ddistill.train import make_trainer

C = 0.5
EDM = edm()
X = jnp.zeros((64, 1))
PROGRESS = Progress(0)
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("one_device")


def gaussian(process=EDM, std=C):
    """The denoiser of N(0, std²), std a parameter."""

    def denoise(params, rest, x, t, cond, *, s, key):
        alpha, sigma, c = process.alpha(t)[:, None], process.sigma(t)[:, None], params["std"]
        return alpha * c**2 * x / (alpha**2 * c**2 + sigma**2)

    return Net({"std": jnp.asarray(std)}, {}, denoise)


def generator(mean=0.0, std=C, process=EDM):
    """G(z) = mean + std z."""

    def draw(params, rest, x, t, cond, *, s, key):
        return params["mean"] + params["std"] * x / process.sigma(t)[:, None]

    return Net({"mean": jnp.asarray(mean), "std": jnp.asarray(std)}, {}, draw)


@dataclasses.dataclass(frozen=True)
class At:
    """Every time the same."""

    t: float

    def __call__(self, process, key, n):
        return jnp.full((n,), self.t)


def untraceable(net):
    """The same network; whoever differentiates it raises."""

    def apply(params, rest, x, t, cond, *, s, key):
        @jax.custom_vjp
        def call(params, x):
            return net.apply(params, rest, x, t, cond, s=s, key=key)

        def backward(residual, cotangent):
            raise AssertionError("differentiated")

        call.defvjp(lambda params, x: (call(params, x), None), backward)
        return call(params, x)

    return Net(net.params, net.rest, apply)


def test_a_student_with_the_teachers_distribution_stays():
    nets = {"student": generator(), "teacher": gaussian(), "fake": gaussian()}
    loss = DMD()(EDM).losses["student"]
    gradient = jax.jit(
        jax.grad(lambda p: loss(nets | {"student": nets["student"].replace(params=p)}, {"x": X}, PROGRESS, KEY)[0])
    )
    assert all(float(jnp.abs(g)) == 0 for g in jax.tree.leaves(gradient(nets["student"].params)))


def test_the_students_gradient_is_that_of_the_divergence():
    """KL(N(m, s² + σ²) ‖ N(0, c² + σ²)) by m and s, of a student whose fake score is exact."""
    m, s, sigma, n = 0.4, 0.8, 0.5, 40_000
    method = DMD(weight=Likelihood(), times=At(sigma))(EDM)

    def fake(params, rest, x, t, cond, *, s, key):
        return m + 0.8**2 / (0.8**2 + t[:, None] ** 2) * (x - m)

    nets = {"student": generator(m, s), "teacher": gaussian(), "fake": Net({}, {}, fake)}

    def value(params):
        student = nets["student"].replace(params=params)
        return method.losses["student"](nets | {"student": student}, {"x": jnp.zeros((n, 1))}, PROGRESS, KEY)[0]

    gradient = jax.jit(jax.grad(value))(nets["student"].params)
    real, own = C**2 + sigma**2, s**2 + sigma**2
    # By z: m/real and s (1/real − 1/own), with standard errors below 1.5/√n.
    assert gradient["mean"] == pytest.approx(m / real, abs=4 * 1.5 / np.sqrt(n))
    assert gradient["std"] == pytest.approx(s * (1 / real - 1 / own), abs=4 * 1.5 / np.sqrt(n))


def test_the_fake_score_learns_the_students_distribution():
    method = DMD(Auxiliary(weighting=DataWeight()))(EDM)

    def value(std):
        nets = {"student": generator(0.0, 0.8), "fake": gaussian(std=std)}
        return method.losses["fake"](nets, {"x": jnp.zeros((4000, 1))}, PROGRESS, KEY)[0]

    narrow, right, broad = map(jax.jit(jax.grad(value)), (0.5, 0.8, 1.2))
    assert abs(right) < 0.1 * abs(narrow)
    assert narrow < 0 < broad


def test_the_fake_scores_weighting_counts():
    def value(weighting):
        times = dataclasses.replace(KarrasRamp(), low=0.5, high=0.5 + 1e-6)  # one time
        nets = {"student": generator(0.0, 0.8), "fake": gaussian(std=0.5)}
        fake = Auxiliary(times=times, weighting=weighting)
        return DMD(fake)(EDM).losses["fake"](nets, {"x": jnp.zeros((64, 1))}, PROGRESS, KEY)[0]

    t = karras_time(EDM, jnp.asarray(0.5))
    np.testing.assert_allclose(value(EDMWeight()) / value(DataWeight()), 1 / t**2 + 1 / 0.5**2, rtol=1e-3)


def test_students_of_several_steps_are_renoised_when_they_are_sampled():
    assert DMD(steps=4)(EDM).sampling.gamma == 1  # as in the backward simulation


def test_neither_scores_nor_noised_samples_are_differentiated():
    nets = {"student": generator(), "teacher": untraceable(gaussian()), "fake": untraceable(gaussian(std=0.3))}
    for fake in (Auxiliary(), Delta(), MultiSample()):
        loss = DMD(fake)(EDM).losses["student"]
        jax.grad(
            lambda p, loss=loss: loss(nets | {"student": generator().replace(params=p)}, {"x": X}, PROGRESS, KEY)[0]
        )(nets["student"].params)


def test_a_fake_only_turn_leaves_the_student_bit_for_bit_and_does_not_trace_its_backward_pass():
    method = DMD(every=5, weight=NoisePrediction())(EDM)
    start = {"student": lambda t, k, s: untraceable(generator()), "fake": lambda t, k, s: gaussian()}
    method = dataclasses.replace(method, init=start)
    trainer = make_trainer(method, {name: optax.adam(1e-2) for name in method.losses})
    nets, state = prepare(trainer, gaussian(), gaussian(), KEY)
    assert [method.turn(step) for step in range(6)] == [("fake", "student"), *[("fake",)] * 4, ("fake", "student")]
    before = jax.tree.map(np.asarray, (state.params, state.ema))
    state, _ = trainer.step(state, nets, {"x": X}, ("fake",))
    after = jax.tree.map(np.asarray, (state.params, state.ema))
    assert before[0]["student"] == after[0]["student"] and before[1] == after[1]
    assert before[0]["fake"] != after[0]["fake"]
    with pytest.raises(AssertionError, match="differentiated"):
        trainer.step(state, nets, {"x": X}, ("fake", "student"))


@pytest.mark.parametrize("process", [edm(), vp(), flow()], ids=lambda p: type(p.schedule).__name__)
def test_score_distillation_is_distribution_matching_with_a_point_mass_and_with_one_sample(process):
    teacher, noise, x = gaussian(process, 0.7), jnp.asarray([[0.3]]), jnp.asarray([[0.9]])
    t = jnp.asarray([0.5])
    eps_hat = process.eps(teacher(process.diffuse(x, noise, t), t), process.diffuse(x, noise, t), t)
    gradient = sds_gradient(teacher, process, x, t, noise, weight=NoisePrediction(0.0))
    np.testing.assert_allclose(gradient, eps_hat - noise, rtol=1e-5)  # Poole et al. 2023, eq. 3, with w = 1
    batch, nets = {"x": jnp.zeros((1, 1))}, {"student": generator(process=process), "teacher": teacher}

    def grad(method):
        def value(p):
            return method(process).losses["student"](
                nets | {"student": nets["student"].replace(params=p)}, batch, PROGRESS, KEY
            )[0]

        return jax.grad(value)(nets["student"].params)

    one = grad(SDS())
    for fake in (Delta(), MultiSample()):
        other = grad(DMD(fake, SDS().times, SDS().weight))
        np.testing.assert_array_equal(jax.tree.leaves(other), jax.tree.leaves(one))


def test_score_distillation_takes_guidance_in_either_convention():
    def apply(params, rest, x, t, cond, *, s, key):
        return 0.5 * x * jnp.where(cond >= 0, 1.0, 0.6)[:, None]

    x, noise, t = jnp.asarray([[0.4, -0.3]]), jnp.asarray([[-0.2, 0.9]]), jnp.asarray([0.8])
    teacher = Net({}, {}, apply)
    x_t, cond, null = x + 0.8 * noise, jnp.asarray([2]), jnp.asarray([-1])
    with_cond, without = ((x_t - teacher(x_t, t, c)) / 0.8 for c in (cond, null))

    def gradient(w):
        strong = guided(teacher, w, np.int32(-1))
        return sds_gradient(strong, EDM, x, t, noise, cond, weight=NoisePrediction(0.0))

    imagen = without + 7.5 * (with_cond - without) - noise
    threestudio = with_cond + 7.5 * (with_cond - without) - noise  # 1 more, by its own name for the scale
    np.testing.assert_allclose(gradient(7.5), imagen, rtol=1e-5)
    np.testing.assert_allclose(gradient(from_extra_scale(7.5)), threestudio, rtol=1e-5)


def test_variational_score_distillation_takes_the_fake_score_of_a_network():
    x, noise, t = jnp.asarray([[0.4]]), jnp.asarray([[-0.2]]), jnp.asarray([0.8])
    same = sds_gradient(gaussian(), EDM, x, t, noise, fake=gaussian())
    np.testing.assert_array_equal(same, 0)
    assert sds_gradient(gaussian(), EDM, x, t, noise, fake=gaussian(std=0.1)) < 0  # the narrower one is pushed apart


def test_particles_of_score_distillation_fall_together_and_those_of_distribution_matching_do_not():
    world = Mixture.from_covariances([1.0], [[0.0, 0.0]], [C**2 * np.eye(2)])
    teacher, n = as_teacher(world, EDM), 64
    scenes = jax.random.normal(jax.random.key(1), (n, 2))

    def spread(method):
        made = dataclasses.replace(method(EDM), init={"student": lambda t, k, s: particles(lambda p: p, scenes)})
        stage = Stage(
            "s", made, 400, lambda _: lambda i: {"x": np.zeros((n, 2), np.float32)}, lambda k: optax.adam(0.05)
        )
        return float(jnp.std(run([stage], teacher, KEY)[-1].params))

    assert spread(SDS()) < 0.05
    assert spread(DMD(MultiSample(), weight=NoisePrediction())) == pytest.approx(C, rel=0.2)


def test_guidance_enters_the_real_score_alone():
    def apply(params, rest, x, t, cond, *, s, key):
        return params["w"] * x * jnp.where(cond >= 0, 1.0, 0.5)[:, None]

    teacher = Net({"w": jnp.asarray(0.5)}, {}, apply)
    method = DMD()(EDM)
    trainer = make_trainer(method, {name: optax.sgd(0.1) for name in method.losses})
    nets, state = prepare(trainer, teacher, guided(teacher, 3.0, np.int32(-1)), KEY)
    x, cond = jnp.ones((8, 1)), jnp.zeros(8, jnp.int32)
    np.testing.assert_allclose(nets["teacher"](x, 1.0, cond), 0.25 + 3 * 0.25)
    fake = nets["fake"].replace(params=state.params["fake"])
    np.testing.assert_allclose(fake(x, 1.0, cond), 0.5)


def test_several_steps_start_where_the_sampler_will_be():
    """With the exact student the renoised samples have the law of x_t, standard deviation √(c² + σ²)."""

    def exact(params, rest, x, t, cond, *, s, key):
        return x * jnp.sqrt((C**2 + s**2) / (C**2 + t**2))[:, None]

    dmd = DMD(steps=4)
    x, t = dmd.start(EDM, Net({}, {}, exact), (40_000, 1), None, KEY)
    times = renoising_times(EDM, 4)[:-1]
    assert set(np.unique(t)) == set(np.asarray(times))
    for each in times:
        of = np.asarray(x)[np.asarray(t) == float(each)]
        std = float(np.sqrt(float(each) ** 2 + (C**2 if each < EDM.t_max else 0)))
        assert len(of) == pytest.approx(10_000, rel=0.05) and of.std() == pytest.approx(std, rel=0.03)
    made = dmd(EDM)
    np.testing.assert_array_equal(made.sampling.times(4), renoising_times(EDM, 4))
    with pytest.raises(ValueError, match="taught 4 steps; given 2"):
        made.sampling.times(2)


def test_the_queue_holds_the_samples_of_the_last_steps_and_their_conditions():
    space = Space((1,), 3)
    method = DMD(MultiSample(queue=6), weight=NoisePrediction())(EDM)
    method = dataclasses.replace(method, init={"student": lambda t, k, s: generator()})
    trainer = make_trainer(method, {"student": optax.set_to_zero()})
    nets = trainer.start(gaussian(), KEY, space)
    state = trainer.init(nets, KEY, space)
    nets = {"teacher": gaussian(), **nets}
    drawn = []
    for step in range(2):
        cond = jnp.asarray([0, 1, 2, step], jnp.int32)
        k_start = jax.random.split(jax.random.fold_in(state.key, state.step), 4)[0]
        x, _ = DMD().start(EDM, generator(), (4, 1), None, k_start)
        drawn.append((np.asarray(C * x / EDM.sigma(EDM.t_max)), np.asarray(cond)))
        assert bool(state.memory["queue"]["filled"].any()) == (step > 0)
        state, _ = trainer.step(state, nets, {"x": jnp.zeros((4, 1)), "cond": cond}, ("student",))
    queue = jax.tree.map(np.asarray, state.memory["queue"])
    np.testing.assert_allclose(queue["x"], np.concatenate([drawn[1][0], drawn[0][0][:2]]), rtol=1e-6)
    np.testing.assert_array_equal(queue["cond"], [0, 1, 2, 1, 0, 1])
    assert queue["filled"].all()


def test_samples_of_other_conditions_do_not_count():
    cond = jnp.asarray([0, 0, 1])
    drawn = jnp.asarray([[0.0], [2.0], [9.0]])

    seen = MultiSample()(EDM, jnp.full((3, 1), 1.0), jnp.full(3, 1.0), Drawn(drawn, cond, {}, {}, KEY))
    np.testing.assert_allclose(seen, [[1.0], [1.0], [9.0]], rtol=1e-6)
    queue = {"x": jnp.asarray([[1.0], [3.0], [5.0]]), "filled": jnp.asarray([True, True, False])}
    drawn = Drawn(drawn, cond, {}, {"queue": {**queue, "cond": jnp.asarray([0, 1, 0])}}, KEY)
    seen = MultiSample(queue=3)(EDM, jnp.asarray([[1.0], [1.0], [6.0]]), jnp.full(3, 1.0), drawn)
    by_hand = (0 * np.exp(-0.5) + 2 * np.exp(-0.5) + 1) / (2 * np.exp(-0.5) + 1)  # 0, 2 and the queue's 1
    np.testing.assert_allclose(seen, [[by_hand], [by_hand], [6.0]], rtol=1e-6)  # 9 and the queue's 3


def test_a_low_rank_fake_score_trains_its_adapter_alone():
    teacher = Net({"w": jnp.eye(4)}, {}, lambda p, r, x, t, c, *, s, key: x @ p["w"])
    fake = DMD(Auxiliary(lora=LoRA(rank=1, layers=("w",))))(EDM).init["fake"](teacher, KEY, UNKNOWN)
    assert set(fake.params) == {"w.down", "w.up"}
    np.testing.assert_array_equal(fake(jnp.ones((2, 4)), 1.0), teacher(jnp.ones((2, 4)), 1.0))


def test_backward_simulation_is_not_differentiated():
    plain, closed = generator(), untraceable(generator())

    def apply(params, rest, x, t, cond, *, s, key):  # the jumps on the way have no key
        return (closed if key is None else plain).apply(params, rest, x, t, cond, s=s, key=key)

    def loss(params):
        nets = {"student": Net(params, {}, apply), "teacher": gaussian(), "fake": gaussian(std=0.3)}
        return DMD(steps=3)(EDM).losses["student"](nets, {"x": X}, PROGRESS, KEY)[0]

    assert all(np.isfinite(g) and g != 0 for g in jax.tree.leaves(jax.grad(loss)(plain.params)))


def test_conditions_that_are_no_labels_are_met_with_words():
    nets = {"student": generator(), "teacher": gaussian(), "fake": gaussian()}
    for cond, kind in ((Scaled(jnp.zeros(64, int), jnp.ones(64)), "Scaled"), (jnp.ones((64, 3)), r"float32\[64, 3\]")):
        for fake, name in ((Auxiliary(), "fake"), (MultiSample(), "student"), (MultiSample(queue=4), "student")):
            batch = {"x": X, "cond": cond, "queue": {"x": X[:4], "filled": jnp.ones(4, bool)}}
            with pytest.raises(ValueError, match=f"have one label, .* these conditions are {kind}"):
                DMD(fake)(EDM).losses[name](nets, batch, PROGRESS, KEY)
    batch = {"x": X, "cond": jnp.ones((64, 3))}
    assert np.isfinite(DMD(Auxiliary(stable=False))(EDM).losses["fake"](nets, batch, PROGRESS, KEY)[0])


@pytest.mark.parametrize(
    ("config", "times"),
    [
        (GAN(Adversary(Plain(8, 1))), 1), (Together(KD(steps=(1,)), GAN(Adversary(Plain(8, 1)))), 2), (DMD(), 1),
        (Together(KD(steps=(1,)), DMD()), 2), (Together(DMD(), GAN(Adversary(Plain(8, 1)))), 2),
        (Guided(GAN(Adversary(Plain(8, 1)))), 1),
    ],
)  # fmt: skip
def test_a_methods_samples_are_drawn_once_in_a_step_also_beside_and_within_others(config, times):
    calls, plain = [], generator()

    def apply(*args, **options):
        calls.append(1)
        return plain.apply(*args, **options)

    guided = isinstance(config, Guided)
    method = config(EDM)
    method = dataclasses.replace(method, init={**method.init, "student": lambda t, k, s: Net(plain.params, {}, apply)})
    trainer = make_trainer(method, dict.fromkeys(method.losses, optax.sgd(0.1)))
    nets, state = prepare(trainer, gaussian(), gaussian(), KEY, Space((1,), 3 if guided else 0))
    batch = {"x": X, "noise": X} | ({"cond": jnp.zeros(64, int)} if guided else {})
    calls.clear()
    trainer.step(state, nets, batch, method.turn(0))
    assert len(calls) == times


def test_another_methods_ratios_rates_and_memories_come_with_its_networks():
    both = Together(DMD(every=3, rate=0.5), GAN(Adversary(rate=0.7), every=2, rate=0.1))(EDM)
    assert dict(both.every) == {"student": 3}
    assert dict(both.rate) == {"student": 0.5, "fake": 1.0, "discriminator": 0.7}
    queued = Together(KD(steps=(1,)), DMD(MultiSample(queue=5)))(EDM)
    queued = dataclasses.replace(queued, init={"student": lambda t, k, s: generator()})
    trainer = make_trainer(queued, {"student": optax.set_to_zero()})
    nets, state = prepare(trainer, gaussian(), gaussian(), KEY, Space((1,)))
    key = jax.random.split(jax.random.fold_in(state.key, state.step))[1]  # that of the other's losses
    x, _ = DMD().start(EDM, generator(), (4, 1), None, jax.random.split(key, 4)[0])
    state, _ = trainer.step(state, nets, {"x": jnp.zeros((4, 1)), "noise": jnp.zeros((4, 1))}, ("student",))
    np.testing.assert_allclose(state.memory["queue"]["x"][:4], C * x / EDM.sigma(EDM.t_max), rtol=1e-6)


def test_a_queue_is_seen_whole_by_every_part_of_an_accumulated_step():
    batch = {"x": jnp.zeros((4, 1))}
    losses = []
    for accumulate in (1, 2):
        method = DMD(MultiSample(queue=6), weight=NoisePrediction())(EDM)
        method = dataclasses.replace(method, init={"student": lambda t, k, s: generator()})
        trainer = make_trainer(method, {"student": optax.set_to_zero()}, accumulate=accumulate)
        nets, state = prepare(trainer, gaussian(), gaussian(), KEY, Space((1,)))
        memory = {"x": jnp.arange(6.0)[:, None], "filled": jnp.ones(6, bool)}
        state = dataclasses.replace(state, memory={"queue": memory})
        keys = [jax.random.fold_in(state.key, state.step)]
        keys = keys if accumulate == 1 else [jax.random.fold_in(keys[0], i) for i in range(2)]
        part = {"x": batch["x"][: 4 // accumulate], "queue": memory}
        nets = {**nets, "student": generator()}
        expected = np.mean([method.losses["student"](nets, part, PROGRESS, k)[0] for k in keys])
        after, metrics = trainer.step(state, nets, batch, ("student",))
        np.testing.assert_allclose(metrics["student/loss"], expected, rtol=1e-5)
        assert after.memory["queue"]["x"].shape == (6, 1)
        losses.append(expected)
    assert losses[0] != losses[1]


def test_methods_add_up_with_weights():
    main, other = DMD(every=3, rate=0.5), KD(steps=(1,), pairs=10)
    both = Together(main, other, 0.25)(EDM)
    assert both.turn(1) == ("fake",) and both.rate["student"] == 0.5 and both.pairs == other(EDM).pairs
    assert both.needs == {"x", "noise"} and set(both.losses) == {"student", "fake"} and both.rate["fake"] == 1
    assert DMD(fake_rate=0.2)(EDM).rate == {"student": 0.3, "fake": 0.2}
    nets = {"student": generator(), "teacher": gaussian(), "fake": gaussian(std=0.3)}
    batch = {"x": jnp.ones((8, 1)), "noise": jnp.ones((8, 1))}
    value, metrics = both.losses["student"](nets, batch, PROGRESS, KEY)
    of_main, of_other = jax.random.split(KEY)
    a = main(EDM).losses["student"](nets, batch, PROGRESS, of_main)[0]
    b = other(EDM).losses["student"](nets, batch, PROGRESS, of_other)[0]
    np.testing.assert_allclose([value, metrics["main"], metrics["other"]], [a + 0.25 * b, a, b], rtol=1e-6)
    alone = main(EDM).losses["fake"](nets, batch, PROGRESS, of_main)[0]
    np.testing.assert_array_equal(both.losses["fake"](nets, batch, PROGRESS, KEY)[0], alone)


def test_each_of_three_methods_has_random_numbers_and_samples_of_its_own():
    seen = {}

    def told(name):
        def loss(nets, batch, progress, key):
            seen.setdefault(name, []).append(once(nets, "student", key, lambda: jax.random.normal(key)))
            return jnp.zeros(()), {}

        return lambda process: dataclasses.replace(GAN()(process), losses={"student": loss, "discriminator": loss})

    three = Together(Together(told("a"), told("b")), told("c"))(EDM)
    made = {}
    for name in ("student", "discriminator"):
        three.losses[name](Nets({}, name, made), {}, PROGRESS, KEY)
    for numbers in seen.values():
        assert len(set(map(float, numbers))) == 1  # of the same samples for both networks
    assert len({float(numbers[0]) for numbers in seen.values()}) == 3


def test_the_other_method_comes_to_the_process_of_the_main_one_and_into_its_last_round():
    judged = Together(RectifiedFlow(), GAN(steps=1))(EDM)
    assert judged.process == flow() == RectifiedFlow()(EDM).process
    assert set(judged.losses) == {"student", "discriminator"}
    *before, last = Together(Progressive(), GAN(steps=1))(EDM)
    assert set(last.method.losses) == {"student", "discriminator"}
    assert len(before) > 1 and all(set(r.method.losses) == {"student"} for r in before)


def test_methods_that_cannot_be_added_say_why():

    for other, message in (
        (Progressive(), "several rounds"),
        (RectifiedFlow(), "different processes"),
    ):
        with pytest.raises(ValueError, match=message):
            Together(DMD(), other)(EDM)
    with pytest.raises(ValueError, match="both methods bring teacher pairs"):
        Together(KD(pairs=10), KD(pairs=20))(EDM)


def test_a_student_alone_is_updated_in_one_step_of_so_many_too():
    method = DMD(MultiSample(), every=3)(EDM)
    assert [method.turn(i) for i in range(4)] == [("student",), (), (), ("student",)]
    method = dataclasses.replace(method, init={"student": lambda t, k, s: generator()})
    trainer = make_trainer(method, {"student": optax.sgd(0.1)})
    nets, state = prepare(trainer, gaussian(), gaussian(), KEY, Space((1,)))
    before = float(state.params["student"]["mean"])
    state, _ = trainer.step(state, nets, {"x": X}, ())
    assert float(state.params["student"]["mean"]) == before
    state, _ = trainer.step(state, nets, {"x": X}, ("student",))
    assert float(state.params["student"]["mean"]) != before


@pytest.mark.parametrize(("process", "t"), [(flow(), 0.99), (flow(), 0.01), (vp(), 0.003)])
def test_renders_of_half_precision_have_the_gradient_of_their_numbers(process, t):
    x = (0.5 * jax.random.normal(KEY, (64, 1))).astype(jnp.bfloat16)
    noise = jax.random.normal(jax.random.key(1), x.shape)
    got = sds_gradient(gaussian(process), process, x, t, noise)
    expected = sds_gradient(gaussian(process), process, x.astype(jnp.float32), t, noise)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
