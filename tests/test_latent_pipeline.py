"""experiments/latent_pipeline.py at small size: photographs to students that diffusers samples, without a network."""

import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest

from ddistill.hub.load import load_network
from ddistill.runs import open_run, read_metrics

FILE = Path(__file__).parents[1] / "experiments" / "latent_pipeline.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_device):
    """The folder that the script wrote, and how far diffusers' pictures are from ddistill's; nothing is downloaded."""
    spec = importlib.util.spec_from_file_location("latent_pipeline", FILE)
    script = importlib.util.module_from_spec(spec)
    work = tmp_path_factory.mktemp("latent")

    def refused(*_):
        raise AssertionError("the pipeline asked for a network connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refused)
        spec.loader.exec_module(script)
        return work, script.pipeline(work, script.SMALL)


def test_photographs_become_a_teacher_and_exported_students(made):
    work, _ = made
    classes = sorted(path.name for path in (work / "patches").iterdir())
    assert {"china", "flower"} <= set(classes)
    index = json.loads((work / "teacher" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    for name in ("lora", "dmd"):
        opened = open_run(work / name)
        assert set(read_metrics(work / name)) == {"student"} and opened.data.num_classes == len(classes)
        export = work / f"{name}-diffusers"
        assert sorted(p.name for p in export.iterdir()) == [
            "README.md", "model_index.json", "scheduler", "transformer", "vae"
        ]  # fmt: skip
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (export / "vae" / file).read_bytes() == (work / "vae" / file).read_bytes()
        back, moved = load_network(export), 0
        for path, p in opened.student.params.items():
            if not path.startswith(("target.", "guidance.")) and not path.endswith("timestep_embedder.linear_2.bias"):
                np.testing.assert_array_equal(back.params[path], p)  # that bias took up what the student reads of s
                moved += bool(np.any(p != opened.teacher.params[path]))
        assert moved > 5


def test_latents_of_the_patches_have_unit_variance(made):
    work, _ = made
    data = open_run(work / "dmd").data
    x = data.source(32, 0, 0.0)(0)["x"]
    assert x.shape == (32, 8, 8, 4) and abs(x.std() - 1) < 0.1


def test_the_table_has_a_row_for_each_sampler_and_the_sheet_too(made):
    work, _ = made
    rows = [line.split("|")[1:-1] for line in (work / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert " ".join(row[0].strip() + row[1].strip() for row in rows[3:]) == ("teacher20 teacher1 lora1 lora4 dmd1")
    assert all(0 < float(value) < np.inf for row in rows[1:] for value in row[2:4])
    assert (work / "samples.png").stat().st_size > 1000


@pytest.mark.torch
def test_diffusers_draws_the_same_pictures_from_the_same_noise(made):
    pytest.importorskip("torch")
    _, agreed = made
    assert set(agreed) == {"lora", "dmd"} and all(difference < 1e-4 for difference in agreed.values())
