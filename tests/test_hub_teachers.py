"""Imported teachers: what the import writes and refuses, and experiments on them."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from hub_folders import DDIM, DIT, FLOW, assert_trees_equal, tensors_for, write_model, write_pipeline

from ddistill.cli import main
from ddistill.config import Data, Experiment, Imported, resolved
from ddistill.hub.load import load_network, open_diffusion
from ddistill.hub.teachers import check_teacher, import_teacher
from ddistill.hub.tensors import open_tensors
from ddistill.integrators import ddim
from ddistill.log import Silent
from ddistill.methods import Consistency
from ddistill.process import cosine
from ddistill.runs import distil, open_run, stages

SMALL = {**DIT, "num_layers": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "pipeline"
    write_pipeline(folder, SMALL)
    write_model(folder / "vae", {"_class_name": "AutoencoderKL"}, {"a": np.ones(2, np.float32)})
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture(scope="module")
def teacher(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "dit"
    assert main(["import", str(pipeline), "--to", str(folder)]) == 0
    return folder


def test_an_import_is_a_copy_of_what_is_safe(pipeline, teacher, capsys):
    files = sorted(str(p.relative_to(teacher)) for p in teacher.rglob("*") if p.is_file())
    assert files == [
        "model_index.json", "scheduler/scheduler_config.json", "teacher.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    summary = check_teacher(teacher)
    assert summary.parameters == sum(a.size for a in tensors_for(SMALL).values())
    record = json.loads((teacher / "teacher.json").read_text())
    assert (record["class"], record["parameters"]) == ("DiT", summary.parameters)
    assert_trees_equal(load_network(teacher), load_network(pipeline))
    assert main(["import", str(pipeline), "--to", str(teacher)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_variants_and_shards_are_copied_under_plain_names(pipeline, tmp_path):
    source = tmp_path / "p"
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors_for(SMALL).items()}
    write_pipeline(source, SMALL, FLOW, {"w": np.zeros(1, np.float32)})  # the plain weights are of something else
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model.bf16-0000{i + 1}-of-00002.safetensors"
        write_model(source / "transformer", SMALL, {n: tensors[n] for n in part}, file)
        where |= dict.fromkeys(part, file)
    index = source / "transformer" / "diffusion_pytorch_model.safetensors.index.bf16.json"
    index.write_text(json.dumps({"weight_map": where}))
    import_teacher(source, tmp_path / "t", variant="bf16")
    copied = open_tensors(tmp_path / "t" / "transformer")
    assert [f.name for f in copied.files] == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        np.testing.assert_array_equal(np.asarray(copied[name]), tensors[name])


def test_an_import_that_fails_leaves_nothing(pipeline, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad"
    write_pipeline(bad, SMALL, DDIM, {"w": np.zeros(1, np.float32)})
    assert main(["import", str(bad), "--to", str(tmp_path / "t")]) == 2
    assert "not expected: w [1]" in capsys.readouterr().err

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfile", full)
    assert main(["import", str(pipeline), "--to", str(tmp_path / "t")]) == 2
    assert "no space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
    assert main(["import", "no such thing", "--to", str(tmp_path / "t")]) == 2
    assert "neither a folder nor an id of the hub" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["import", "nobody/nothing", "--to", str(tmp_path / "t")]) == 2
    assert "the hub does not give a model of that id" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Squares:
    """Pictures in five classes."""

    def load(self) -> Data:
        x = np.random.default_rng(0).standard_normal((32, 4, 4, 3)).astype(np.float32)
        return Data({"x": x, "cond": np.arange(32, dtype=np.int32) % 5}, (4, 4, 3), 5)


def experiment(teacher, **changes):
    method = Consistency(intervals=2, max_intervals=2, solver=ddim)
    e = Experiment(
        "e", method, Squares(), network=Imported(teacher), steps=2, batch_size=8, log_every=1, guidance=1.5
    )  # fmt: skip
    return dataclasses.replace(e, **changes)


def test_an_experiment_distils_an_imported_teacher_in_its_own_process(teacher, tmp_path):
    e = experiment(teacher)
    process = open_diffusion(teacher)[0]
    assert resolved(e).process == process and resolved(resolved(e)) == resolved(e)
    assert [stage.name for stage in stages(resolved(e), e.data.load())] == ["student"]
    log = Silent()
    done = distil(e, tmp_path / "run", log)
    assert {row["stage"] for row in log.rows} == {"student"}
    assert_trees_equal(done.teacher, load_network(teacher, mesh=None))
    opened = open_run(tmp_path / "run", e)
    assert_trees_equal(opened.student, done.student)
    assert opened.experiment.process == process
    moved = {n for n, w in done.student.params.items() if np.any(w != done.teacher.params[n])}
    assert "proj_out_2.kernel" in moved and "target.linear.kernel" in moved
    with pytest.raises(ValueError, match="brings its own process: leave process out"):
        distil(experiment(teacher, process=cosine()))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        distil(experiment(tmp_path / "nowhere"))
