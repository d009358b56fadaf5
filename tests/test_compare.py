"""Several students of one teacher in one table: who is judged at which steps, and what cannot be compared."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from ddistill import quickstart
from ddistill.cli import main
from ddistill.compare import compare, front, markdown
from ddistill.config import Data, MLPNetwork
from ddistill.methods import KD, Consistency
from ddistill.runs import open_run

TINY = dataclasses.replace(
    quickstart.experiment(),
    name="consistency",
    network=MLPNetwork(width=16, blocks=1),
    teacher=dataclasses.replace(quickstart.experiment().teacher, steps=3),
    method=Consistency(solver_steps=1),
    steps=2,
    batch_size=32,
)
ONE_STEP = dataclasses.replace(TINY, name="kd", method=KD(steps=(1,), pairs=64, teacher_steps=4))


pytestmark = pytest.mark.usefixtures("one_device")


def test_every_student_is_judged_at_the_steps_it_serves_and_a_second_call_trains_nothing(tmp_path):
    said = []
    rows = list(compare([TINY, ONE_STEP], (1, 2), workdir=tmp_path, say=said.append))
    assert said == ["distilling consistency", "distilling kd"]
    calls = [(row["sampler"], row["nfe"]) for row in rows]
    assert calls[-3:] == [("consistency", 1), ("consistency", 2), ("kd", 1)]
    assert [c[1] for c in calls[:5]] == [None, 35, 8, 1, 2]
    assert all((row["train_s"] is not None) == (row["sampler"] in ("consistency", "kd")) for row in rows)
    for row in rows[-3:]:
        told = [json.loads(line) for line in (tmp_path / row["sampler"] / "metrics.jsonl").read_text().splitlines()]
        (spent,) = [line["spent"] for line in told if "spent" in line and line["stage"] == "student"][-1:]
        assert row["train_s"] == pytest.approx(sum(v for k, v in spent.items() if k not in ("began", "first")))
    page = markdown(rows, [TINY, ONE_STEP], "the command")
    assert "`the command`" in page and page.count("| kd |") == 2 and page.count("| consistency | ") == 3
    assert "| density | coverage | diversity |" in page and "![" not in page
    lines, references = front(rows)
    shown = [(name, p.quality, p.diversity, p.label) for name, line in lines.items() for p in line]
    assert shown == [(r["sampler"], r["precision"], r["recall"], str(r["nfe"])) for r in rows[-3:]]
    assert {name: p.label for name, p in references.items()} == {"held-out scans (floor)": "", "teacher, Heun": "35"}
    kept = open_run(tmp_path / "kd", ONE_STEP)
    taken = open_run(tmp_path / "consistency", TINY).teacher.params
    jax.tree.map(np.testing.assert_array_equal, kept.teacher.params, taken)
    taught = [path.read_text().count('"stage": "teacher"') for path in sorted(tmp_path.glob("*/metrics.jsonl"))]
    assert taught[0] > 0 and taught[1] == 0
    again = list(compare([TINY, ONE_STEP], (1, 2), workdir=tmp_path))
    same = ("frechet", "recall", "accuracy")
    assert [[r[k] for k in same] for r in again] == [[r[k] for k in same] for r in rows]


def test_experiments_must_share_their_teacher_and_not_their_name(tmp_path):
    other = dataclasses.replace(TINY, name="other", network=MLPNetwork(width=32))
    with pytest.raises(ValueError, match=r"other has another teacher than consistency: network\.width: 16"):
        next(compare([TINY, other], workdir=tmp_path))
    with pytest.raises(ValueError, match="different names"):
        next(compare([TINY, TINY], workdir=tmp_path))


def test_the_command_writes_the_page_and_the_rows(tmp_path, monkeypatch):
    from ddistill.cli import commands

    file = tmp_path / "tiny.py"
    file.write_text("from tests_tiny import TINY\n\ndef experiment():\n    return TINY\n")
    monkeypatch.setattr(commands, "load_experiment", lambda path: TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(file), "--out", "page.md", "--steps", "1"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "consistency" in page and "(page.png)" in page
    assert Image.open(tmp_path / "page.png").size[0] > 1000
    assert json.loads((tmp_path / "page.json").read_text())["rows"][-1]["sampler"] == "consistency"
    kept = json.loads((tmp_path / "runs/compare/consistency/compare.json").read_text())["rows"]
    assert kept == json.loads((tmp_path / "page.json").read_text())["rows"]
    assert (tmp_path / "runs/compare/consistency/experiment.py").read_text() == file.read_text()
    assert main(["compare", "--out", "page.md"]) == 2


def test_the_command_that_is_told_to_leave_saves_its_step_and_goes_on_there(tmp_path, monkeypatch, capsys):
    from ddistill.cli import commands

    taken, source = [], Data.source

    def told(data, *args):
        batches = source(data, *args)

        def batch(step):
            taken.append(step)
            if taken == [0, 1, 2, 0, 1]:  # of the student, after the steps of the teacher
                os.kill(os.getpid(), signal.SIGTERM)
            return batches(step)

        return batch

    monkeypatch.setattr(Data, "source", told)
    monkeypatch.setattr(commands, "load_experiment", lambda path: dataclasses.replace(TINY, steps=20))
    (file := tmp_path / "tiny.py").write_text("# what load_experiment answers\n")
    words = ["compare", str(file), "--out", str(tmp_path / "page.md"), "--workdir", str(tmp_path / "runs")]
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == 75
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "page.md").exists()
    (step,) = (p.name for p in (tmp_path / "runs/consistency/checkpoints/student").iterdir() if p.is_dir())
    assert f"saved at step {step} of 20. The same command goes on" in capsys.readouterr().err and int(step) < 20
    taken.clear()
    assert main(words) == 0
    assert taken == list(range(int(step), 20)) and "consistency" in (tmp_path / "page.md").read_text()
