"""Invertible consistency where everything is linear: data N(0, c²), exact map Φ_{t→s}(x) = x √(V_s/V_t)."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from ddistill.cli import commands, main
from ddistill.evaluate.inversion import (
    edit,
    edit_metrics,
    encoding_times,
    exact_inverter,
    inversion_metrics,
    student_inverter,
    teacher_inverter,
)
from ddistill.integrators import Solution, euler, heun
from ddistill.losses.distances import L2
from ddistill.methods import Consistency
from ddistill.methods.base import Progress
from ddistill.methods.intervals import Edges
from ddistill.methods.invertible import Invertible
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net, two_way
from ddistill.process import edm, flow, trig, vp, vp_cosine
from ddistill.runs import open_run
from ddistill.sample import sample
from ddistill.train import make_trainer

C = 0.5
PROCESSES = pytest.mark.parametrize(
    "process", [edm(), flow(), trig(0.2), vp_cosine()], ids=lambda p: type(p.schedule).__name__
)
LINEAR = Invertible(distance=L2())


def variance(process, t):
    return process.alpha(t) ** 2 * C**2 + process.sigma(t) ** 2


def jumping(process, factor, params=None):
    """The student whose jump is x -> factor(params, t, s) x, and x where it stays; factor answers [B]."""

    def toward(params, rest, x, t, cond, *, s, key):
        return process.destination(x, t, factor(params, t, s)[:, None] * x, s)

    return Net({} if params is None else params, {}, toward)


def exact(process, power=1.0):
    return jumping(process, lambda p, t, s: (variance(process, s) / variance(process, t)) ** (power / 2))


def exact_solver(power):
    def solve(denoise, process, nodes, x):
        return Solution(x * ((variance(process, nodes[-1]) / variance(process, nodes[0])) ** (power / 2))[:, None], 1)

    return solve


@functools.cache
def terms(config, process, follow_teacher=False):
    """(forward, reverse, teacher) -> {"reverse": {"consistency", "preserve"}, "forward": …}, maps to these powers."""
    x = C * jax.random.normal(jax.random.key(0), (512, 2))
    exact_teacher = as_teacher(Mixture.from_covariances([1.0], [[0, 0]], [C**2 * np.eye(2)]), process)

    @jax.jit
    def compute(forward, reverse, teacher):
        made = config if follow_teacher else dataclasses.replace(config, solver=exact_solver(teacher))
        nets = {"teacher": exact_teacher, "forward": exact(process, forward), "reverse": exact(process, reverse)}
        losses = made(process).losses.items()
        return {name: loss(nets, {"x": x}, Progress(0), jax.random.key(1))[1] for name, loss in losses}

    return compute


@PROCESSES
def test_exact_maps_have_none_of_the_four_losses(process):
    compute = terms(dataclasses.replace(LINEAR, phases=(1, 2, 4)), process)
    right = compute(1.0, 1.0, 1.0)
    assert all(value < 1e-6 for way in right.values() for value in way.values()), right
    # A teacher that is followed the wrong way, up where down was asked for, is inconsistent with the same students.
    wrong = compute(1.0, 1.0, -1.0)
    assert all(way["consistency"] > 1e-3 for way in wrong.values()), wrong
    # A student that goes too far is seen by its own consistency, and by both preservations.
    far = compute(1.5, 1.0, 1.0)
    assert far["reverse"]["consistency"] < 1e-6
    assert far["forward"]["consistency"] > 1e-4 and all(far[way]["preserve"] > 1e-4 for way in far), far
    far = compute(1.0, 1.5, 1.0)
    assert far["forward"]["consistency"] < 1e-6
    assert far["reverse"]["consistency"] > 1e-4 and all(far[way]["preserve"] > 1e-4 for way in far), far


def test_the_teachers_solver_is_followed_both_ways():
    # Heun's own error is left, of second order in the length of the intervals; Euler's is of first.
    def error(solver):
        found = terms(dataclasses.replace(LINEAR, intervals=48, solver=solver), edm(), True)(1.0, 1.0, 1.0)
        return np.asarray([float(found[way]["consistency"]) ** 0.5 for way in ("reverse", "forward")])

    by_heun, by_euler = error(heun), error(euler)
    assert np.all(by_heun < 0.02) and np.all(by_heun < by_euler / 8), (by_heun, by_euler)


@pytest.mark.parametrize("process", [edm(), flow()], ids=lambda p: type(p.schedule).__name__)
def test_preservation_of_linear_students_is_worked_by_hand(process):
    # One phase, reverse x -> b x and forward x -> a x. At either end E (a b z − z)²/scale² = (a b − 1)².
    config = dataclasses.replace(LINEAR, phases=(1,), solver=exact_solver(1.0))
    x = C * jax.random.normal(jax.random.key(0), (65_536, 2))

    def preserve(way, a, b):
        nets = {
            "teacher": exact(process),
            "reverse": jumping(process, lambda p, t, s: p * jnp.ones_like(t), b),
            "forward": jumping(process, lambda p, t, s: p * jnp.ones_like(t), a),
        }
        loss, parts = config(process).losses[way](nets, {"x": x}, Progress(0), jax.random.key(1))
        total.append((way, loss, parts["consistency"] + config.preserve * parts["preserve"]))
        return parts["preserve"]

    total = []
    for way in ("reverse", "forward"):
        preserve(way, 1.5, 0.8)
    for _, loss, expected in total:
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    a, b = jnp.asarray(1.5), jnp.asarray(0.8)
    for way, slot, slope in (("reverse", 2, a), ("forward", 1, b)):
        by_hand = jax.jit(jax.value_and_grad(functools.partial(preserve, way), argnums=slot - 1))
        value, gradient = by_hand(a, b)
        np.testing.assert_allclose(value, (a * b - 1) ** 2, rtol=0.02)
        np.testing.assert_allclose(gradient, 2 * (a * b - 1) * slope, rtol=0.02)
        assert by_hand(a, 1 / a)[0] < 1e-5


def test_each_student_is_moved_by_its_own_losses_alone(one_device):
    # Only the forward student is wrong. The reverse one is exact, but preservation asks it to go along.
    process = edm()
    made = dataclasses.replace(LINEAR, solver=exact_solver(1.0))(process)
    trainer = make_trainer(made, {name: optax.sgd(1e-3) for name in made.losses})

    def power(p, t, s):
        return (variance(process, s) / variance(process, t)) ** (p["power"] / 2)

    start = {"reverse": jumping(process, power, {"power": jnp.asarray(1.0)})}
    start["forward"] = start["reverse"].replace(params={"power": jnp.asarray(1.3)})
    x = np.asarray(C * jax.random.normal(jax.random.key(0), (64, 2)))

    def moved(turn):
        nets = {"teacher": exact(process), **start}
        state, _ = trainer.step(trainer.init(start, jax.random.key(0)), nets, {"x": x}, (turn,))
        return {name: float(state.params[name]["power"]) - float(start[name].params["power"]) for name in start}

    forward, reverse = moved("forward"), moved("reverse")
    assert forward["reverse"] == 0 and forward["forward"] < -1e-5, forward
    assert reverse["forward"] == 0 and abs(reverse["reverse"]) > 1e-5, reverse


@pytest.mark.parametrize("way", ["reverse", "forward"])
def test_no_gradient_reaches_the_targets(way):
    process = edm()

    def flagged(denoise, process, nodes, x):
        return Solution(x.at[:, 1].set(7.0), 1)  # marks what the solver has touched

    def apply(params, rest, x, t, cond, *, s, key):
        gain = jnp.where(x[:, 1] == 7.0, params["target"], params["prediction"])
        return process.destination(x, t, gain[:, None] * x, s)

    loss = dataclasses.replace(LINEAR, solver=flagged, preserve=0.0)(process).losses[way]
    x = C * jax.random.normal(jax.random.key(0), (256, 2))

    @jax.jit
    @jax.value_and_grad
    def value(params):
        student = Net(params, {}, apply)
        nets = {"teacher": exact(process), "reverse": student, "forward": student}
        return loss(nets, {"x": x}, Progress(0), jax.random.key(1))[0]

    params = {"target": jnp.asarray(2.0), "prediction": jnp.asarray(3.0)}
    before, gradient = value(params)
    assert gradient["target"] == 0 and abs(gradient["prediction"]) > 1e-3
    assert abs(before - value({**params, "target": jnp.asarray(2.5)})[0]) > 1e-3  # though the target is looked at


def test_phases_end_at_the_edges_and_students_stay_there_bit_for_bit():
    for process in (edm(), flow(), vp()):
        config = dataclasses.replace(LINEAR, phases=(1, 2, 4))

        @jax.jit
        def drawn(key, process=process, config=config):
            phase = config.draw(process, key, 3000)
            nodes = [config.node(process, phase, share * phase.intervals) for share in np.linspace(0, 1, 9)]
            return phase, phase.landing, nodes

        phase, landing, nodes = jax.tree.map(np.asarray, drawn(jax.random.key(0)))
        edges = [np.asarray(Edges()(process, k)) for k in config.phases]
        found = np.unique(np.stack([landing, phase.upper], axis=1), axis=0)
        assert {tuple(r) for r in found} == {(lo, hi) for e in edges for hi, lo in itertools.pairwise(e)}
        share = np.mean((phase.upper == np.float32(process.t_max)) & (landing == 0))
        assert share == pytest.approx(1 / 3, abs=0.04)  # the one phase of a single step
        assert np.all(phase.lower[phase.lowest] == np.float32(process.t_min))
        assert np.all(nodes[0] == phase.upper) and np.all(nodes[-1] == landing)
        assert np.all(np.diff(nodes, axis=0) <= 0)
        np.testing.assert_array_equal(phase.intervals * np.round(16 / phase.intervals), 16)
        wild = Net({}, {}, lambda p, r, x, t, c, **k: 100 * jnp.sin(x) + t[:, None])
        x = jax.random.normal(jax.random.key(1), (3000, 2))
        for t in (phase.lower, phase.upper):
            np.testing.assert_array_equal(wild.jump(process, x, t, t), x)


def test_times_are_one_call_for_each_phase_both_ways():
    for process in (edm(), flow()):
        sampling = Invertible(phases=(2, 4))(process).sampling
        down, up = np.asarray(sampling.times(4)), np.asarray(encoding_times(process, sampling.times(4)))
        assert down[0] == np.float32(process.t_max) and down[-1] == 0 and np.all(np.diff(down) < 0)
        np.testing.assert_array_equal(up[1:], down[::-1][1:])
        assert up[0] == np.float32(process.t_min) and sampling.gamma == 0
        with pytest.raises(ValueError, match="serves 2, 4 steps.*3"):
            sampling.times(3)
    with pytest.raises(ValueError, match="phases"):
        Invertible(phases=())


@PROCESSES
def test_exact_students_encode_to_noise_and_decode_to_the_same(process, x64):
    pair = two_way(exact(process), exact(process))
    inverter = student_inverter(pair, process, np.asarray(Edges()(process, 4), np.float64))
    x = C * jax.random.normal(jax.random.key(0), (500, 2), jnp.float64)
    noise = x * np.sqrt(variance(process, process.t_max)) / C
    metrics = inversion_metrics(inverter, process, x, noise)
    # All that is lost is between t_min and 0, where the data are taken to be at t_min.
    lost = abs(np.sqrt(variance(process, process.t_min)) / C - 1)
    assert metrics["round_trip"] == pytest.approx(lost, rel=0.1, abs=1e-6) and metrics["encoding"] < 1.1 * lost + 1e-6


def test_a_pair_in_one_takes_the_way_that_time_goes():
    process = edm()
    down, up = (jumping(process, lambda p, t, s: p * jnp.ones_like(t), jnp.asarray(p)) for p in (2.0, 3.0))
    both, x = two_way(down, up), jnp.ones((3, 2))
    np.testing.assert_allclose(sample(both, process, [80.0, 1.0, 0.0], x).x, 4 * x, rtol=1e-4)
    np.testing.assert_allclose(sample(both, process, [0.002, 1.0, 80.0], x).x, 9 * x, rtol=1e-4)


def test_metrics_in_cases_worked_by_hand():
    process = edm()
    there = two_way(*(jumping(process, lambda p, t, s: p * jnp.ones_like(t), jnp.asarray(p)) for p in (0.5, 4.0)))
    x = jnp.asarray([[1.0, -1.0], [3.0, -3.0]])  # standard deviation √5
    metrics = inversion_metrics(student_inverter(there, process, [80.0, 0.0]), process, x, 2 * x)
    # Codes are 4 x, the true ones 2 x; the round trip ends at 2 x.
    assert metrics["encoding"] == pytest.approx(2 * np.sqrt(5) / 80, rel=1e-4)
    assert metrics["encoding_median"] == pytest.approx(2 * 2 / 80, rel=1e-4)
    assert metrics["round_trip"] == pytest.approx(1, rel=1e-3)


def two_modes():
    means, widths = np.asarray([[-0.4, 0.1], [0.5, -0.2]]), np.asarray([0.1, 0.2])
    covariances = widths[:, None, None] ** 2 * np.eye(2)
    return Mixture.from_covariances([0.5, 0.5], means, covariances, [0, 1]), means, widths


def test_ddim_inversion_misses_by_less_with_more_steps():
    process, (mixture, _, _) = edm(), two_modes()
    teacher, x = as_teacher(mixture, process), mixture.sample(jax.random.key(0), 1000)
    exact_code = exact_inverter(teacher, process).encode(x, None)
    found = {n: inversion_metrics(teacher_inverter(teacher, process, n), process, x, exact_code) for n in (8, 32, 128)}
    for name in ("encoding", "round_trip"):
        errors = [found[n][f"{name}_median"] for n in (8, 32, 128)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2], (name, errors)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)  # DDIM is of first order
    second = inversion_metrics(teacher_inverter(teacher, process, 32, heun), process, x, exact_code)
    assert second["round_trip"] < found[128]["round_trip"]


def test_editing_moves_to_the_other_class_and_keeps_the_place_within_the_mode():
    # Each class is one Gaussian: its flow is affine, and the edit known in closed form.
    process, (mixture, means, widths) = edm(), two_modes()
    teacher = as_teacher(mixture, process)
    source = jnp.asarray([0, 1] * 200)
    x, target = mixture.sample(jax.random.key(0), 400, source), 1 - source
    top = np.sqrt(widths**2 + process.t_max**2)
    a, b = np.asarray(source), np.asarray(target)
    noise = means[a] + (top / widths)[a, None] * (np.asarray(x) - means[a])
    expected = means[b] + (widths / top)[b, None] * (noise - means[b])

    code, edited = edit(exact_inverter(teacher, process), x, source, target)
    np.testing.assert_allclose(code, noise, atol=0.02)
    np.testing.assert_allclose(edited, expected, atol=5e-4)
    metrics = edit_metrics(mixture, process, edited, expected, target)
    assert metrics["hits"] > 0.99 and metrics["position"] < 1e-3
    place = (np.asarray(x) - means[a]) / widths[a, None]
    np.testing.assert_allclose((np.asarray(edited) - means[b]) / widths[b, None], place, atol=0.02)

    def by_ddim(steps):
        other = edit(teacher_inverter(teacher, process, steps), x, source, target)[1]
        return edit_metrics(mixture, process, other, expected, target)["position"]

    assert metrics["position"] < by_ddim(64) < by_ddim(8)
    kept = edit_metrics(mixture, process, x, expected, target)
    assert kept["hits"] < 0.01 and kept["position"] > 1


EXPERIMENT = """
import dataclasses
from ddistill import quickstart
from ddistill.config import MLPNetwork, Teacher
from ddistill.integrators import euler
from ddistill.methods.invertible import Invertible

def experiment():
    return dataclasses.replace(
        quickstart.experiment(), name="tiny", method=Invertible(solver=euler), network=MLPNetwork(width=16, blocks=1),
        teacher=Teacher(steps=2), steps=2, batch_size=8,
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp("invert")
    (folder / "tiny.py").write_text(EXPERIMENT)
    assert main(["distill", str(folder / "tiny.py"), "--workdir", str(folder / "run")]) == 0
    return str(folder / "run")


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run)


def test_a_run_encodes_and_decodes(run, opened, tmp_path, capsys):
    out = tmp_path / "a.npz"
    assert main(["invert", run, "--input", "digits", "--n", "6", "--out", str(out)]) == 0
    assert "round trip of 6 inputs by the student: root-mean-square" in capsys.readouterr().out
    file = dict(np.load(out))
    assert sorted(file) == ["labels", "noise", "reconstruction", "x"]
    process, student, labels = opened.experiment.process, opened.student, file["labels"]
    times = opened.experiment.method(process).sampling.times(4)
    noise = sample(student, process, encoding_times(process, times), jnp.asarray(file["x"]), cond=labels).x
    np.testing.assert_allclose(file["noise"], noise, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        file["reconstruction"], sample(student, process, times, noise, cond=labels).x, rtol=1e-3, atol=1e-4
    )


def test_decoding_to_another_class_and_what_one_command_writes_another_reads(
    run, opened, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(commands, "open_run", lambda _: opened)
    picture, arrays, again = tmp_path / "deep" / "a.png", tmp_path / "a.npz", tmp_path / "b.npz"
    for out in (picture, arrays):
        assert main(["invert", run, "--input", "digits", "--n", "6", "--to-label", "3", "--out", str(out)]) == 0
    assert Image.open(picture).size[0] > 6 * 40
    file = dict(np.load(arrays))
    assert file["edit_labels"].tolist() == [3] * 6 and file["edit"].shape == (6, 8, 8, 1)
    assert not np.array_equal(file["edit"], file["reconstruction"])
    assert main(["invert", run, "--input", str(arrays), "--n", "4", "--out", str(again)]) == 0
    np.testing.assert_allclose(np.load(again)["noise"], file["noise"][:4], rtol=1e-4, atol=1e-3)


def test_the_teacher_inverts_too(run, opened, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "open_run", lambda _: opened)
    out, misses = tmp_path / "a.npz", []
    for steps in ("10", "80"):
        argv = ["invert", run, "--input", "digits", "--n", "4", "--teacher", "--steps", steps, "--out", str(out)]
        assert main(argv) == 0
        file = np.load(out)
        misses.append(np.sqrt(np.mean((file["reconstruction"] - file["x"]) ** 2)))
    assert misses[1] < 0.1 * misses[0]
    assert "by the teacher, heun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "ONE_WAY"], "distilled by Consistency.*Add --teacher"),
        (["--input", "digits", "--steps", "3"], "serves 1, 2, 4, 8 steps"),
        (["--input", "digits", "--steps", "0"], "at least 1"),
        (["--input", "digits", "--n", "0"], "at least 1"),
        (["--input", "digits", "--to-label", "10"], "--to-label 10 is out of range: labels are 0 to 9"),
        (["--input", "none.npz"], "does not exist; give an .npz file with arrays x"),
        (["--input", __file__], "is not an .npz file"),
        (["--input", "NO_LABELS"], r"labels \[N\] from 0 to 9; the file holds x float32 \[2, 8, 8, 1\]"),
        (["--input", "OTHER_SHAPE"], r"this run takes arrays x \[N, 8, 8, 1\]"),
        (["--input", "digits", "--out", "a.txt"], "give a name that ends in"),
    ],
)
def test_wrong_requests_get_words(run, opened, tmp_path, capsys, monkeypatch, flags, words):
    np.savez(tmp_path / "NO_LABELS.npz", x=np.zeros((2, 8, 8, 1), np.float32))
    np.savez(tmp_path / "OTHER_SHAPE.npz", x=np.zeros((2, 4), np.float32), labels=np.zeros(2, int))
    if "ONE_WAY" in flags:
        opened = opened._replace(experiment=dataclasses.replace(opened.experiment, method=Consistency()))
    monkeypatch.setattr(commands, "open_run", lambda _: opened)
    flags = [str(tmp_path / f"{f}.npz") if f.isupper() else f for f in flags]
    assert main(["invert", run, *["--out", str(tmp_path / "a.npz")] * ("--out" not in flags), *flags]) == 2
    told = capsys.readouterr().err
    assert re.search(words, told) and told.count("\n") == 1, told
