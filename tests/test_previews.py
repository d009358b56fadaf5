"""Previews while a run trains: what they show, and that training does not notice them."""

import dataclasses
import importlib.util
import io
import json
import os
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from test_runs import TINY

from ddistill import log as logs
from ddistill import sharding
from ddistill.config import Data
from ddistill.evaluate.samplers import Sampler, start, student_sampler
from ddistill.integrators import Solution
from ddistill.log import RunLog, Silent
from ddistill.previews import drawn, looks_of, measured, picture
from ddistill.runs import distil, read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
SEEN = dataclasses.replace(TINY, preview_every=2, preview_samples=10)


@pytest.fixture(scope="module")
def seen(tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp("seen")
    return folder, distil(SEEN, folder)


def test_training_does_not_notice_that_it_is_looked_at(seen):
    plain = distil(TINY)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(seen[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pictures_and_numbers_are_in_the_runs_folder(seen):
    folder, _ = seen
    pictures = sorted(str(p.relative_to(folder / "previews")) for p in (folder / "previews").rglob("*.png"))
    assert pictures == [
        "student/00000002-1-step.png", "student/00000002-4-steps.png",
        "student/00000004-1-step.png", "student/00000004-4-steps.png",
        "student/00000005-1-step.png", "student/00000005-4-steps.png",
        "teacher/00000002-8-steps.png", "teacher/00000003-8-steps.png",
    ]  # fmt: skip
    assert Image.open(folder / "previews" / pictures[0]).size == (256, 256)
    rows = [json.loads(line) for line in (folder / "previews" / "numbers.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("teacher", 2), ("teacher", 3), ("student", 2), ("student", 4), ("student", 5)
    ]  # fmt: skip
    assert set(rows[-1]) == {
        "stage", "step", *(f"{m}/{n}" for m in ("finite", "mean", "spread", "frechet") for n in ("1-step", "4-steps"))
    }  # fmt: skip
    # The rows of losses are as without previews, and the plain log names the last picture.
    assert [row["step"] for row in read_metrics(folder)["student"]] == [1, 2, 3, 4, 5]
    assert "student 5/5" in (text := (folder / "log.txt").read_text()) and pictures[5] in text
    events = b"".join(p.read_bytes() for p in (folder / "events").iterdir())
    assert b"student/preview/frechet/4-steps" in events and b"student/4-steps" in events


def test_the_last_preview_is_of_the_student_that_the_run_ends_with(seen):
    data, log = TINY.data.load(), Silent()
    student = seen[1].student
    looks = looks_of(data, TINY.process, [_stage()], sharding.make_mesh(), log, 10, 4, 0)  # in batches of 4, 4 and 2
    looks["student"](5, student)
    ((_, step, numbers, _),) = log.previews
    noise, labels, key = start(TINY.process, data.shape, 2, 10, 0)
    x = student_sampler(student, TINY.method(TINY.process), TINY.process, 1).draw(noise, labels, key).x
    real = data.source(10, 0, 0.0)(0)["x"]
    assert step == 5
    for name, value in measured(np.asarray(x), real).items():
        assert numbers[f"{name}/1-step"] == pytest.approx(value, rel=1e-4)
    with pytest.raises(ValueError, match="preview_samples = 1: at least 2"):
        looks_of(data, TINY.process, [], sharding.make_mesh(), log, 1, 4, 0)


def _stage():
    from ddistill.runs import stages

    return stages(TINY, TINY.data.load())[-1]


def test_samples_come_in_batches_of_one_size_and_in_order():
    sizes = []

    def draw(noise, cond, key):
        sizes.append(len(noise))
        return Solution(noise + cond[:, None], 1)

    noise, cond = np.arange(10.0)[:, None], 100 * np.arange(10.0)
    x = drawn(Sampler("s", draw), noise, cond, jax.random.key(0), 4)
    np.testing.assert_array_equal(x[:, 0], 101 * np.arange(10))
    assert sizes == [4, 4, 4]


def test_measures_against_what_moments_give():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((500, 3))
    variance = real.var(axis=0).mean()
    assert measured(real, real) == pytest.approx({"finite": 1, "mean": 0, "spread": 1, "frechet": 0}, abs=1e-9)
    moved = measured(2 * (real - real.mean(axis=0)) + real.mean(axis=0) + [3.0, 0, 0], real)
    assert moved["spread"] == pytest.approx(2) and moved["mean"] == pytest.approx(np.sqrt(3 / variance))
    # Gaussians with covariances C and 4 C, means 3 apart: 9 + tr C, over tr C; C is that of n - 1.
    trace = real.var(axis=0, ddof=1).sum()
    assert moved["frechet"] == pytest.approx((9 + trace) / (3 * variance))
    broken = real.copy()
    broken[:100] = np.nan
    assert measured(broken, real)["finite"] == 0.8 and np.isfinite(measured(broken, real)["frechet"])
    assert measured(np.full((5, 3), np.inf), real) == {"finite": 0.0}
    assert "frechet" not in measured(np.ones((4, 2000)), np.ones((4, 2000)))


def test_pictures_of_images_latents_and_points():
    data = Data({}, (8, 8, 1), 0)
    x = np.full((5, 8, 8, 1), -1.0)
    x[1] = 1
    x[2] = np.nan
    grid = picture(x, data, x)
    assert grid.shape == (2 * 32, 3 * 32, 1) and grid.dtype == np.uint8
    assert (grid[:32, 32:64] == 255).all() and (grid[:32, :32] == 0).all()
    assert picture(np.zeros((4, 8, 8, 16)), data, x).shape == (64, 64, 1)
    assert picture(np.zeros((4, 8, 8, 3)), data, x).shape == (64, 64, 3)
    real = np.array([[-1.0, -1], [1, 1]])
    page = picture(np.array([[1.0, -1], [np.nan, 0], [99, 0]]), data, real)[..., 0]
    y, x = np.nonzero(page == 0)
    # A frame of [-1.5, 1.5] on 256 pixels: 1 lies at 213, -1 at 42, from below; far points at the edge.
    assert set(zip(y.tolist(), x.tolist(), strict=True)) >= {(255 - 42, 213), (127, 254)}
    assert len(y) == 8 and (page == 200).sum() == 8


def test_a_terminal_shows_losses_goodput_and_the_last_preview(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(logs.sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "250")
    with RunLog(tmp_path) as log:
        log.start("student", 0, 10)
        log.metrics(5, {"student/loss": 0.25, "critic/loss": 0.5, "failing": 0})
        log.spent(5, {"began": 0.0, "first": 0, "steps": 3.0, "compile": 1.0})
        log.preview(5, {"spread/1-step": 0.5}, {"1-step": np.zeros((4, 4, 3), np.uint8)})
        log.progress(5)
        log.stop()
    told = terminal.getvalue()
    for words in ("student", "5/10", "student/loss 0.25", "critic/loss 0.5", "goodput 75%", "00000005-1-step.png"):
        assert words in told
    assert "spread/1-step 0.5" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_is_told_offline_and_later_starts_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    with RunLog(tmp_path, wandb="distil", name="tiny") as log:
        log.start("student", 0, 10)
        log.metrics(5, {"student/loss": 0.25})
        log.preview(5, {"spread/1-step": 0.5}, {"1-step": np.zeros((4, 4, 3), np.uint8)})
    run = (tmp_path / "wandb.txt").read_text()
    (written,) = (tmp_path / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb")
    for _ in range(100):  # a process of wandb's own writes it, and may be behind
        if b"student/preview/spread/1-step" in written.read_bytes():
            break
        time.sleep(0.1)
    content = written.read_bytes()
    assert b"student/preview/spread/1-step" in content and b"distil" in content
    assert list(written.parent.rglob("*.png"))


def test_without_wandb_words_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'ddistill\[wandb\]'"):
        RunLog(tmp_path, wandb="p")
    assert os.listdir(tmp_path) == []
