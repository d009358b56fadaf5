"""The experiments on distribution matching and score distillation: closed forms, orderings, and their measures."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "questions"

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def questions():
    """Load an experiment by name, as running it would."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


def test_low_noise_does_not_tell_a_fake_of_the_other_mode(questions):
    common, module = questions("common"), questions("q01_scores_at_large_t")
    pulls = np.asarray([module.pull(sigma) for sigma in module.SIGMAS])
    assert np.all(np.diff(pulls) < 0) and abs(pulls[2]) < 1e-4 and pulls[4] < -0.5
    assert module.pull(1e3) == pytest.approx(-3, rel=1e-3)  # far out only the means differ, by 3
    # σ² E[s_fake − s_real] by the library's scores.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    two, left = (common.isotropic([1 / len(m)] * len(m), m, [0.09] * len(m)) for m in ([[-3.0], [3.0]], [[-3.0]]))
    for sigma in (1.0, 3.0):
        x = jnp.asarray(-3 + np.hypot(0.3, sigma) * nodes, jnp.float32)[:, None]
        scores = [world.score(common.edm(), x, sigma)[:, 0] for world in (left, two)]
        by_library = sigma**2 * weights @ np.asarray(scores[0] - scores[1]) / weights.sum()
        assert module.pull(sigma) == pytest.approx(by_library, abs=2e-4)


def test_a_gaussian_covers_near_modes_and_gives_one_of_two_far_ones_up(questions):
    module = questions("q02_mode_collapse")
    m, s, sigma = 0.3, 0.7, 0.4
    own, other = s**2 + sigma**2, 0.25 + sigma**2
    exact = 0.5 * (own / other - 1 + m**2 / other - np.log(own / other))  # between two Gaussians
    assert float(module.divergence(m, np.log(s), 0.0, sigma)) == pytest.approx(exact, rel=1e-4)

    low, _, squared = module.WEIGHTS.values()
    run = jax.jit(lambda a, w, key: module.fitted(a, w, key, steps=600))
    near, far = (run(a, low, jax.random.key(0)) for a in (0.5, 3.0))
    assert near[0] < 0.1 and near[1] > 0.6
    assert far[0] == pytest.approx(3, abs=0.02) and far[1] == pytest.approx(0.5, abs=0.02)
    covering = run(3.0, squared, jax.random.key(0))
    assert covering[0] < 0.1 and covering[1] > 2

    times = module.Emphasis()(module.edm(0.02, 10.0), jax.random.key(0), 4000)
    assert float(jnp.mean(times > 1)) == pytest.approx(0.75, abs=0.03)
    assert float(times.min()) >= 0.02 and float(times.max()) <= 10


def test_the_gradients_by_the_scale_differ_by_the_entropys(questions):
    module = questions("q04_sds_against_dmd")
    for process, times in module.POINTS.values():
        t = times[1]
        alpha, sigma = process.alpha(t), process.sigma(t)
        entropy = jax.grad(lambda s, a=alpha, b=sigma: 0.5 * jnp.log(a**2 * s**2 + b**2))(module.SCALE)
        assert module.entropy_force(process, t) == pytest.approx(float(entropy), rel=1e-5)
        found = module.scale_gradients(process, t, jax.random.key(0), 50_000)
        assert found["difference"] == pytest.approx(float(entropy), rel=0.02)
        assert found["SDS"] > found["DMD"]


def test_the_control_variate_pays_where_noise_is_broader_than_the_data(questions):
    module = questions("q05_control_variate")
    gaussian = questions("common").isotropic([1.0], [[0.0]], [0.09])
    for sigma in module.SIGMAS:
        found = module.moments(gaussian, (0.0,), sigma, jax.random.key(0), 2000)
        assert found["with"] / found["without"] == pytest.approx((0.3 / sigma) ** 4, rel=1e-2)
        assert found["apart"] < 4
    on_a_mode = [
        module.moments(questions("common").gmm2d(), (2.0, 0.0), s, jax.random.key(1), 5000) for s in module.SIGMAS
    ]
    ratios = [found["with"] / found["without"] for found in on_a_mode]
    assert np.all(np.diff(ratios) < 0) and ratios[1] > 1 > ratios[2]
    x_t, t = jnp.ones((3, 2)), jnp.full(3, 0.5)
    vp = questions("q04_sds_against_dmd").vp()
    np.testing.assert_allclose(vp.score(module.Without()(vp, x_t, t, None), x_t, t), 0, atol=1e-5)


def test_more_samples_tell_the_score_better_unless_the_noise_is_too_low(questions):
    module = questions("q07_samples_for_a_score")
    key = jax.random.key(0)
    for d, sigma, gains in ((2, 1.0, True), (64, 0.3, False)):
        mixture = jax.tree.map(jnp.asarray, module.gmm8(d))
        pool = mixture.sample(key, 512)
        one, many = (float(module.errors(mixture, pool, n, 100, sigma, key)[0]) for n in (1, 64))
        assert many < 0.2 * one if gains else many > 0.8 * one
    assert module.enough({1: 1.0, 16: 0.3, 64: 0.09}) == "64" and module.enough({1: 1.0, 16: 0.3}) == "> 16"

    fakes = questions("ddistill.methods.fake_scores")
    x = jax.random.normal(key, (8, 2))
    t, drawn = jnp.full(8, 0.7), fakes.Drawn(x, None, {}, {}, key)
    x_t = x + 0.7 * jax.random.normal(jax.random.key(1), x.shape)
    process = module.edm()
    np.testing.assert_allclose(module.Some(n=1)(process, x_t, t, drawn), x, rtol=1e-6)
    everything = fakes.MultiSample()(process, x_t, t, drawn)
    np.testing.assert_allclose(module.Some(n=8)(process, x_t, t, drawn), everything, rtol=1e-5)


def test_networks_below_a_noise_level_are_asked_and_taught_there_alone(questions):
    module = questions("q03_auxiliary_avoided")
    times = np.asarray(module.Below(0.5)(module.edm(), jax.random.key(0), 4000))
    assert times.max() <= 0.5 * (1 + 1e-4) and np.median(times) < 0.1
    for name, (fake, _) in module.FAKES.items():
        if "above" in name:
            assert fake.below.times.bound == fake.at


def test_samples_of_conditions_are_measured(questions):
    module = questions("prompts")
    world, cond = module.world(), jnp.arange(2000) % module.CLASSES
    true = module.measure(np.asarray(world.sample(jax.random.key(0), 2000, cond)), np.asarray(cond))
    # 1 − exp(−9/2) of a Gaussian in the plane is within three standard deviations.
    assert true["precision"] == pytest.approx(1 - np.exp(-4.5), abs=0.01) and true["recall"] == 1
    assert true["diversity"] == pytest.approx(1, abs=0.02) and true["size"] == pytest.approx(1, abs=0.02)
    one_each = np.asarray(world.means)[module.MODES * np.asarray(cond)]
    fallen = module.measure(one_each, np.asarray(cond))
    assert fallen["precision"] == 1 and fallen["recall"] == 1 / module.MODES and fallen["diversity"] < 1e-6
    assert module.measure(one_each, (np.asarray(cond) + 4) % 8)["precision"] == 0


def test_particles_are_summed_up(questions):
    module = questions("particle")
    true = np.asarray(module.uneven().sample(jax.random.key(0), 20_000))
    found = module.summary(true, module.uneven())
    assert found["right"] == pytest.approx(0.3, abs=0.01) and found["width"] == pytest.approx(0.3, rel=0.03)
    assert found["W1"] < 0.1
    # all of the left mode: .3 of the mass has 6 to go
    assert module.summary(true[true < 0][:, None], module.uneven())["W1"] == pytest.approx(1.8, abs=0.02)


def test_particles_of_score_distillation_lose_their_width(questions):
    module, fakes = questions("particle"), questions("ddistill.methods.fake_scores")
    widths = {}
    for name, fake in (("point masses", fakes.Delta()), ("samples", fakes.MultiSample())):
        run = module.Particles(module.uneven(), module.matching(fake), 0.02, 0.3, steps=150)
        end = run(module.collapsed(jax.random.key(0)), jax.random.key(0))
        widths[name] = module.summary(end, module.uneven())["width"]
    assert widths["point masses"] < 0.7 * widths["samples"] and widths["samples"] == pytest.approx(0.3, rel=0.1)


def test_a_training_updates_each_network_in_its_turn(questions):
    common, dmd = questions("common"), questions("ddistill.methods.dmd")
    mixture, process = common.gmm2d().standardised(0.5), common.edm()
    case = common.Case(mixture, process, common.as_teacher(mixture, process), None, None, None)
    training = common.Training(dmd.DMD(every=2)(process), common.data(case, 8), 3, every=1)
    start, seen = common.network(case, 0, width=8, blocks=1), []
    training(start, case.teacher, jax.random.key(0), probe=lambda net, step: seen.append(net.params["outward.bias"]))
    moved = np.abs(np.diff(np.asarray(seen), axis=0)).max(axis=1)
    assert moved[1] == 0 and moved[2] > 0


def test_pictures_have_bars_over_seeds(questions, tmp_path):
    module = questions("drawing")
    values = [np.asarray([1.0, 2.0, 3.0]), 0.5]
    panels = (
        module.Panel("numbers", "x", "y", (1.0, 10.0), {"a": values, "b": values}, log="xy", levels={"true": 1.0}),
        module.Panel("names", "", "", ("first", "second one"), {"a": values}),
    )
    module.picture(tmp_path / "new" / "out.png", *panels)
    written = (tmp_path / "new" / "out.png").read_bytes()
    assert written.startswith(b"\x89PNG") and len(written) < 30_000
    module.picture(None, *panels)
