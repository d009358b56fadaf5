"""Runs on latents and with prompts on the page of a report: decoded and conditioned as `ddistill evaluate` has them."""

import base64
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_encode import Squares, autoencoder, texts

from ddistill.cli import main, networks
from ddistill.data.latents import encode
from ddistill.evaluate.samplers import start, student_sampler
from ddistill.networks.conditions import Prompt
from ddistill.runs import open_run

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
coder = autoencoder  # a fixture: its encoder, its decoder, its pipeline's folder

EXPERIMENT = """
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ddistill import Experiment
from ddistill.config import Data, Teacher
from ddistill.datasets import LatentFolder
from ddistill.integrators import euler
from ddistill.losses.distances import L2
from ddistill.methods import Consistency
from ddistill.net import Net


@dataclass(frozen=True)
class Pixels:
    shape: tuple[int, ...] = (8, 8, 1)

    def load(self):
        x = np.random.default_rng(0).uniform(-1, 1, (9, *self.shape)).astype(np.float32)
        return Data({"x": x, "cond": np.arange(9) // 3}, self.shape, 3)


@dataclass(frozen=True)
class Reader:
    def build(self, data, process, key):
        def read(params, rest, x, t, cond, *, s, key):
            told = cond.states.mean((1, 2))[:, None, None, None] if hasattr(cond, "states") else 0
            return params["w"] * jnp.tanh(x) + 0.2 * told - 0.4

        return Net({"w": jnp.full((), 0.3)}, {}, read)


def experiment():
    return Experiment(
        "latents", Consistency(intervals=4, max_intervals=8, solver=euler, distance=L2()), DATA,
        network=Reader(), teacher=Teacher(steps=2), steps=2, batch_size=8,
    )
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_device, coder):
    """Three finished runs: on latents with prompts that know their autoencoder, and that do not, and on pixels."""
    folder, models = tmp_path_factory.mktemp("runs"), coder[2]
    encode(
        folder / "latents", Squares(6, ()), lambda x: {"x": jnp.repeat(x, 3, -1)}, names=list("abcdef"),
        made={"num_classes": 0}, prompts=["x" * i for i in range(6)], texts=texts,
    )  # fmt: skip
    there = f"LatentFolder({str(folder / 'latents')!r}"
    for name, data in (("known", f"{there}, models={str(models)!r})"), ("lost", f"{there})"), ("pixels", "Pixels()")):
        (folder / f"{name}.py").write_text(EXPERIMENT.replace("DATA", data), encoding="utf-8")
        assert main(["distill", str(folder / f"{name}.py"), "--workdir", str(folder / "runs" / name)]) == 0
    return folder / "runs"


def page_of(out, *argv):
    """The text of a report, and its sheets as arrays by group, sampler and steps."""
    assert main(["report", *map(str, argv), "--out", str(out), "--steps", "2", "--samples", "4"]) == 0
    text = (out / "index.html").read_text(encoding="utf-8")
    begin = text.index('id="data">') + len('id="data">')
    groups = json.loads(text[begin : text.index("</script>", begin)])["groups"]
    return text, [
        {(one["label"], steps): tiles(sheet) for one in group["drawn"] for steps, sheet in one["steps"].items()}
        for group in groups
    ]


def tiles(sheet):
    """The four images of a sheet, without the gaps of one pixel between them."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet["src"].partition(",")[2]))))[..., :-1]
    return np.stack([pixels[y : y + 8, x : x + 8] for y in (0, 9) for x in (0, 9)]).astype(float)


def decoded(coder, z):
    return 255 * (np.clip(coder[1](np.asarray(z) / 0.5 + 0.1), -1, 1) + 1) / 2


def students(folder, cond):
    """What the student of a run draws with two steps."""
    opened = open_run(folder)
    process = opened.experiment.process
    noise, _, key = start(process, (4, 4, 3), 0, 4, 0)
    return student_sampler(opened.student, opened.experiment.method(process), process, 2).draw(noise, cond, key).x


def test_latents_are_decoded_by_the_runs_autoencoder_and_have_the_prompts_of_their_data(runs, coder, tmp_path):
    text, (sheets,) = page_of(tmp_path, runs / "known")
    batch = open_run(runs / "known").data.source(4, 0, 0.0)(0)
    want = students(runs / "known", batch["cond"])
    np.testing.assert_allclose(sheets["known", "2"], decoded(coder, want), atol=1)
    np.testing.assert_allclose(sheets["data", "0"], decoded(coder, batch["x"]), atol=1)
    other = students(runs / "known", Prompt(np.zeros((4, 2, 3)), pooled=np.zeros((4, 1))))
    assert np.abs(decoded(coder, other) - sheets["known", "2"]).max() > 10
    assert "Samples are of prompts of the data." in text


def test_prompts_that_are_given_are_encoded_by_the_runs_pipeline(runs, coder, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(networks, "open_prompts", lambda folder: read.append(folder) or (lambda words, _: texts(words)))
    monkeypatch.setattr(networks, "read_json", lambda *_: {"_class_name": "StableDiffusionPipeline"})
    (tmp_path / "prompts.txt").write_text("x\nxxx\n", encoding="utf-8")
    text, (known, pixels) = page_of(
        tmp_path, runs / "known", runs / "pixels", "--prompts", tmp_path / "prompts.txt", "--seed", "0"
    )
    want = decoded(coder, students(runs / "known", texts(["x", "xxx", "x", "xxx"])))
    np.testing.assert_allclose(known["known", "2"], want, atol=1)
    assert read == [coder[2]] and ("pixels", "2") in pixels
    assert "Samples are of the given prompts in turn." in text
    assert f"--samples 4 --prompts {tmp_path / 'prompts.txt'} --out {tmp_path}" in text


def test_sample_decodes_latents_and_takes_the_datas_prompts_or_those_given(runs, coder, tmp_path, monkeypatch, capsys):
    def sample(name, out, *flags):
        return main(["sample", str(runs / name), "--out", str(tmp_path / out), "--n", "4", "--steps", "2", *flags])

    batch = open_run(runs / "known").data.source(4, 0, 0.0)(0)
    want = students(runs / "known", batch["cond"])
    assert sample("known", "a.npz") == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["x"], want, atol=1e-5)
    monkeypatch.setattr(networks, "open_prompts", lambda folder: lambda words, _: texts(words))
    monkeypatch.setattr(networks, "read_json", lambda *_: {"_class_name": "StableDiffusionPipeline"})
    (tmp_path / "prompts.txt").write_text("x\nxxx\n", encoding="utf-8")
    assert sample("known", "b.npz", "--prompts", str(tmp_path / "prompts.txt")) == 0
    given = np.load(tmp_path / "b.npz")["x"]
    np.testing.assert_allclose(given, students(runs / "known", texts(["x", "xxx", "x", "xxx"])), atol=1e-5)
    assert np.abs(given - want).max() > 0.1
    assert sample("known", "c.png") == 0
    pixels = np.asarray(Image.open(tmp_path / "c.png")).astype(float)
    assert pixels.shape == (2 * 32, 2 * 32, 3)  # four times as large, so that it can be seen
    first = decoded(coder, want)[0]
    np.testing.assert_allclose(pixels[:32:4, :32:4], first, atol=1)
    assert sample("lost", "d.png") == 2
    assert "samples are latents: give the folder of their autoencoder, --models" in " ".join(
        capsys.readouterr().err.split()
    )
    assert sample("lost", "d.png", "--models", str(coder[2])) == 0


def test_what_cannot_be_decoded_or_encoded_is_told_in_words_and_the_rest_is_shown(runs, tmp_path, coder):
    text, (lost, pixels) = page_of(tmp_path / "a", runs / "lost", runs / "pixels")
    assert "samples are latents: give the folder of their autoencoder, --models FOLDER" in text
    assert not lost and ("pixels", "2") in pixels
    models = coder[2]
    text, (lost, again) = page_of(tmp_path / "b", runs / "lost", runs / "pixels", "--models", models)
    assert lost["lost", "2"].shape == (4, 8, 8, 3) and "samples are latents" not in text
    np.testing.assert_array_equal(again["pixels", "2"], pixels["pixels", "2"])  # which nothing decodes
    text, (lost, _) = page_of(tmp_path / "c", runs / "known", runs / "pixels", "--models", tmp_path / "gone")
    assert not lost and f"{tmp_path / 'gone'} has no config.json" in text
    (tmp_path / "prompts.txt").write_text("x\n", encoding="utf-8")
    text, (lost, _) = page_of(tmp_path / "d", runs / "known", runs / "pixels", "--prompts", tmp_path / "prompts.txt")
    assert not lost and "model_index.json, the index of a pipeline" in text and str(runs / "known") in text


def test_images_of_the_data_are_of_classes_in_turn(runs, tmp_path):
    _, (sheets,) = page_of(tmp_path, runs / "pixels")
    x = np.random.default_rng(0).uniform(-1, 1, (9, 8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(sheets["data", "0"], np.rint(255 * (x[[0, 3, 6, 1]] + 1) / 2))
