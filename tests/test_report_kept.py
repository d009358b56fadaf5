"""Samples of a report that are kept in the runs' folders: when they serve the next report, and when they do not."""

import io
import json
import shutil

import numpy as np
import pytest
from test_report_latents import EXPERIMENT

from ddistill import storage
from ddistill.cli import main, report, report_kept
from ddistill.cli.report_runs import Shown

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device):
    """Two finished runs, on pixels and on points in two dimensions."""
    folder = tmp_path_factory.mktemp("trained")
    for name, data in (("pixels", "Pixels()"), ("points", "Pixels((2,))")):
        (folder / f"{name}.py").write_text(EXPERIMENT.replace("DATA", data), encoding="utf-8")
        train(folder, name)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def drawn(monkeypatch):
    """Runs that a report draws, in place of which it draws nothing."""
    names = []
    monkeypatch.setattr(report, "open_run", lambda folder: names.append(folder.name))
    monkeypatch.setattr(report, "drawn_of", lambda *_: Shown(words="Drawn by hand."))
    return names


def train(folder, name, *flags):
    assert main(["distill", str(folder / f"{name}.py"), "--workdir", str(folder / name), *flags]) == 0


def written(run, out, *flags):
    assert main(["report", str(run), "--out", str(out), "--steps", "1", "--samples", "4", *map(str, flags)]) == 0
    return (out / "index.html").read_text(encoding="utf-8")


def test_the_next_report_is_the_same_and_opens_no_run(runs, tmp_path, monkeypatch):
    first = written(runs, tmp_path / "out")
    monkeypatch.setattr(report, "open_run", lambda folder: pytest.fail(f"{folder} is opened"))
    assert written(runs, tmp_path / "out") == first
    begin = first.index('id="data">') + len('id="data">')
    pixels, points = json.loads(first[begin : first.index("</script>", begin)])["groups"]
    assert [len(group["drawn"]) for group in (pixels, points)] == [4, 4] and len(points["motions"]) == 2


def test_a_run_that_is_trained_anew_is_drawn_anew(runs, tmp_path, drawn):
    run, out, names = runs / "pixels", tmp_path / "out", ("report.npz", "experiment.json")
    written(run, out)
    before = {name: (run / name).read_bytes() for name in names}
    shutil.rmtree(run)
    train(runs, "pixels", "--seed", "1")
    for name in names:  # so that checkpoints alone are others
        (run / name).write_bytes(before[name])
    written(run, out)
    assert drawn == ["pixels"] * 2


def test_all_that_makes_samples_others_lets_them_be_drawn_anew(runs, tmp_path, drawn, monkeypatch):
    run, out, models = runs / "pixels", tmp_path / "out", tmp_path / "models"
    (tmp_path / "prompts.txt").write_text("a\n", encoding="utf-8")
    (models / "vae").mkdir(parents=True)
    (models / "vae" / "weights").write_text("1", encoding="utf-8")

    def rewritten(path, text):
        path.write_text(text, encoding="utf-8")
        return []

    changes = [
        lambda: [],
        lambda: rewritten(run / "experiment.py", (run / "experiment.py").read_text("utf-8") + "\n"),
        lambda: monkeypatch.setattr(report_kept, "version", lambda: "another") or [],
        lambda: ["--steps", "2"],
        lambda: ["--samples", "5"],
        lambda: ["--seed", "1"],
        lambda: ["--prompts", tmp_path / "prompts.txt"],
        lambda: ["--models", models],
        lambda: [*rewritten(models / "vae" / "weights", "12"), "--models", models],
        lambda: ["--models", tmp_path / "gone"],
    ]
    for number, change in enumerate(changes, 1):
        flags = change()
        for _ in range(2):
            written(run, out, *flags)
            assert drawn == ["pixels"] * number


@pytest.mark.parametrize("kind", ["no file", "cut", "another's", "without arrays", "a pickle"])
def test_a_file_that_is_damaged_or_anothers_is_made_anew(kind, runs, tmp_path, drawn):
    run, out = runs / "pixels", tmp_path / "out"
    written(run, out)
    whole = (run / "report.npz").read_bytes()
    about = json.loads(np.load(run / "report.npz")["about"].item())
    arrays = {
        "another's": {"x": np.zeros(3)},
        "without arrays": {"about": np.asarray(json.dumps({**about, "drawn": [["student", "student", [1]]]}))},
        "a pickle": {"about": np.asarray([{"made": 1}], object)},
    }
    file = io.BytesIO()
    np.savez(file, **arrays.get(kind, {}))
    content = {"no file": b"{}", "cut": whole[:-30]}.get(kind, file.getvalue())
    (run / "report.npz").write_bytes(content)
    for _ in range(2):
        written(run, out)
    assert drawn == ["pixels"] * 2 and np.load(run / "report.npz")["about"].item() == json.dumps(about)


def test_a_run_where_nothing_can_be_written_is_shown_all_the_same(runs, tmp_path, drawn, monkeypatch, capsys):
    def refused(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(storage, "put", refused)
    for number in (1, 2):
        assert "Drawn by hand." in written(runs / "pixels", tmp_path / "out")
        assert drawn == ["pixels"] * number and "not shown" not in capsys.readouterr().err
    assert not (runs / "pixels" / "report.npz").exists()
