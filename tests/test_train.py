"""The train step and its loop: gradients by hand, turns, averages, sharding, accumulation, resuming, failing steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddistill import sharding
from ddistill.checkpoint import CheckpointError, Checkpoints
from ddistill.log import Silent
from ddistill.methods import ADD, DMD, GAN, SDS, ConsistencyTraining, RectifiedFlow
from ddistill.methods.base import Memory, Method, Sampling, Space, from_teacher, rounds
from ddistill.net import Net
from ddistill.process import edm
from ddistill.stages import DivergedError, Stage, run
from ddistill.train import make_trainer

SAMPLING = Sampling(lambda steps: [1.0, 0.0])


def linear(params, rest, x, t, cond, *, s, key):
    return params["w"] * x


def net(w):
    return Net({"w": jnp.asarray(w, jnp.float32)}, {}, linear)


def regression(nets, batch, progress, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return jnp.mean((nets["student"](batch["x"], 1.0) - nets["teacher"](batch["x"], 1.0) - noise) ** 2), {}


def source(step):
    return {"x": np.random.default_rng(step).normal(size=(16, 2)).astype(np.float32)}


def method(loss=regression, **kwargs):
    start = {"student": lambda teacher, key, space: net([0.0, 1.0])}
    return Method(losses={"student": loss}, init=start, sampling=SAMPLING, **kwargs)


def stage(m=None, steps=6, **kwargs):
    return Stage("s", m or method(), steps, lambda _: source, lambda steps: optax.sgd(0.1), **kwargs)


def train(s, **kwargs):
    return run([s], net([2.0, 3.0]), jax.random.key(0), **kwargs)[0].params["w"]


def start(m, optimizers, mesh=None):
    trainer = make_trainer(m, optimizers, mesh=mesh)
    teacher = net([2.0, 3.0])
    nets = trainer.start(teacher, jax.random.key(1))
    return trainer, {"teacher": teacher, **nets}, trainer.init(nets, jax.random.key(2))


def test_one_step_is_the_gradient_step_worked_by_hand():
    trainer, nets, state = start(method(), {"student": optax.sgd(0.1)})
    batch = source(0)
    x, noise = batch["x"], 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(2), 0), (16, 2))
    residual = np.array([0.0, 1.0]) * x - np.array([2.0, 3.0]) * x - np.asarray(noise)
    expected = np.array([0.0, 1.0]) - 0.1 * np.sum(2 * residual * x, axis=0) / x.size
    state, metrics = trainer.step(state, nets, batch, ("student",))
    np.testing.assert_allclose(state.params["student"]["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["student/loss"], np.mean(residual**2), rtol=1e-5)
    assert int(state.step) == 1


def test_each_loss_moves_the_network_it_is_named_after_and_no_other():
    m = Method(
        losses={
            "student": lambda n, b, i, k: (jnp.sum((n["student"].params["w"] - n["fake"].params["w"]) ** 2), {}),
            "fake": lambda n, b, i, k: (jnp.sum(n["fake"].params["w"] * n["student"].params["w"]), {}),
        },
        init={"student": lambda t, k, space: net([1.0]), "fake": lambda t, k, space: net([4.0])},
        every={"student": 2},
        ema={"slow": ("student", 0.75)},
        sampling=SAMPLING,
    )
    assert [m.turn(i) for i in range(3)] == [("fake", "student"), ("fake",), ("fake", "student")]
    trainer, nets, state = start(m, {"student": optax.sgd(0.1), "fake": optax.sgd(0.5)})
    state, _ = trainer.step(state, nets, source(0), m.turn(0))
    # Both gradients are taken at the old values: 1 − .1·2·(1 − 4) and 4 − .5·1.
    np.testing.assert_allclose([state.params["student"]["w"][0], state.params["fake"]["w"][0]], [1.6, 3.5])
    np.testing.assert_allclose(state.ema["slow"]["w"][0], 0.75 * 1 + 0.25 * 1.6)
    before = {k: np.asarray(v["w"]) for k, v in {**state.params, **state.ema}.items()}
    state, metrics = trainer.step(state, nets, source(1), m.turn(1))
    np.testing.assert_array_equal(state.params["student"]["w"], before["student"])
    np.testing.assert_array_equal(state.ema["slow"]["w"], before["slow"])
    np.testing.assert_allclose(state.params["fake"]["w"][0], 3.5 - 0.5 * 1.6)
    assert "student/loss" not in metrics


def test_rates_multiply_and_averages_may_slow_down():
    m = dataclasses.replace(method(), rate={"student": 0.5}, ema={"slow": ("student", lambda progress: progress.share)})
    trainer, nets, state = start(m, {"student": optax.sgd(0.1)})
    full, _, other = start(method(), {"student": optax.sgd(0.1)})
    before = np.asarray(state.params["student"]["w"])
    other, _ = full.step(other, nets, source(0), ("student",))
    for step in range(2):
        old = np.asarray(state.ema["slow"]["w"])
        state, _ = trainer.step(state, nets, source(0), ("student",), 4)
        now = np.asarray(state.params["student"]["w"])
        if step == 0:
            np.testing.assert_allclose(
                now - before, 0.5 * (np.asarray(other.params["student"]["w"]) - before), rtol=1e-5
            )
        np.testing.assert_allclose(state.ema["slow"]["w"], step / 4 * old + (1 - step / 4) * now, rtol=1e-6)


def test_what_training_remembers_is_in_its_batches_and_resumes(tmp_path):
    def loss(nets, batch, progress, key):
        return jnp.sum(nets["student"].params["w"]) * batch["sum"]["x"], {"seen": batch["sum"]["x"]}

    memory = Memory(
        init=lambda nets, space: {"x": jnp.asarray(float(space.num_classes))},
        update=lambda old, nets, batch, progress, key: {"x": old["x"] + batch["x"].sum()},
    )
    m = dataclasses.replace(method(loss), memory={"sum": memory})
    plain = stage(m, 6, space=Space((2,), 3))
    log = Silent()
    run([plain], net([2.0, 3.0]), jax.random.key(0), log=log, log_every=1)
    total = 3 + np.cumsum([0.0, *(source(i)["x"].sum() for i in range(5))])
    np.testing.assert_allclose([row["student/seen"] for row in log.rows], total, rtol=1e-5)
    short = dataclasses.replace(plain, source=lambda _: lambda i: source(i) if i < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run([short], net([2.0, 3.0]), jax.random.key(0), workdir=tmp_path, checkpoint_every=2)
    log = Silent()
    run([plain], net([2.0, 3.0]), jax.random.key(0), workdir=tmp_path, log=log, log_every=1)
    np.testing.assert_allclose([row["student/seen"] for row in log.rows], total[-len(log.rows) :], rtol=1e-5)
    assert len(log.rows) == 2


def test_a_network_out_of_turn_is_not_traced():
    traced = []

    def loss(name):
        def f(nets, batch, progress, key):
            traced.append(name)
            return jnp.sum(nets[name].params["w"] ** 2), {}

        return f

    m = Method(
        losses={"student": loss("student"), "fake": loss("fake")},
        init={"student": from_teacher, "fake": from_teacher},
        every={"student": 5},
        sampling=SAMPLING,
    )
    trainer, nets, state = start(m, {"student": optax.sgd(0.1), "fake": optax.sgd(0.1)})
    for i in range(1, 12):
        state, _ = trainer.step(state, nets, source(i), m.turn(i))
    # Each distinct turn is traced, and so compiled, once: ("fake",) and ("fake", "student").
    assert traced == ["fake", "student", "fake"]


def test_eight_devices_give_the_losses_of_one():
    logs = [Silent(), Silent()]
    auto = (jax.sharding.AxisType.Auto,) * 2
    meshes = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1], axis_types=auto), sharding.make_mesh(2)
    results = [train(stage(), mesh=m, log=log, log_every=1) for m, log in zip(meshes, logs, strict=True)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    losses = [[row["student/loss"] for row in log.rows] for log in logs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    def loss(nets, batch, progress, key):
        del key  # a part draws its own noise, so that only losses without any agree exactly
        return jnp.mean((nets["student"](batch["x"], 1.0) - nets["teacher"](batch["x"], 1.0)) ** 2), {}

    whole, parts = (train(stage(method(loss), accumulate=k)) for k in (1, 4))
    np.testing.assert_allclose(whole, parts, rtol=1e-6)
    with pytest.raises(ValueError, match="accumulate = 3 does not divide"):
        train(stage(method(loss), accumulate=3))


def test_a_step_that_is_not_finite_changes_nothing_but_its_count():
    def loss(nets, batch, progress, key):
        value, info = regression(nets, batch, progress, key)
        return jnp.where(progress.step == 2, jnp.nan, 1.0) * value, info

    log = Silent()
    count = Memory(lambda nets, space: jnp.zeros(1), lambda value, nets, batch, progress, key: value + 1)
    m = method(loss, ema={"ema": ("student", 0.5)}, memory={"count": count})
    trainer, nets, state = start(m, {"student": optax.adam(0.1)})
    states = []
    for i in range(4):
        state, metrics = trainer.step(state, nets, source(i), ("student",))
        kept = state.params["student"]["w"], state.ema["ema"]["w"], state.memory["count"]
        states.append([np.asarray(a) for a in kept])
        log.metrics(i, metrics)
    for now, before, later in zip(states[2], states[1], states[3], strict=True):
        np.testing.assert_array_equal(now, before)
        assert np.all(later != now)
    assert np.any(states[1][0] != states[1][1])  # the average lags, and would move without the gradient
    assert [row["skipped"] for row in log.rows] == [0, 0, 1, 1]


def test_a_run_that_stays_non_finite_is_stopped_with_words():
    def loss(nets, batch, progress, key):
        return jnp.nan * jnp.sum(nets["student"].params["w"]), {}

    with pytest.raises(DivergedError, match="NaN or infinite.*Lower the learning rate"):
        train(stage(method(loss), steps=200), log_every=10)


def test_an_interrupted_run_resumed_equals_an_uninterrupted_one(tmp_path):
    m = method(ema={"ema": ("student", 0.9)}, result="ema")

    class Stop(Exception):
        pass

    def failing(step):
        if step == 4:
            raise Stop
        return source(step)

    uninterrupted = train(stage(m))
    broken = dataclasses.replace(stage(m), source=lambda _: failing)
    with pytest.raises(Stop):
        train(broken, workdir=tmp_path, checkpoint_every=2)
    assert {p.name for p in (tmp_path / "checkpoints" / "s").iterdir() if p.name.isdigit()} == {"2", "4"}
    np.testing.assert_array_equal(train(stage(m), workdir=tmp_path), uninterrupted)
    # A finished stage is loaded, and its source never asked.
    finished = dataclasses.replace(stage(m), source=lambda _: 1 / 0)
    np.testing.assert_array_equal(train(finished, workdir=tmp_path), uninterrupted)


def test_checkpoints_keep_names_keys_and_dtypes_and_refuse_what_does_not_fit(tmp_path):
    tree = {
        "layers": {str(i): jnp.full((2,), i, jnp.bfloat16) for i in range(12)},
        "key": jax.random.key(3),
        "n": jnp.asarray(7),
    }
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore(tree)
        checkpoints.save(5, tree)
    with Checkpoints(tmp_path / "c") as checkpoints:
        empty = jax.tree.map(jnp.zeros_like, tree["layers"])
        blank = {"layers": empty, "key": jax.random.key(0), "n": jnp.asarray(0)}
        back = checkpoints.restore(blank)
        assert [int(back["layers"][str(i)][0]) for i in range(12)] == list(range(12))
        assert back["layers"]["0"].dtype == jnp.bfloat16 and int(back["n"]) == 7
        np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
        other = {**tree, "layers": {**tree["layers"], "3": jnp.zeros(4)}}
        with pytest.raises(CheckpointError, match=r"layers.3 has shape \(2,\), \(4,\) is expected"):
            checkpoints.restore(other)


@pytest.mark.parametrize("config", [ADD, DMD, GAN, SDS, ConsistencyTraining, RectifiedFlow])
def test_a_methods_rate_is_its_students(config):
    (only,) = rounds(config(rate=0.25)(edm()))
    assert only.method.rate["student"] == 0.25


def test_methods_and_batches_that_do_not_fit_are_refused_with_words():
    with pytest.raises(ValueError, match="losses name .* but init names"):
        Method(losses={"a": regression}, init={}, sampling=SAMPLING)
    with pytest.raises(ValueError, match="numbers > 0"):
        method(rate={"student": 0.0})
    with pytest.raises(ValueError, match="must average one of"):
        method(ema={"ema": ("nobody", 0.9)})
    with pytest.raises(ValueError, match="numbers >= 1"):
        method(every={"student": 0})
    with pytest.raises(ValueError, match="optimizers for"):
        make_trainer(method(), {})
    needy = method(needs=frozenset({"x", "noise"}))
    with pytest.raises(ValueError, match=r"needs \['noise'\] in its batches, which hold \['x'\]"):
        train(stage(needy))
