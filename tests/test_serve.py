"""The page on which a student is sampled beside its teacher."""

import dataclasses
import importlib.util
import math
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_runs import TINY

from ddistill.cli import Serve, main
from ddistill.cli import serve as served
from ddistill.cli.serve import Asked, Drawn, asked_of, drawer, page, words
from ddistill.evaluate.samplers import start, student_sampler, teacher_sampler
from ddistill.integrators import dpmpp_2m
from ddistill.runs import Opened, distil

pytestmark = pytest.mark.usefixtures("one_device")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def opened(one_device):
    return Opened(TINY, TINY.data.load(), *distil(TINY))


@pytest.fixture(scope="module")
def draw(opened):
    return drawer(opened, most=8, most_steps=9)


def test_student_and_teacher_are_those_of_sample_from_the_same_noise(opened, draw):
    student, teacher = draw(Asked(steps=2, teacher_steps=3, n=5, seed=4))
    noise, labels, key = start(TINY.process, (2,), 2, 5, 4)
    made = TINY.method(TINY.process)
    want = student_sampler(opened.student, made, TINY.process, 2).draw(noise, labels, key)
    np.testing.assert_array_equal(student.x, want.x)
    want = teacher_sampler(opened.teacher, TINY.process, dpmpp_2m, 3, "").draw(noise, labels, key)
    np.testing.assert_array_equal(teacher.x, want.x)
    assert student.first is not None and student.seconds > 0  # the first call compiled
    again, _ = draw(Asked(steps=2, teacher_steps=3, n=5, seed=5, label=1))
    assert again.first is None and not np.array_equal(again.x, student.x)


def test_prompts_are_encoded_by_encoders_that_are_read_once_and_know_the_size_of_pictures(opened, draw, monkeypatch):
    read, given = [], []

    def encoder(models, side):
        read.append((models, side))
        return lambda texts: given.append(texts) or jnp.ones(len(texts), jnp.int32)

    monkeypatch.setattr(served, "prompt_encoder", encoder)
    data = dataclasses.replace(opened.data, null=0, to_unit=lambda x: np.zeros((len(x), 64, 64, 3)))
    prompted = drawer(opened._replace(data=data), most=8, most_steps=9, models=Path("pipeline"))
    for n in (3, 2):
        student, _ = prompted(Asked(steps=2, n=n, prompt="a cat"))
        np.testing.assert_array_equal(student.x, draw(Asked(steps=2, n=n, label=1))[0].x)
    assert read == [(Path("pipeline"), 64)] and given == [["a cat"] * 3, ["a cat"] * 2]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="prompts are encoded by the pipeline .* --models FOLDER"):
        drawer(opened._replace(data=data), most=8, most_steps=9)


def test_latents_are_shown_by_the_autoencoder_that_evaluate_takes_whose_pipeline_encodes_prompts(opened, monkeypatch):
    shown, autoencoder = [], lambda x: np.ones((len(x), 64, 64, 3))
    monkeypatch.setattr(served, "open_run", lambda folder: opened)
    monkeypatch.setattr(served, "models_of", lambda opened, given: given or Path("own"))
    monkeypatch.setattr(served, "decoder", lambda opened, folder: folder and autoencoder)

    def page(opened, models, most, most_steps):
        shown.append((opened.data.to_unit, models))
        return most, most_steps

    at = []
    monkeypatch.setattr(served, "page", page)
    monkeypatch.setattr(served, "launch", lambda *args, **options: at.append((*args, options)))
    assert main(["serve", "run", "--models", "vae"]) == 0
    assert main(["serve", "run", "--most", "3", "--most-steps", "5", "--host", "0.0.0.0", "--port", "81"]) == 0
    assert shown == [(autoencoder, Path("vae")), (autoencoder, Path("own"))]
    assert at[0][1] == "127.0.0.1" and at[1] == ((3, 5), "0.0.0.0", 81, {"wait": True})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"n": 9}, "9 samples: this page gives 1 to 8"),
        ({"n": 0}, "0 samples"),
        ({"steps": 10}, "10 steps of the student: this page gives 1 to 9"),
        ({"teacher_steps": 0}, "0 steps of the teacher"),
        ({"seed": -1}, "the seed is -1"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"label": 2}, "the label is 2: labels are 0 to 1"),
        ({"guidance": 3.0}, "guidance = 3.0: this student's guidance is built in"),
        ({"guidance": math.nan}, "guidance is nan: give a scale up to 1000"),
        ({"guidance": -math.inf}, "guidance is -inf"),
    ],
)
def test_what_is_out_of_range_is_told_in_words(draw, asked, told):
    with pytest.raises(ValueError, match=told):
        draw(Asked(**{"n": 4, **asked}))


def test_latency_in_words():
    x = np.zeros((4, 2))
    assert words("student", 1, Drawn(x, 0.02, None)) == "student, 1 step: 20.0 ms, 5.00 ms per sample"
    assert words("t", 2, Drawn(x, 0.02, 3.0)).endswith("; the first call, with compilation, took 3.00 s")


@pytest.mark.parametrize(("field", "value"), [("steps", math.inf), ("seed", None), ("n", math.nan), ("gamma", "")])
def test_fields_that_hold_no_number_are_told_in_words(field, value):
    fields = {"steps": 1, "teacher_steps": 2, "n": 3, "seed": 0, "gamma": 0.5, "guidance": None, "label": "all"}
    assert asked_of(**fields, prompt=None) == Asked(1, 2, 3, 0, 0.5)
    assert asked_of(**{**fields, "guidance": 2, "label": "1"}, prompt="a") == Asked(1, 2, 3, 0, 0.5, 2.0, 1, "a")
    with pytest.raises(ValueError, match="every number of the page has to be given, and to be finite"):
        asked_of(**{**fields, field: value}, prompt="")


@pytest.mark.parametrize("flags", [["--most", "0"], ["--most-steps", "0"], ["--port", "0"]])
def test_flags_out_of_range(flags, capsys):
    assert main(["serve", "nowhere", *flags]) == 2
    assert " ".join(flags) in capsys.readouterr().err


def test_without_gradio_words_say_what_to_install(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'ddistill\[serve\]'"):
        page(opened, most=4, most_steps=4)


@needs_gradio
def test_the_page_answers_on_loopback_and_asks_nobody_else(opened):
    import httpx

    assert Serve.host == "127.0.0.1"
    blocks = page(opened, most=4, most_steps=4)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    try:
        url = served.launch(blocks, "127.0.0.1", None, wait=False)
        text = httpx.get(url, timeout=60).text
        assert url.startswith("http://127.0.0.1:")
        assert "tiny" in text and not blocks.share and not blocks.analytics_enabled
        assert "fonts.googleapis" not in text.replace('href="https://fonts.googleapis.com" crossorigin', "")

        def call(**changed):
            given = {"steps": 1, "teacher_steps": 2, "n": 3, "seed": 0, "gamma": 0, "guidance": 1, "label": "1"}
            data = [*{**given, **changed}.values(), ""]
            event = httpx.post(f"{url}gradio_api/call/sample", json={"data": data}, timeout=60).json()["event_id"]
            return httpx.get(f"{url}gradio_api/call/sample/{event}", timeout=60).text

        told = call()
        assert "event: complete" in told and "student, 1 step: " in told and "teacher, DPM-Solver++(2M), 2 s" in told
        assert "event: error" in call(n=5)
    finally:
        blocks.close()
