"""Pages and pictures of the exact benchmark, from rows whose means, spreads and lost modes are known."""

import importlib.util
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddistill.bench import exact, leaderboard, pictures
from ddistill.bench.kept import PATHS, Kept, folder_of, how_many, read_kept, write_kept
from ddistill.bench.page import groups, markdown, summaries, write_page
from ddistill.cli import main
from ddistill.evaluate.mixture import SCALE, judge
from ddistill.integrators import euler
from ddistill.methods import METHODS
from ddistill.mixture import Mixture
from ddistill.process import edm
from ddistill.report.motion import motion
from ddistill.report.page import Motion

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
_spec = importlib.util.spec_from_file_location("stability", EXPERIMENTS / "stability.py")
stability = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stability)
MEANS = [[3.0, 0.0], [-2.0, 2.0], [0.0, -2.0]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A file with a mixture of three modes, and the mixture as the benchmark scales it."""
    path = tmp_path_factory.mktemp("mixture") / "three.npz"
    np.savez(path, weights=[0.5, 0.3, 0.2], means=MEANS, covariances=[0.04 * np.eye(2)] * 3)
    return str(path), Mixture.load(path).standardised(SCALE)


def row(mixture, method, steps, seed, sw2, **other):
    """A row as files of the first version have it: no device."""
    values = {"endpoint": None, "precision": 0.5, "recall": 1.0, "spread": 1.0, "weights": 0.1, "ll_gap": 0.2}
    who = {"mixture": mixture, "method": method, "steps": steps, "nfe": steps, "seed": seed, "w": None}
    return {
        **who,
        **values,
        "sw2": sw2,
        "encoding": None,
        "round_trip": None,
        "floor_sw2": 0.05,
        "wall_s": 1.0,
        **other,
    }


def test_means_and_standard_deviations_are_over_seeds():
    values = [0.031, 0.027, 0.040]
    rows = [row("ring8", "kd", 1, seed, v) for seed, v in enumerate(values)] + [row("ring8", "kd", 2, 0, 0.02)]
    rows += [row("ring8", "ctm", 1, seed, 0.1, endpoint=e) for seed, e in enumerate((0.5, None))]
    rows += 2 * [row("ring8", "teacher/euler", 8, 0, 0.3)]  # two guided methods of one seed bring it
    made = summaries(rows[::-1], ("sw2", "endpoint"))
    assert [(s.method, s.steps, s.seeds) for s in made] == [
        ("teacher/euler", 8, 1), ("kd", 1, 3), ("kd", 2, 1), ("ctm", 1, 2),
    ]  # fmt: skip
    assert made[1].mean["sw2"] == pytest.approx(statistics.mean(values))
    assert made[1].spread["sw2"] == pytest.approx(statistics.stdev(values))
    assert "sw2" not in made[2].spread and made[3].mean["endpoint"] is None
    page = markdown(rows, "the command", {"ring8": "x-ring8.png"})
    assert "| kd | 1 | 1 | 3 | – | 0.0327 ± 0.0067 | 0.500 ± 0.000 |" in page
    assert "| kd | 2 | 2 | 1 | – | 0.0200 | 0.500 |" in page
    assert "](x-ring8.png)" in page and "Made by `the command`" in page and "Measured" not in page


def test_rows_tell_on_what_they_were_measured():
    rows = [row("ring8", "kd", n, 0, 0.1, device=d) for n, d in ((1, "cpu"), (2, "H100"), (4, "cpu"))]
    assert "Measured: 2 rows on cpu, 1 rows on H100." in markdown(rows, "c")
    assert "1 rows on H100, others do not tell." in markdown([*rows, row("ring8", "kd", 8, 0, 0.1)], "c")


def tables(page):
    """Titles, tables and what two exact samples have."""
    return [line for line in page.splitlines() if line.startswith(("#", "|", "Two exact"))]


def test_the_rows_that_are_published_make_their_page():
    rows = json.loads((RESULTS / "exact.json").read_text("utf-8"))["rows"]
    # But for the words at its head, which say more of older rows.
    assert tables(markdown(rows, "c")) == tables((RESULTS / "exact.md").read_text("utf-8"))
    made = groups([r for r in rows if r["mixture"] not in ("ring8", "grid25", "digits")], RESULTS / "exact.json")
    assert made[0].words.startswith("No samples: no mixture") and made[0].tables[0].lines[0].kind == "reference"


def test_the_readme_has_the_rows_of_grid25_as_they_are_published():
    rows = json.loads((RESULTS / "exact.json").read_text("utf-8"))["rows"]
    known = {(r["method"], r["steps"]): r for r in rows if r["mixture"] == "grid25" and r["w"] is None}
    table = (RESULTS.parents[1] / "README.md").read_text("utf-8").partition("| grid25 |")[2].partition("\n\n")[0]
    seen = []
    for line in table.splitlines()[2:]:
        method, steps, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if (method, int(steps.split("/")[0].replace("–", "0"))) not in known:
            continue  # exact samples and the exact map
        for name, cell in zip(("endpoint", "sw2", "precision", "recall"), cells, strict=True):
            words, all_steps = cell.split(" / "), steps.split(" / ")
            for n, word in zip(all_steps, words * (len(all_steps) if len(words) == 1 else 1), strict=True):
                if word != "–":  # an endpoint says nothing of methods that learn no map
                    digits = len(word.partition(".")[2])
                    assert known[method, int(n)][name] == pytest.approx(float(word), abs=0.5001 * 10**-digits), line
                    seen.append(method)
    assert {"teacher/euler", "ctm", "sds"} <= set(seen)


def test_samples_are_kept_whole_or_not_at_all(tmp_path):
    rng = np.random.default_rng(0)
    moving = Motion("kd", "student", [1.0, 0.25, 0.0], rng.standard_normal((3, 5, 2)))
    x = rng.random((9, 2))
    write_kept(tmp_path / "s", "some/where/my mix.npz", "kd", 0, Kept({1: x}, {1: np.array([2])}, moving))
    (file,) = (tmp_path / "s").iterdir()
    assert file.name == "my-mix.kd.0.npz"
    back = read_kept(tmp_path / "s", "my mix.npz", "kd")
    np.testing.assert_allclose(back.samples[1], x, rtol=1e-3)
    np.testing.assert_allclose(back.motion.x, moving.x, rtol=1e-3, atol=1e-3)
    assert back.lost[1].tolist() == [2] and back.motion.noise == moving.noise
    assert read_kept(tmp_path / "s", "my mix.npz", "ctm") is None
    file.write_bytes(file.read_bytes()[:100])
    assert read_kept(tmp_path / "s", "my mix.npz", "kd") is None
    assert folder_of(Path("a/exact.json")) == Path("a/exact-samples")


def test_the_modes_found_are_those_that_recall_counts(mixture):
    _, exact_mixture = mixture
    by = judge(exact_mixture, 500)
    x = np.array(exact_mixture.sample(jax.random.key(0), 500))
    x[np.linalg.norm(x - np.asarray(exact_mixture.means)[1], axis=1) < 0.3] = np.asarray(exact_mixture.means)[0]
    assert by.found(x).tolist() == [True, False, True]
    assert by(x)["recall"] == pytest.approx(2 / 3)


def test_a_student_that_is_trained_leaves_samples_and_paths(mixture, tmp_path, monkeypatch):
    name = mixture[0]
    case = exact.problem(name, samples=200)
    monkeypatch.setattr(exact, "distilled", lambda *_: case.teacher)  # a student as good as it gets
    made = METHODS["ctm"].make()(case.process)
    rows = list(exact.student_rows(case, "ctm", made, None, 0, None, (1, 16), tmp_path))
    kept = read_kept(tmp_path, name, "ctm")
    assert list(kept.samples) == [1, 16] and kept.samples[16].shape == (200, 2) and how_many(2) == 500
    # In one jump the exact denoiser answers the data's mean, where no mode is; what is lost is what recall lacks.
    assert np.abs(kept.samples[1]).max() < 0.1 and kept.lost[1].tolist() == [0, 1, 2]
    for r in rows:
        assert len(kept.lost[r["steps"]]) / 3 == pytest.approx(1 - r["recall"])
        assert r["device"] == jax.devices()[0].device_kind
    # Paths begin at the common noise, whose spread is the data's in their frame, and end at the samples.
    assert kept.motion.x.shape == (17, PATHS, 2) and kept.motion.noise[-1] == 0
    np.testing.assert_allclose(kept.motion.x[0], case.noise[:PATHS] / 80 * SCALE, rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(kept.motion.x[-1], kept.samples[16][:PATHS], rtol=0.01, atol=2e-3)


@pytest.fixture
def students(mixture, tmp_path):
    """Rows and kept samples of two students, of which one has lost a mode."""
    name, exact_mixture = mixture
    x = np.array(exact_mixture.sample(jax.random.key(0), 300))
    folder = tmp_path / "rows-samples"
    times = jnp.asarray([80.0, 1.0, 0.0])
    paths = [80.0 * jnp.ones((9, 2)), jnp.ones((9, 2)), jnp.asarray(x[:9])]
    write_kept(folder, name, "kd", 0, Kept({1: x, 2: x}, {1: np.zeros(0), 2: np.zeros(0)}))
    moving = motion("ctm", "student", edm(), times, paths, SCALE)
    write_kept(folder, name, "ctm", 0, Kept({1: x}, {1: np.array([1])}, moving))
    return [row(name, method, n, 0, 0.1) for method, n in (("kd", 1), ("kd", 2), ("ctm", 1), ("dmd", 1))], folder


def red(path):
    """How many pixels of a picture are of the red that marks lost modes."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - [200, 16, 46]).max(-1) < 12).sum())


def test_a_picture_shows_every_student_and_its_lost_modes_in_red(students, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_TEACHERS", (("teacher/euler", euler, (1, 4)),))
    rows, folder = students
    name = rows[0]["mixture"]
    shown = pictures.shown(name, rows, folder)
    assert [one.label for one in shown.drawn] == ["exact samples", "teacher/euler", "kd", "ctm"]
    assert shown.modes == 3 and list(shown.drawn[2].sheets) == [1, 2] and list(shown.drawn[3].sheets[1].lost) == [1]
    assert list(shown.drawn[1].sheets[1].lost) == [0, 1, 2]  # one step of Euler answers the data's mean
    assert [one.label for one in shown.motions] == ["teacher/heun", "ctm"]
    assert "No samples were kept of dmd." in shown.words
    monkeypatch.setattr(pictures, "shown", lambda *a: shown)
    pictures.save(tmp_path / "with.png", name, rows, folder)
    for one in shown.drawn:
        for sheet in one.sheets.values():
            object.__setattr__(sheet, "lost", [])
    pictures.save(tmp_path / "without.png", name, rows, folder)
    assert red(tmp_path / "with.png") > red(tmp_path / "without.png") + 40


def test_digits_are_shown_as_scans_with_the_modes_that_are_lost(tmp_path):
    view = pictures._view("digits", None)
    means = view(np.asarray(Mixture.load("digits").standardised(SCALE).means))
    assert means.shape == (50, 8, 8, 1) and means.min() >= 0 and means.max() <= 1
    # Scans have black corners, and the middle of each mode is read as the digit of its label.
    assert means[:, [0, 0, -1], [0, -1, 0]].mean() < 0.1
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    scans = load_digits()
    read = KNeighborsClassifier(5).fit(scans.data / 16, scans.target).predict(means.reshape(50, 64))
    assert np.mean(read == np.asarray(Mixture.load("digits").labels)) > 0.95
    sheets = {1: pictures.Sheet(means[:12], [3, 4])}
    shown = pictures.Shown([pictures.Drawn("sds", "student", sheets)], modes=50, middles=means)
    figure = pictures._images("digits", shown)
    pictures.canvas.save(tmp_path / "a.png", figure)
    assert figure.axes[1].get_ylabel() == "2 of 50 lost"


def test_with_nothing_left_to_train_only_the_page_is_written(students, tmp_path, monkeypatch, capsys):
    name = students[0][0]["mixture"]
    rows = [row(name, "kd", n, seed, 0.1 + 0.01 * seed) for n in METHODS["kd"].steps for seed in (0, 1)]
    rows.append(row("gone.npz", "kd", 1, 0, 0.2))
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    before = (tmp_path / "rows.json").read_bytes()

    def never(*_):
        raise AssertionError("something was trained")

    for part in ("problem", "fitted_network", "student_rows", "teacher_row"):
        monkeypatch.setattr(leaderboard, part, never)
    monkeypatch.setattr(pictures, "_TEACHERS", (("teacher/euler", euler, (1, 4)),))
    monkeypatch.chdir(tmp_path)
    flags = ["--methods", "kd", "--mixture", name, "--seeds", "2", "--json", "rows.json", "--page", "out.md"]
    assert main(["bench", "exact", *flags]) == 0
    page = (tmp_path / "out.md").read_text("utf-8")
    assert f"ddistill bench exact --methods kd --seeds 2 --mixture {name} --json rows.json --page out.md" in page
    assert "| kd | 1 | 1 | 2 | – | 0.1050 ± 0.0071 |" in page and "](out-three.png)" in page
    assert (tmp_path / "out-three.png").is_file() and (tmp_path / "rows.json").read_bytes() == before
    assert "No picture of gone.npz: no mixture" in capsys.readouterr().err


def test_a_report_of_rows_has_a_group_for_each_mixture(students, monkeypatch):
    monkeypatch.setattr(pictures, "_TEACHERS", (("teacher/euler", euler, (1, 4)),))
    rows, folder = students
    rows += [{**row(rows[0]["mixture"], "lcm", 4, 0, 0.1), "w": w} for w in (1.0, 2.0)]
    rows += [{**row(rows[0]["mixture"], "invertible/inversion", 4, 0, None), "encoding": 0.1, "round_trip": 0.2}]
    (group,) = groups(rows, folder.with_name("rows.json"))
    assert group.title == "three" and [t.title for t in group.tables] == ["", "Guidance", "Inversion"]
    main_table, guided, inverted = group.tables
    assert [line.label for line in main_table.lines] == ["two exact samples", "kd", "kd", "ctm", "dmd"]
    assert main_table.lines[0].values == {"sw2": 0.05}
    assert [line.values["w"] for line in guided.lines] == [1.0, 2.0] and guided.columns[0].name == "w"
    assert inverted.lines[0].label == "invertible" and inverted.lines[0].values["encoding"] == 0.1
    assert [d.label for d in group.drawn][-2:] == ["kd", "ctm"] and group.modes == 3 and group.centres.shape == (3, 2)


def test_a_page_needs_no_samples(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_TEACHERS", (("teacher/euler", euler, (1, 4)),))
    said = []
    write_page(tmp_path / "p.md", [row(mixture[0], "kd", 1, 0, 0.1)], "c", None, said.append)
    assert (tmp_path / "p-three.png").is_file() and said == []


LIMITS = [
    ("kd", 1, {"sw2": 0.03, "precision": 0.95, "endpoint": 0.03}), ("progressive", 1, {"sw2": 0.045, "endpoint": 0.08}),
    ("rectified_flow", 64, {"sw2": 0.03}), ("reflow", 1, {"sw2": 0.03, "endpoint": 0.035}),
    ("consistency", 1, {"endpoint": 0.05}),
    *(("consistency", n, {"sw2": 0.03, "precision": 0.9}) for n in (1, 2, 4, 8)),
    *(("ctm", n, {"sw2": most}) for n, most in ((1, 0.04), (2, 0.035), (4, 0.035), (8, 0.03), (16, 0.03))),
    ("invertible", 4, {"sw2": 0.05}), ("dmd_multi_sample", 1, {"sw2": 0.045, "precision": 0.75, "recall": 1}),
    *((name, 1, limits) for name, limits in stability.LIMITS.items()),
]  # fmt: skip
"""What defaults have to reach on grid25."""


@pytest.mark.parametrize("mixture", ["grid25", "unseen-2d.npz"])
def test_the_published_rows_reach_their_numbers(mixture):
    rows = json.loads((RESULTS / "exact.json").read_text(encoding="utf-8"))["rows"]
    by = {(row["method"], row["steps"]): row for row in rows if row["mixture"] == mixture and row["w"] is None}
    for name, steps, limits in LIMITS:
        row, here = by[name, steps], dict(limits)
        most = here.pop("endpoint", None)
        if most is not None and mixture == "grid25":  # a share of the data's width says little of other modes
            assert row["endpoint"] <= most, (name, steps, row["endpoint"])
        assert stability.reached(row, here), (name, steps, row)


def test_the_page_of_seeds_counts_those_that_reach_their_numbers():
    rows = json.loads((RESULTS / "stability.json").read_text(encoding="utf-8"))["rows"]
    assert stability.page(rows) == (RESULTS / "stability.md").read_text(encoding="utf-8")
    for name in ("dmd", "add"):
        mine = [row for row in rows if (row["method"], row["steps"]) == (name, 1)]
        assert len({row["seed"] for row in mine}) == len(mine)
    good = {**mine[0], "sw2": 0.09, "precision": 0.7, "recall": 0.95}
    for worse in ({"sw2": 0.11}, {"precision": 0.59}, {"recall": 0.88}):
        (line,) = stability.page([good, {**good, **worse}]).splitlines()[-1:]
        assert "| add | 1 of 2 |" in line
    assert stability.reached({**good, "mixture": "other", "floor_sw2": 0.05, "sw2": 0.19}, stability.LIMITS["add"])


def test_the_published_rows_of_digits_and_of_the_ring_reach_their_numbers():
    rows = json.loads((RESULTS / "exact.json").read_text(encoding="utf-8"))["rows"]
    by = {(row["mixture"], row["method"], row["steps"]): row for row in rows if row["w"] is None}
    for name in ("kd", "reflow", "consistency"):
        row = by["digits", name, 1]
        assert row["sw2"] <= 0.055 and row["recall"] >= 0.85, name
    for name in ("dmd", "dmd_regression"):
        row = by["digits", name, 1]
        assert row["sw2"] <= 0.09 and row["precision"] >= 0.75 and row["recall"] >= 0.95, name
    times = (("kd", 1, 1.3), ("reflow", 1, 1.3), ("consistency", 1, 1.3), ("progressive", 1, 1.8), ("ctm", 4, 1.5))
    for name, steps, most in (*times, ("dmd_regression", 1, 1.8)):
        row = by["ring8", name, steps]
        assert row["sw2"] <= most * row["floor_sw2"] and row["recall"] == 1, name
