"""Imported teachers: what the import writes and refuses, and experiments on them."""

import dataclasses
import inspect
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hub_folders import DDIM, DIT, FLOW, assert_trees_equal, tensors_for, write_model, write_pipeline
from test_pickles import snapshot  # noqa: F401

from ddistill.cli import main
from ddistill.config import Data, Experiment, Imported, resolved
from ddistill.hub.load import load_network, open_diffusion
from ddistill.hub.pickles import edm_net
from ddistill.hub.teachers import check_teacher, import_teacher
from ddistill.hub.tensors import open_tensors
from ddistill.integrators import ddim
from ddistill.methods import Consistency
from ddistill.process import cosine
from ddistill.runs import distil, open_run, read_metrics, stages

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


def test_a_snapshot_of_edm_becomes_a_teacher(snapshot, tmp_path, capsys):  # noqa: F811
    path, _ = snapshot
    assert main(["import", str(path), "--to", str(tmp_path / "t")]) == 0
    assert main(["import", str(tmp_path / "t"), "--to", str(tmp_path / "again")]) == 0
    assert "SongUNet" in capsys.readouterr().err
    expected = edm_net(path)
    for name in ("t", "again"):
        assert_trees_equal(load_network(tmp_path / name), expected)
        assert Imported(tmp_path / name).process == expected.apply.process
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(["import", str(tmp_path / "evil.pkl"), "--to", str(tmp_path / "evil")]) == 2
    assert "system" in capsys.readouterr().err and not (tmp_path / "evil").exists()


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


def test_an_experiment_takes_the_process_of_its_imported_teacher(teacher, tmp_path):
    e = experiment(teacher)
    assert resolved(e).process == open_diffusion(teacher)[0] and resolved(resolved(e)) == resolved(e)
    assert [stage.name for stage in stages(resolved(e), e.data.load())] == ["student"]
    with pytest.raises(ValueError, match="brings its own process: leave process out"):
        distil(experiment(teacher, process=cosine()))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        distil(experiment(tmp_path / "nowhere"))


HEADER = "import dataclasses\nimport numpy as np\nfrom ddistill.config import Data\n\n"
FILE = """
from hub_squares import Squares
from pathlib import Path

from ddistill import Experiment
from ddistill.config import Imported
from ddistill.integrators import ddim
from ddistill.lora import LoRA
from ddistill.methods import Adapted, Consistency


def experiment():
    method = Adapted(Consistency(intervals=2, max_intervals=2, solver=ddim), LoRA(rank=2, layers=("*attn1*.kernel",)))
    return Experiment("squares", method, Squares(), network=Imported(Path("{}")), steps=2, batch_size=8)
"""


def test_commands_from_a_folder_of_diffusers_to_one(teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "hub_squares.py").write_text(
        inspect.getsource(Squares).replace("@data", HEADER + "@data")
    )  # data of the experiment's own, that its copy finds too
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "e.py").write_text(FILE.format(teacher))
    run, out, lora = (str(tmp_path / name) for name in ("run", "out", "lora"))
    assert main(["distill", str(tmp_path / "e.py"), "--workdir", run]) == 0
    assert main(["sample", run, "--out", str(tmp_path / "x.npz"), "--n", "4", "--steps", "2"]) == 0
    assert main(["export", run, "--to", out, "--steps", "2", "--dtype", "fp16"]) == 0
    assert main(["export", run, "--to", lora, "--lora", "2"]) == 0
    told = capsys.readouterr().err
    assert "LCMScheduler, timesteps=[999, " in told
    assert float(told.split("what was learned is ")[1].split()[0]) < 1e-2
    assert sorted(p.name for p in Path(out).iterdir()) == [
        "README.md", "model_index.json", "scheduler", "transformer", "vae"
    ]  # fmt: skip
    names = list(open_tensors(Path(lora) / "pytorch_lora_weights.safetensors"))
    assert len(names) == 2 * 2 * 4 and all(".attn1." in name for name in names)
    assert main(["import", out, "--to", str(tmp_path / "again")]) == 0
    opened = open_run(run)
    assert set(read_metrics(run)) == {"student"}
    assert opened.experiment.process == open_diffusion(teacher)[0]
    assert_trees_equal(opened.teacher, load_network(teacher))
    moved = {n for n, w in opened.student.params.items() if np.any(w != opened.teacher.params[n])}
    assert moved == {n for n in opened.student.params if ".attn1." in n and n.endswith(".kernel")}
    back = load_network(tmp_path / "again")
    for path, p in opened.student.params.items():
        if not path.startswith(("target.", "guidance.")):
            np.testing.assert_array_equal(back.params[path], np.asarray(p).astype(np.float16).astype(np.float32))
