"""Imported teachers: what the import writes and refuses, and experiments on them."""

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub_folders import DDIM, DIT, FLOW, assert_trees_equal, make, tensors_for, write_model, write_pipeline
from huggingface_hub.utils import filter_repo_objects
from parity import made, nchw, nhwc, values
from test_dit import by_the_paper, original
from test_pickles import snapshot, stored, window, zip_file  # noqa: F401

from ddistill import published
from ddistill.cli import commands, main
from ddistill.config import Data, Experiment, Imported, resolved
from ddistill.dry_run import dry_run
from ddistill.hub.load import load_network, open_diffusion
from ddistill.hub.pickles import edm_net
from ddistill.hub.save import config_of
from ddistill.hub.teachers import check_teacher, files_of, import_teacher
from ddistill.hub.tensors import open_tensors
from ddistill.integrators import ddim
from ddistill.methods import Consistency, LatentConsistency
from ddistill.net import VelocityPrecondition, from_nnx
from ddistill.process import cosine, flow
from ddistill.runs import distil, load_experiment, open_run, read_metrics, stages

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


def test_a_variant_is_of_the_parts_that_have_it(pipeline, tmp_path):
    """Here the autoencoder alone: the denoiser is copied without."""
    source = tmp_path / "p"
    tensors = write_pipeline(source, SMALL, DDIM)
    half = {"a": np.ones(3, np.float16)}
    write_model(source / "vae", SMALL, {"a": np.zeros(3, np.float32)})
    write_model(source / "vae", SMALL, half, "diffusion_pytorch_model.fp16.safetensors")
    assert import_teacher(source, tmp_path / "t", variant="fp16").parameters == sum(a.size for a in tensors.values())
    assert_trees_equal(load_network(tmp_path / "t"), load_network(pipeline))
    np.testing.assert_array_equal(np.asarray(open_tensors(tmp_path / "t" / "vae")["a"]), half["a"])
    assert open_tensors(tmp_path / "t" / "vae")["a"].dtype == "float16"


def test_pickled_weights_become_safetensors_and_run_nothing(pipeline, tmp_path, capsys):
    source, tensors = tmp_path / "p", tensors_for(SMALL)
    write_pipeline(source, SMALL, DDIM, tensors)
    (source / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no diffusion_pytorch_model.safetensors"):
        check_teacher(source)
    (source / "text_encoder").mkdir()
    (source / "text_encoder" / "config.json").write_text("{}")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        saved(
            source / "transformer" / f"diffusion_pytorch_model-0000{i + 1}-of-00002.bin", {n: tensors[n] for n in part}
        )
    (source / "transformer" / "diffusion_pytorch_model.bin.index.json").write_text("{}")
    saved(source / "text_encoder" / "pytorch_model.bin", {"a": np.ones(3, np.float32)})
    summary = import_teacher(source, tmp_path / "t")
    assert summary.parameters == sum(a.size for a in tensors.values())
    assert_trees_equal(load_network(tmp_path / "t"), load_network(pipeline))
    files = sorted(p.name for p in (tmp_path / "t").glob("*/*") if p.suffix == ".safetensors" or ".bin" in p.name)
    assert files == ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    (source / "transformer" / "diffusion_pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(["import", str(source), "--to", str(tmp_path / "evil")]) == 2
    assert "system" in capsys.readouterr().err and not (tmp_path / "evil").exists()


def test_the_oldest_pipelines_have_all_at_their_root(pipeline, tmp_path):
    source = tmp_path / "p"
    write_model(source, SMALL)
    (source / "scheduler_config.json").write_text(json.dumps(DDIM))
    (source / "model_index.json").write_text("{}")
    import_teacher(source, tmp_path / "t")
    assert_trees_equal(load_network(tmp_path / "t"), load_network(pipeline))
    assert sorted(str(p.relative_to(tmp_path / "t")) for p in (tmp_path / "t").rglob("*.json")) == [
        "scheduler/scheduler_config.json", "teacher.json", "transformer/config.json",
    ]  # fmt: skip


STABLE = [
    "README.md", "model_index.json", "v1-5-pruned.safetensors", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.bin",
    "text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
    "text_encoder/pytorch_model.bin", "tokenizer/merges.txt", "tokenizer/vocab.json",
]  # fmt: skip


def test_of_a_repository_the_weights_are_fetched_once():
    common = {
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
        "vae/diffusion_pytorch_model.bin", "text_encoder/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
    }  # fmt: skip
    assert set(files_of(STABLE)) == common | {"unet/diffusion_pytorch_model.safetensors"}
    assert set(files_of(STABLE, "fp16")) == common | {"unet/diffusion_pytorch_model.fp16.safetensors"}
    only = [name for name in STABLE if name != "unet/diffusion_pytorch_model.safetensors" and ".bin" not in name]
    with pytest.raises(ValueError, match=r"the denoiser has .*fp16.safetensors, .*: name the variant"):
        files_of(only)
    old = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.bin", "fid.py", "images/a.png"]
    assert files_of(old) == ["config.json", "scheduler_config.json", "diffusion_pytorch_model.bin"]
    shards = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json"]
    shards += [f"unet/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    assert files_of(shards, "fp16") == shards
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    beside = [*STABLE, "vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors"]
    assert "vae_1_0/config.json" in files_of(beside)
    parts = {name.split("/")[0] for name in files_of(beside, index=index)}
    assert parts == {"model_index.json", "scheduler", "unet", "vae"}


def test_a_repository_is_listed_before_it_is_fetched(pipeline, tmp_path, monkeypatch):
    asked = []
    listed = [*STABLE, "unet/a[1].json", "vae_1_0/config.json"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, revision: listed)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(pipeline)
    )
    import_teacher("runway/sd", tmp_path / "t", revision="main")
    assert all(name == "runway/sd" and options["revision"] == "main" for name, options in asked)
    first, second = (options["allow_patterns"] for _, options in asked)
    assert first == ["model_index.json"]  # which names the pipeline's parts
    index = json.loads((pipeline / "model_index.json").read_text())
    kept = list(filter_repo_objects(listed, allow_patterns=second))
    assert sorted(kept) == sorted(files_of(listed, index=index))
    assert "unet/a[1].json" in kept and not any(name.startswith("vae_1_0/") for name in kept)


def test_what_cannot_be_used_of_a_pipeline_is_told_when_it_is_imported(tmp_path, capsys, originals):
    source = tmp_path / "p"
    write_pipeline(source, SMALL)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaPipeline"}))
    for part, text in (("vae", '{"_class_name": "AutoencoderDC"}'), ("text_encoder", "{}"), ("tokenizer", "{}")):
        (source / part).mkdir()
        (source / part / "config.json").write_text(text)
    (source / "tokenizer" / "spiece.model").write_bytes(b"")
    assert main(["import", str(source), "--to", str(tmp_path / "t")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    for words in (
        "its autoencoder is AutoencoderDC",
        "prompts of a SanaPipeline cannot be",
        "has a spiece.model but no",
    ):
        assert f"{words}" in told
    assert main(["import", str(originals[0] / "train.pt"), "--to", str(tmp_path / "o"), "--original", "dit"]) == 0
    assert "its students cannot be exported" in " ".join(capsys.readouterr().err.split())


def test_a_tensor_that_nothing_reads_is_left_alone(pipeline, tmp_path):
    tensors = {**tensors_for(SMALL), "caption_projection.y_embedding": np.zeros((120, 4), np.float32)}
    write_pipeline(tmp_path / "p", SMALL, DDIM, tensors)
    import_teacher(tmp_path / "p", tmp_path / "t")
    assert_trees_equal(load_network(tmp_path / "t"), load_network(pipeline))


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
    process, key = expected.apply.process, jax.random.key(0)
    x = jax.random.normal(key, (2, 8, 8, 3))
    for rate, dropped in ((None, True), (0.5, True), (0.0, False)):  # EDM trained it with dropout
        net = Imported(tmp_path / "t", dropout=rate).build(Data({}, (8, 8, 3), 4), process, key)
        params = {name: 0.1 * jax.random.normal(key, p.shape) for name, p in net.params.items()}
        call = jax.jit(lambda net, key: net(x, 1.0, jnp.zeros(2, int), key=key))
        moved = np.abs(call(net.replace(params=params), key) - call(net.replace(params=params), None)).max()
        assert (moved > 1e-3) == dropped
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(["import", str(tmp_path / "evil.pkl"), "--to", str(tmp_path / "evil")]) == 2
    assert "system" in capsys.readouterr().err and not (tmp_path / "evil").exists()


def saved(path, tensors):
    """A file as torch.save writes it, of the tensors alone or with others beside them, as a training leaves it."""
    arrays = {str(i): a for i, a in enumerate(tensors.values())}
    tree = {
        name: window(stored("FloatStorage", key, a.size), a.shape, tuple(s // 4 for s in a.strides))
        for (key, a), name in zip(arrays.items(), tensors, strict=True)
    }
    path.write_bytes(zip_file({"model": {}, "ema": tree} if "train" in path.stem else tree, arrays))
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The tensors of an original checkpoint of two heads, imported as of either project."""
    folder, tensors = tmp_path_factory.mktemp("originals"), original(depth=1, width=128, channels=4)
    for name, file in (("dit", "train.pt"), ("sit", "release.pt")):
        source = str(saved(folder / file, tensors))
        assert main(["import", source, "--to", str(folder / name), "--original", name]) == 0
    return folder, tensors


def test_original_checkpoints_are_denoisers_of_their_own_processes(originals):
    folder, tensors = originals
    x, labels = values(5, 2, 8, 8, 4), np.array([2, 3])

    def network(t):
        return nhwc(by_the_paper(tensors, nchw(x).astype(np.float64), t, labels, heads=2))

    def x0(name, t):
        net = load_network(folder / name)
        return jax.jit(lambda x: net(x, jnp.asarray(t, jnp.float32), labels))(x)

    t = np.array([0.25, 0.9])
    expected = x + t[:, None, None, None] * network(1 - t)  # SiT's time runs to the data, and so does its velocity
    np.testing.assert_allclose(x0("sit", t), expected, atol=1e-4)
    index = np.array([0, 700])
    left = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index][:, None, None, None]  # ᾱ of Ho et al. 2020, eq. 4
    expected = (x - np.sqrt(1 - left) * network(index.astype(np.float64))) / np.sqrt(left)
    np.testing.assert_allclose(x0("dit", index + 1), expected, atol=1e-4 * np.abs(expected).max())
    for name, known in (("sit", published.sit_xl_2()), ("dit", published.dit_xl_2())):
        assert open_diffusion(folder / name) == (known.process, known.precondition)
    import_teacher(folder / "sit", folder / "again")
    assert_trees_equal(load_network(folder / "again"), load_network(folder / "sit"))


def test_a_published_experiment_takes_an_original_checkpoint(originals):
    folder, _ = originals
    home = Path(__file__).parents[1] / "experiments" / "published"
    experiment = load_experiment(home / "imagenet256_sit_flow_consistency.py")
    experiment = dataclasses.replace(experiment, network=Imported(folder / "sit"))
    done = dry_run(experiment, 8)
    assert [note.split(":")[0] for note in done.notes] == ["data"]
    (row,) = [row for row in done.stages[0].rows if row.name.startswith("teacher")]
    assert resolved(experiment).process == flow() and 0 < row.weights < 4 * 500_000  # the folder's, not XL/2's


def test_what_diffusers_cannot_hold_of_an_original_checkpoint_is_refused(originals, tmp_path, capsys):
    folder, tensors = originals
    for name in ("dit", "sit"):
        student = Imported(folder / name).abstract()
        for teacher in (folder / name, None):
            with pytest.raises(ValueError, match=r"cannot hold this network: freq_shift is 0\.0.*shared_embedding"):
                config_of(student, teacher)
    module = made(lambda: make(SMALL))
    with pytest.raises(ValueError, match="DiTTransformer2DModel 1000 t for a flow's time t.*made for 1 t"):
        config_of(from_nnx(module, flow(), VelocityPrecondition()))
    assert config_of(from_nnx(module, flow(), VelocityPrecondition(1000.0)))["_class_name"] == SMALL["_class_name"]
    to = ["--to", str(tmp_path / "t")]
    for source, words in (
        (folder / "release.pt", "say of which, with --original"),
        (folder / "no.pt", "neither a fold"),
    ):
        assert main(["import", str(source), *to]) == 2
        assert words in capsys.readouterr().err
    for source, words in (
        (folder / "sit", "is no file: --original sit"),
        (saved(tmp_path / "x.pt", {"w": np.zeros(2, np.float32)}), "checkpoint of the DiT or SiT project has"),
        (saved(tmp_path / "y.pt", {**tensors, "w": tensors["pos_embed"]}), "not tensors of a DiT or SiT checkpoint"),
    ):
        assert main(["import", str(source), *to, "--original", "sit"]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="original = 'edm': checkpoints are taken of dit, sit"):
        import_teacher(folder / "release.pt", tmp_path / "t", original="edm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt", "y.pt"]


def test_the_scale_at_which_a_network_was_held_goes_with_its_student(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(
        "ddistill.hub.save.export_student",
        lambda *args, **options: (
            given.append(options["guidance"]) or SimpleNamespace(call={}, scheduler={"_class_name": ""})
        ),
    )
    for held, method, flags in (
        (3.5, Consistency(), []),
        (None, Consistency(), []),
        (None, LatentConsistency(), []),
        (None, LatentConsistency(), ["--guidance", "2"]),
    ):
        e = SimpleNamespace(name="e", process=flow(), method=method, network=Imported(Path("teacher"), guidance=held))
        monkeypatch.setattr(commands, "open_run", lambda run, e=e: SimpleNamespace(experiment=e, student=None))
        assert main(["export", "run", "--to", "out", *flags]) == 0
    assert given == [3.5, None, LatentConsistency()(flow()).sampling.guidance, 2.0]
    e.method = Consistency()
    assert main(["export", "run", "--to", "out", "--guidance", "2"]) == 2
    assert "this student's guidance is built in" in capsys.readouterr().err


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


def test_commands_from_a_folder_of_diffusers_to_one(teacher, tmp_path, monkeypatch, capsys, one_device):
    (tmp_path / "hub_squares.py").write_text(
        inspect.getsource(Squares).replace("@data", HEADER + "@data")
    )  # data of the experiment's own, that its copy finds too
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "e.py").write_text(FILE.format(teacher))
    run, out, lora = (str(tmp_path / name) for name in ("run", "out", "lora"))
    assert main(["distill", str(tmp_path / "e.py"), "--workdir", run]) == 0
    assert main(["sample", run, "--out", str(tmp_path / "x.npz"), "--n", "4", "--steps", "2"]) == 0
    assert main(["export", run, "--to", out, "--steps", "2", "--dtype", "fp16"]) == 0
    assert "LCMScheduler, timesteps=[999, " in capsys.readouterr().err
    assert main(["export", run, "--to", lora, "--lora", "2"]) == 2
    assert "no LoRA file into a DiTTransformer2DModel" in " ".join(capsys.readouterr().err.split())
    assert not Path(lora).exists()
    monkeypatch.setattr("ddistill.hub.save.WITH_LORA", ("DiTTransformer2DModel",))  # as if diffusers had a loader
    assert main(["export", run, "--to", lora, "--lora", "2"]) == 0
    told = capsys.readouterr().err
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
