"""The command line, from the words on it to the files it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

import ddistill
from ddistill.bench import leaderboard
from ddistill.cli import commands, main
from ddistill.cli.output import growing
from ddistill.methods import METHODS

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "digits_consistency.py"
TINY = ["--network.width", "16", "--network.blocks", "1", "--teacher.steps", "2", "--steps", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    run = tmp_path_factory.mktemp("cli") / "run"
    assert main(["distill", str(EXPERIMENT), "--workdir", str(run), *TINY]) == 0
    return run


def test_help_needs_neither_jax_nor_flax_nor_optax():
    code = (
        "import sys\n"
        "from typing import get_args\n"
        "from ddistill.cli import Command, main\n"
        "for argv in ([], *([get_args(kind)[1].name] for kind in get_args(Command))):\n"
        "    try:\n"
        "        main([*argv, '--help'])\n"
        "    except SystemExit as exit:\n"
        "        assert exit.code == 0, argv\n"
        "slow = {'jax', 'flax', 'optax', 'orbax', 'sklearn', 'matplotlib', 'diffrax', 'scipy', 'torch', 'numpy', 'PIL',"
        " 'jinja2', 'tensorboardX', 'gradio', 'grain'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("quickstart", "--workdir", "--gamma", "--mixture", "NAME_OR_FILE"):
        assert word in done.stdout


def test_every_public_name_is_found_and_the_editors_list_is_the_same():
    for name in ddistill.__all__:
        assert getattr(ddistill, name) is not None and name in dir(ddistill)
    text = Path(ddistill.__file__).read_text()
    for name in set(ddistill.__all__) - {"sample"}:
        assert f"import {name} as {name}\n" in text, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ddistill.nothing


def test_a_run_is_sampled_into_a_picture_and_into_arrays(finished, tmp_path):
    picture, arrays = tmp_path / "deep" / "a.png", tmp_path / "a.npz"
    assert main(["sample", str(finished), "--n", "5", "--out", str(picture)]) == 0
    assert Image.open(picture).size == (3 * 32, 2 * 32)  # five of 8x8, enlarged four times, three to a row
    assert main(["sample", str(finished), "--n", "12", "--steps", "2", "--out", str(arrays)]) == 0
    with np.load(arrays) as file:
        assert file["x"].shape == (12, 8, 8, 1) and np.isfinite(file["x"]).all()
        assert file["labels"].tolist() == [*range(10), 0, 1]
        again = tmp_path / "b.npz"
        assert main(["sample", str(finished), "--n", "12", "--steps", "2", "--out", str(again)]) == 0
        np.testing.assert_array_equal(file["x"], np.load(again)["x"])
        assert main(["sample", str(finished), "--n", "12", "--seed", "1", "--label", "3", "--out", str(again)]) == 0
        assert np.load(again)["labels"].tolist() == [3] * 12
        assert not np.array_equal(file["x"], np.load(again)["x"])
    assert main(["sample", str(finished), "--teacher", "--steps", "3", "--out", str(again)]) == 0
    assert np.load(again)["x"].shape == (64, 8, 8, 1)


def test_gamma_zero_adds_no_noise_after_the_start(finished, tmp_path):
    # With one step there is nothing to add, so every gamma gives one sample; with two they differ.
    def draw(steps, gamma):
        out = tmp_path / f"{steps}{gamma}.npz"
        argv = ["sample", str(finished), "--n", "4", "--steps", str(steps), "--gamma", str(gamma), "--out", str(out)]
        assert main(argv) == 0
        return np.load(out)["x"]

    np.testing.assert_allclose(draw(1, 0.0), draw(1, 1.0), atol=1e-5)
    assert not np.allclose(draw(2, 0.0), draw(2, 1.0), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--label", "10", "--out", "a.png"], "--label 10 is out of range: labels are 0 to 9"),
        (["--label", "-1", "--out", "a.png"], "--label -1 is out of range"),
        (["--out", "a.jpg"], "ends in .png"),
        (["--n", "0", "--out", "a.png"], "at least 1"),
        (["--steps", "0", "--out", "a.png"], "--steps 0: at least 1 is needed"),
        (["--teacher", "--steps", "0", "--out", "a.png"], "--steps 0: at least 1 is needed"),
        (["--seed", "-1", "--out", "a.png"], "--seed -1: at least 0 is needed"),
        (["--models", "nowhere", "--out", "a.npz"], "--models nowhere does not exist"),
        (["--gamma", "2", "--out", "a.png"], "gamma must lie in [0, 1]"),
        (["--gamma", "1", "--teacher", "--out", "a.png"], "leave them out with --teacher"),
    ],
)
def test_wrong_requests_to_sample_get_one_line_of_words(finished, capsys, flags, words):
    assert main(["sample", str(finished), *flags]) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told
    assert told.count("\n") == 1


def test_other_errors_get_words_too_and_debug_shows_where_they_come_from(tmp_path, capsys, finished):
    assert main(["sample", str(tmp_path / "none"), "--out", "a.png"]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        main(["sample", str(tmp_path / "none"), "--out", "a.png", "--debug"])
    assert main(["distill", str(tmp_path / "none.py")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["distill", str(EXPERIMENT), "--workdir", str(finished), *TINY, "--seed", "1"]) == 2
    assert "seed: 0 before, 1 now" in capsys.readouterr().err
    assert main(["distill", str(EXPERIMENT), "--workdir", str(tmp_path / "new"), "--stepps", "3"]) == 2
    assert "--stepps: the experiment has no field stepps, did you mean steps?" in capsys.readouterr().err
    for argv, words in (
        (["sample", str(finished), "--out", "a.png", "--step", "3"], "does not take --step 3: did you mean --steps?"),
        (["distil", "x.py"], "no command 'distil': did you mean distill?"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        told = capsys.readouterr().err
        assert exit.value.code == 2 and words in told and told.count("\n") == 1
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("ddistill ")
    assert main(["quickstart", "--workdir", "x"]) == 2 and "as --out" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "steps = 0 must be at least 1"),
        (["--teacher.steps", "0"], "teacher.steps = 0 must be at least 1"),
        (["--batch-size", "0"], "batch_size = 0 must be at least 1"),
        (["--log-every", "0"], "log_every = 0 must be at least 1"),
        (["--seed", "-1"], "seed = -1 must be at least 0"),
        (["--teacher.unlabelled", "2"], "teacher.unlabelled = 2.0 is a share of the labels"),
        (["--accumulate", "3"], "does not split into 3 parts"),
        (["--method", "KD"], "--method is set in the experiment's file; its own fields are flags"),
        (["--optimizer.lr", "1"], "optimizer has no field lr; it has learning-rate, warmup"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused_before_its_folder_is_claimed(tmp_path, capsys, flags, words):
    for how in ([], ["--dry-run"]):
        assert main(["distill", str(EXPERIMENT), "--workdir", str(tmp_path / "run"), *flags, *how]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_in_the_place_of_folders_get_words(finished, tmp_path, capsys):
    file = tmp_path / "moons.py"
    file.write_text("")
    there, run = str(file), str(finished)
    for argv, words in (
        (["sample", there, "--out", "a.png"], f"{file} is a file, not the folder of a run"),
        (["report", there], f"{file}: is a file, not the folder of a run"),
        (["report", run, "--out", there], f"--out {file} is a file: give a folder"),
        (["pairs", run, "--count", "3", "--out", there], f"--out {file} is a file: give a folder"),
        (["distill", str(EXPERIMENT), "--workdir", there], f"--workdir {file} is a file: give a folder"),
        (["encode", "nothing", "--to", "x", "--models", "m"], "nothing does not exist: give a folder of images"),
        (["encode", there, "--to", "x", "--models", "nowhere"], "--models nowhere does not exist"),
    ):
        assert main(argv) == 2
        assert words in capsys.readouterr().err


def test_a_student_of_a_network_that_diffusers_lacks_is_not_exported(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(commands, "low_rank")  # which takes its time
    for flags in ([], ["--lora", "2"]):
        assert main(["export", str(finished), "--to", str(tmp_path / "x"), *flags]) == 2
        assert "MLP is no network that diffusers has" in capsys.readouterr().err


def test_a_run_on_points_says_how_it_is_sampled_and_what_of_it_is_inverted(tmp_path, capsys, one_device):
    path = tmp_path / "plane.py"
    path.write_text(PLANE)
    run, file, out = str(tmp_path / "run"), str(tmp_path / "x.npz"), str(tmp_path / "out.npz")
    assert main(["distill", str(path), "--workdir", run]) == 0
    assert f"ddistill sample {run} --out samples.npz" in capsys.readouterr().err
    x = np.zeros((2, 2), np.float32)
    for arrays, words in (
        ({"x": x * np.nan, "labels": np.array([0, 1])}, "x holds NaN or infinity"),
        (
            {"x": x, "labels": np.array([0, 9])},
            "labels [N] from 0 to 1; the file holds x float32 [2, 2], labels int64 [2] from 0 to 9",
        ),
    ):
        np.savez(file, **arrays)
        assert main(["invert", run, "--teacher", "--steps", "1", "--input", file, "--out", out]) == 2
        assert words in capsys.readouterr().err


PLANE = """
from dataclasses import dataclass
import numpy as np
from ddistill import Experiment
from ddistill.config import Data, MLPNetwork, Teacher
from ddistill.methods import Consistency

@dataclass(frozen=True)
class Plane:
    def load(self):
        return Data({"x": np.zeros((8, 2), np.float32), "cond": np.arange(8) % 2}, (2,), 2)

def experiment():
    network = MLPNetwork(width=8, blocks=1)
    return Experiment("plane", Consistency(), Plane(), network=network, teacher=Teacher(steps=1), steps=1, batch_size=8)
"""


def test_a_table_through_a_pipe_says_its_rows_as_they_come_and_ends_its_last_line(capsys):
    table = Table("sampler", "NFE")
    with pytest.raises(KeyboardInterrupt), growing(table) as update:
        table.add_row("student", "2")
        update(table)
        assert capsys.readouterr().err == "sampler student, NFE 2\n"
        raise KeyboardInterrupt
    told = capsys.readouterr().out
    assert told.count("student") == 1 and told.endswith("\n")


def test_the_flags_of_an_experiment_are_listed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["distill", str(EXPERIMENT), "--help"])
    told = capsys.readouterr().out
    assert exit.value.code == 0 and "--optimizer.learning-rate" in told and "--method.intervals" in told
    assert "after the warm-up. (default: " in told and "fixed" not in told
    assert "For --workdir and all that is not of the experiment: ddistill distill --help" in " ".join(told.split())


def test_evaluate_prints_and_writes_the_table_with_its_floor(finished, tmp_path, capsys, monkeypatch):
    for flags, words in ((["--samples", "5"], "--samples 5: at least 20"), (["--steps", "0"], "--steps 0: at least 1")):
        assert main(["evaluate", str(finished), *flags]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(commands.judged, "COUNT", 20)
    file = tmp_path / "table.json"
    assert main(["evaluate", str(finished), "--steps", "1", "2", "--seed", "3", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["flags"] == ["--steps", "1", "2", "--seed", "3"]
    rows = json.loads(file.read_text())["rows"]
    assert [(r["sampler"], r["nfe"]) for r in rows] == [
        ("held-out scans (floor)", None),
        ("teacher, Heun", 35),
        ("teacher, Euler", 2),
        ("teacher, Euler", 1),
        ("student", 1),
        ("student", 2),
    ]
    # Known of the scans: an RBF-SVM is right on 99 % of those held out, and Fréchet there is about 1.
    assert rows[0]["accuracy"] > 0.97 and 0.8 < rows[0]["frechet"] < 1.2
    assert all(r["frechet"] > 5 * rows[0]["frechet"] for r in rows[1:]), "two steps train nothing"
    assert all(0 <= r[k] <= 1 for r in rows for k in ("accuracy", "precision", "recall"))
    told = capsys.readouterr().out
    assert "floor" in told and "Fréchet" in told


def test_quickstart_leaves_an_ordinary_run_with_pictures_and_numbers(tmp_path, monkeypatch, one_device):
    monkeypatch.setattr(commands.judged, "COUNT", 20)
    out = tmp_path / "quick"
    assert main(["quickstart", "--out", str(out), *TINY]) == 0
    assert Image.open(out / "samples.png").size[0] > 20 * 40
    assert Image.open(out / "loss.png").size[0] > 500
    assert len(json.loads((out / "metrics.json").read_text())["rows"]) == 8
    assert main(["sample", str(out), "--out", str(tmp_path / "more.png")]) == 0


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupt)
    assert main(["distill", "x.py"]) == 130
    assert "The same command goes on" in capsys.readouterr().err


def test_methods_lists_all_with_their_files(capsys):
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    for name, entry in METHODS.items():
        assert name in told and entry.file in told
        assert (Path(ddistill.__file__).parents[1] / entry.file).is_file()


def _row(method, sw2):
    return {
        "mixture": "grid25", "method": method, "steps": 1, "nfe": 1, "seed": 0, "endpoint": None, "sw2": sw2,
        "floor_sw2": 0.02, "precision": 0.9, "recall": 1.0, "weights": 0.001, "ll_gap": float("inf"), "wall_s": 1.0,
    }  # fmt: skip


def test_bench_prints_the_floor_first_and_keeps_its_rows_when_interrupted(tmp_path, monkeypatch, capsys):
    asked = []

    def bench(names, mixtures, seeds, have, jobs, keep):
        asked.append((tuple(names), tuple(mixtures), seeds, len(have), jobs, keep.name))
        yield _row("teacher/euler", 0.04)
        yield _row("kd", 0.03)
        raise KeyboardInterrupt

    monkeypatch.setattr(leaderboard, "leaderboard", bench)
    file = tmp_path / "rows.json"
    argv = ["bench", "exact", "--methods", "kd,consistency", "--mixture", "grid25", "--seeds", "2", "--json", str(file)]
    argv += ["--jobs", "3"]
    assert main(argv) == 130
    assert main(argv) == 130
    assert asked == [(("kd", "consistency"), ("grid25",), 2, before, 3, "rows-samples") for before in (0, 2)]
    rows = json.loads(file.read_text())["rows"]
    assert [r["method"] for r in rows] == 2 * ["teacher/euler", "kd"]
    assert rows[0]["ll_gap"] is None and rows[0]["endpoint"] is None
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if "│" in line]
    assert "floor" in lines[0] and "1.00" in lines[0] and "2.00" in lines[1] and "1.50" in lines[2]
    assert str(file) in err


def test_bench_runs_all_mixtures_and_methods_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(leaderboard, "leaderboard", lambda *a: iter(asked.append(a) or ()))
    assert main(["bench", "exact"]) == 0
    assert asked == [(list(METHODS), ("ring8", "grid25", "digits"), 1, [], 1, None)]


def test_bench_writes_all_rows_as_a_page_and_refuses_a_file_that_is_not_its_own(tmp_path, monkeypatch, capsys):
    rows = [{**_row("kd", sw2), "seed": seed, "w": None} for seed, sw2 in enumerate((0.03, 0.05))]
    monkeypatch.setattr(leaderboard, "leaderboard", lambda *a: iter(rows))
    page, file = tmp_path / "exact.md", tmp_path / "rows.json"
    argv = ["bench", "exact", "--methods", "kd", "--mixture", "grid25", "--seeds", "2", "--json", str(file)]
    assert main([*argv, "--page", str(page)]) == 0
    assert "| kd | 1 | 1 | 2 | – | 0.0400 ± 0.0141 | 0.900 ± 0.000 | 1.000 ± 0.000 |" in page.read_text("utf-8")
    file.write_text("[]")
    assert main(argv) == 2
    assert "not a file that this command wrote" in capsys.readouterr().err
    assert file.read_text() == "[]"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "kd,magic"], ["no method magic", "consistency"]),
        (["--methods", ","], ["no method is named", "known are kd"]),
        (["--methods", "KD"], ["no method KD, did you mean kd?", "known are kd"]),
        (["--mixture", "ring9"], ["no mixture 'ring9'", "ring8, grid25, digits"]),
        (["--seeds", "0"], ["--seeds 0", "at least 1"]),
        (["--jobs", "0"], ["--jobs 0", "at least 1"]),
    ],
)
def test_wrong_requests_to_bench_get_words(capsys, flags, words):
    assert main(["bench", "exact", *flags]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words)


def test_the_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "ddistill", "sample"], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 2 and "RUN" in done.stderr
