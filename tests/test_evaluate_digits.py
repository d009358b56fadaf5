"""The table of `ddistill evaluate`: what scans score against scans, and the likelihood where it is asked for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ddistill import quickstart
from ddistill.cli import evaluate as evaluate_command
from ddistill.cli import main
from ddistill.data import load_digits
from ddistill.evaluate.digits import Sampler, evaluate
from ddistill.integrators import Solution
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import edm


def test_held_out_scans_are_as_dense_and_varied_as_those_to_train_on():
    (floor,) = evaluate(load_digits(), edm(), [])
    assert floor["density"] == pytest.approx(1, abs=0.15) and floor["diversity"] == pytest.approx(1, abs=0.03)
    # 540 scans against 1257: a ball is missed where the five nearest of 1796 are all of the 1256 (Naeem, lemma 2).
    assert floor["coverage"] == pytest.approx(1 - (1256 / 1796) ** 5, abs=0.05)
    assert floor["nll"] is None


def test_a_sampler_with_one_picture_for_each_digit_is_precise_and_has_no_diversity():
    digits = load_digits()
    scans = np.stack([digits.train_x[digits.train_labels == c][0] for c in range(10)])
    half = np.stack([0.5 * (digits.train_x[digits.train_labels == c]).mean(0) for c in range(10)])
    rng = np.random.default_rng(0)

    def draw(noise, labels, key):
        return Solution(scans[np.asarray(labels)], 1)

    def shrunk(noise, labels, key):  # halfway to a point, so that distances within a digit halve
        pick = np.stack([rng.choice(digits.train_x[digits.train_labels == c]) for c in np.asarray(labels)])
        return Solution(0.5 * pick + half[np.asarray(labels)], 1)

    def held_out(noise, labels, key):
        return Solution(digits.held_out_x[np.arange(len(labels)) % len(digits.held_out_x)], 1)

    _, one, near, held = evaluate(
        digits, edm(), [Sampler("one", draw), Sampler("near", shrunk), Sampler("held", held_out)], 400
    )
    assert held["frechet_held_out"] < 0.3 * held["frechet"]
    assert (one["precision"], one["recall"], one["diversity"]) == (1, pytest.approx(0, abs=0.02), pytest.approx(0))
    # Ten points reach few of the 1257 balls.
    assert one["coverage"] < 0.1 and near["diversity"] == pytest.approx(0.5, abs=0.03)


def test_the_likelihood_adds_noise_that_has_nothing_to_do_with_the_samples():
    c, process = 0.5, edm()
    teacher = as_teacher(
        Mixture.from_covariances([0.1] * 10, np.zeros((10, 64)), [c**2 * np.eye(64)] * 10, labels=np.arange(10)),
        process,
    )
    # The exact flow of N(0, c²) takes noise straight to data; were it added again, x would have variance (c + .05)².
    exact = Sampler("exact", lambda noise, labels, key: Solution(noise * c / np.hypot(c, process.t_max), 1))
    _, row = evaluate(load_digits(), process, [exact], 256, likelihood=teacher)
    expected = 0.5 * np.log2(2 * np.pi * np.e * (c**2 + 0.05**2))
    assert row["nll"] == pytest.approx(expected, abs=4 / np.sqrt(2 * 256 * 64) / np.log(2))


def test_evaluate_asks_the_teacher_how_likely_samples_are_where_told_to(tmp_path, capsys, monkeypatch):
    asked = []
    opened = SimpleNamespace(experiment=quickstart.experiment(), teacher="the teacher", student=None)
    monkeypatch.setattr(evaluate_command, "open_run", lambda run: opened)
    monkeypatch.setattr(evaluate_command, "samplers_of", lambda opened, steps: [])
    monkeypatch.setattr(evaluate_command, "steps_of", lambda opened, steps: [1])
    monkeypatch.setattr(evaluate_command.judged, "bits_per_dimension", lambda *a, key: asked.append(a) or 2.345)
    (tmp_path / "experiment.json").write_text("{}")
    run, file = str(tmp_path), tmp_path / "table.json"
    assert main(["evaluate", run, "--json", str(file)]) == 0
    told = capsys.readouterr().out
    assert "diversity" in told and "bits/pixel" not in told and not asked
    assert main(["evaluate", run, "--likelihood", "--json", str(file)]) == 0
    told = capsys.readouterr().out
    flags = ["--likelihood", "--features", "inception=a.pth"]
    assert main(["evaluate", run, *flags]) == 2 and "--likelihood is of digits" in capsys.readouterr().err
    assert "bits/pixel" in told and "2.345" in told
    assert json.loads(file.read_text())["rows"][0]["nll"] == 2.345
    ((teacher, process, x, labels),) = asked
    assert (teacher, process) == ("the teacher", edm())
    np.testing.assert_array_equal(x, load_digits().held_out_x[:256])
    np.testing.assert_array_equal(labels, load_digits().held_out_labels[:256])


def test_rows_are_kept_in_a_folder_if_one_is_given(tmp_path, capsys, monkeypatch):
    opened = SimpleNamespace(experiment=quickstart.experiment(), teacher=None, student=None)
    (tmp_path / "experiment.json").write_text("{}")
    digits = load_digits()
    drawn = []

    def draw(noise, labels, key):
        drawn.append(len(noise))
        return Solution(digits.train_x[: len(noise)], 1)

    monkeypatch.setattr(evaluate_command, "open_run", lambda run: opened)
    monkeypatch.setattr(evaluate_command, "samplers_of", lambda opened, steps: [Sampler("copies", draw, 1)])
    monkeypatch.setattr(evaluate_command, "steps_of", lambda opened, steps: [1])
    argv = [
        "evaluate",
        str(tmp_path),
        "--samples",
        "20",
        "--out",
        str(tmp_path / "e"),
        "--csv",
        str(tmp_path / "t.csv"),
    ]
    assert main(argv) == 0 and drawn == [20, 20]
    first = json.loads((tmp_path / "e" / "table.json").read_text())["rows"]
    assert main(argv) == 0 and drawn == [20, 20], "both rows are there"
    made = json.loads((tmp_path / "e" / "table.json").read_text())["made"]
    assert (made["of"], made["samples"], made["seed"]) == ("digits, by pixels", 20, 0)
    assert json.loads((tmp_path / "e" / "table.json").read_text())["rows"] == first
    assert [row["sampler"] for row in first] == ["held-out scans (floor)", "copies"]
    assert [(row["samples"], row["seed"]) for row in first] == [(len(digits.held_out_x), 0), (20, 0)]
    assert first[1]["images_per_s"] * first[1]["wall_s"] == pytest.approx(20)
    assert first[1]["ms_per_image"] * first[1]["images_per_s"] == pytest.approx(1000)
    assert (tmp_path / "t.csv").read_text().splitlines()[2].startswith("copies,1,1,")
    (tmp_path / "experiment.json").write_text("{} ")  # trained anew
    assert main(argv) == 2 and "holds another evaluation: run: " in capsys.readouterr().err
