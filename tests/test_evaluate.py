"""`ddistill evaluate` by networks' features: rows, times, files, and going on after it was cut off."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linear_features import linear_features
from parity import with_weights
from PIL import Image
from safetensors.numpy import save_file

from ddistill import sharding
from ddistill.cli import commands, main, networks, study
from ddistill.cli import evaluate as command
from ddistill.cli.report_runs import drawn_of
from ddistill.cli.serve import Asked, drawer
from ddistill.config import Data, Experiment
from ddistill.datasets import LatentFolder
from ddistill.evaluate import quality
from ddistill.evaluate.quality import Spent, Study, draws, labels_in_turn, notes_of
from ddistill.evaluate.real import images_of
from ddistill.evaluate.samplers import Sampler, start
from ddistill.evaluate.seen import Seen
from ddistill.evaluate.statistics import Statistics
from ddistill.hub.weights import tensors_from
from ddistill.integrators import Solution
from ddistill.methods import KD, Consistency, LatentConsistency
from ddistill.net import Net
from ddistill.networks.autoencoder import DOWN, UP, AutoencoderKL, AutoencoderKLConfig
from ddistill.networks.conditions import Prompt
from ddistill.process import edm
from ddistill.runs import Opened

SIDE, SPREAD = 8, 0.5


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images of independent pixels."""

    count: int = 60

    def load(self) -> Data:
        x = SPREAD * np.random.default_rng(0).standard_normal((self.count, SIDE, SIDE, 3))
        return Data({"x": x.astype(np.float32), "cond": np.arange(self.count) % 3}, (SIDE, SIDE, 3), 3)


def gaussian(shift=0.0):
    """The exact denoiser of N(shift, SPREAD²)."""

    def apply(params, rest, x, t, cond, *, s=None, key=None):
        t = t[:, None, None, None]
        return params["shift"] + (x - params["shift"]) * SPREAD**2 / (SPREAD**2 + t**2)

    return Net({"shift": jnp.asarray(shift)}, {}, apply)


def flow_map():
    """The student that takes noise where the exact flow of N(0, SPREAD²) does, in any number of steps."""

    def apply(params, rest, x, t, cond, *, s=None, key=None):
        return x * SPREAD / jnp.sqrt(SPREAD**2 + t[:, None, None, None] ** 2)

    return Net({}, {}, apply)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run with an exact teacher and an exact student, and networks that need no file."""
    experiment = Experiment("noise", Consistency(), data=Noise())
    opened = Opened(experiment, experiment.data.load(), gaussian(), flow_map())
    monkeypatch.setattr(command, "open_run", lambda folder: opened)
    monkeypatch.setattr(networks, "load_features", lambda config, path, resize: linear_features(SIDE, name=config.name))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "experiment.json").write_text("{}")
    return folder


ARGV = ["--features", "dinov2-vit-s-14=dinov2.pth", "--samples", "40", "--batch-size", "16", "--steps", "1", "2"]


def read(folder):
    return json.loads((folder / "evaluation" / "table.json").read_text("utf-8"))


def test_the_table_has_the_floor_the_teacher_and_the_student_with_their_times(run, capsys):
    assert main(["evaluate", str(run), *ARGV, "--csv", str(run / "t.csv"), "--json", str(run / "t.json")]) == 0
    table = read(run)
    rows = table["rows"]
    assert [(r["sampler"], r["steps"], r["nfe"], r["samples"]) for r in rows] == [
        ("real, half against half (floor)", None, None, 30),
        ("teacher, Heun", 18, 35, 40),
        ("teacher, DPM-Solver++(2M)", 2, 2, 40),
        ("teacher, DPM-Solver++(2M)", 1, 1, 40),
        ("student", 1, 1, 40),
        ("student", 2, 2, 40),
    ]
    for row in rows[1:]:
        assert row["images_per_s"] > 0 and row["wall_s"] > 0 and row["compile_s"] > 0 and row["seed"] == 0
        assert any("40 samples, fewer than the standard 50,000" in note for note in row["notes"])
    by = {(r["sampler"], r["steps"]): r["fd_dinov2"] for r in rows}
    # The teacher with 35 calls and the student draw what the data are; with one call the teacher draws the mean alone.
    exact = [by["real, half against half (floor)", None], by["teacher, Heun", 18], by["student", 1], by["student", 2]]
    assert by["student", 1] == pytest.approx(by["teacher, Heun", 18], rel=0.1)
    assert max(exact) < 0.5 * by["teacher, DPM-Solver++(2M)", 1]
    told = capsys.readouterr()
    assert "FD-DINOv2" in told.out and "40 samples, fewer than the standard 50,000" in " ".join(told.out.split())
    assert json.loads((run / "t.json").read_text())["rows"] == rows
    for file in (run / "t.csv", run / "evaluation" / "table.csv"):
        with file.open() as lines:
            found = list(csv.DictReader(lines))
        assert [float(r["fd_dinov2"]) for r in found] == [r["fd_dinov2"] for r in rows]
    assert table["flags"] == [*ARGV[6:], *ARGV[:6]]  # in the order of --help
    assert table["made"]["networks"]["dinov2"]["name"] == "dinov2-vit-s-14" and table["made"]["samples"] == 40


def test_a_killed_evaluation_goes_on_after_its_last_row(run, monkeypatch, capsys):
    whole, done = study.judge, []

    def judge(sampler, what):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((sampler.name, sampler.steps))
        return whole(sampler, what)

    monkeypatch.setattr(study, "judge", judge)
    assert main(["evaluate", str(run), *ARGV]) == 130
    assert "goes on after the last row" in capsys.readouterr().err
    with (run / "evaluation" / "rows.jsonl").open("a") as file:
        file.write('{"sampler": "cut o')
    first = list(done)
    done.clear()
    assert main(["evaluate", str(run), *ARGV]) == 130
    assert main(["evaluate", str(run), *ARGV]) == 130  # the fifth sampler is due
    done.clear()
    assert main(["evaluate", str(run), *ARGV]) == 0
    assert done == [("student", 2)] and first == [("teacher, Heun", 18), ("teacher, DPM-Solver++(2M)", 2)]
    assert len(read(run)["rows"]) == 6
    # Nothing is left to do, and nothing is looked at again.
    monkeypatch.setattr(study, "statistics_of", lambda *a, **k: pytest.fail("the reference is there"))
    done.clear()
    assert main(["evaluate", str(run), *ARGV]) == 0 and not done


def test_what_conditions_are_read_from_is_closed_also_where_judging_fails(run, monkeypatch):
    closed = []

    class Read:
        def __call__(self, number):
            return labels_in_turn(3, 16)(number)

        def close(self):
            closed.append(1)

    def judge(sampler, what):
        what.conditions(0)
        raise ValueError("no")

    monkeypatch.setattr(study, "conditions_for", lambda *_: Read())
    monkeypatch.setattr(study, "judge", judge)
    assert main(["evaluate", str(run), *ARGV]) == 2 and closed == [1]


def test_the_flags_beside_rows_make_all_of_them_again(run):
    argv = ["evaluate", str(run), *ARGV[:-3]]
    assert main([*argv, "--steps", "1"]) == 0 and main([*argv, "--steps", "2"]) == 0
    table = read(run)
    assert {row["steps"] for row in table["rows"] if row["sampler"] == "student"} == {1, 2}
    assert table["flags"][:3] == ["--steps", "1", "2"] and table["date"].startswith("20")


def test_another_evaluation_in_the_folder_is_refused(run, capsys):
    folder = run / "evaluation"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"made": {"run": "other"}}\n')
    assert main(["evaluate", str(run), *ARGV]) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    (folder / "rows.jsonl").write_text("[]\n")
    assert main(["evaluate", str(run), *ARGV]) == 2
    assert "is not a file that this command wrote" in capsys.readouterr().err


def test_statistics_and_folders_serve_as_reference(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "plan", lambda *a: [])
    assert main(["evaluate", str(run), *ARGV]) == 0
    saved = run / "evaluation" / "reference.npz"
    assert main(["evaluate", str(run), *ARGV, "--reference", str(saved), "--out", str(tmp_path / "a")]) == 0
    rows = [json.loads((f / "table.json").read_text())["rows"] for f in (run / "evaluation", tmp_path / "a")]
    assert rows[0][0]["fd_dinov2"] == pytest.approx(rows[1][0]["fd_dinov2"], rel=1e-9)
    other = tmp_path / "images"
    other.mkdir()
    for i in range(5):
        Image.fromarray(np.full((9, 9, 3), 50 * i, np.uint8)).save(other / f"{i}.png")
    argv = ["evaluate", str(run), *ARGV, "--reference", str(other), "--out", str(tmp_path / "b")]
    assert main(argv) == 2
    assert "5 of 9 x 9" in capsys.readouterr().err
    assert main([*argv, "--crop"]) == 0
    assert json.loads((tmp_path / "b" / "table.json").read_text())["reference"]["images"] == 5
    looked = []
    monkeypatch.setattr(study, "statistics_of", lambda *a, **k: looked.append(a))
    for changed in (["--metrics", "fd_dinov2", "--seed", "1"], ["--batch-size", "7"]):
        assert main([*argv, "--crop", *changed]) == 2 and not looked
        assert "holds another evaluation" in capsys.readouterr().err
    assert main([*argv, "--crop"]) == 0 and not looked
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(other / "0.png")
    assert main([*argv, "--crop"]) == 2 and not looked
    assert "holds another evaluation: reference: " in capsys.readouterr().err


def test_what_other_models_decode_is_another_evaluation(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "plan", lambda *a: [])
    monkeypatch.setattr(study, "decoder", lambda opened, models: lambda x: (np.asarray(x) + 1) / 2)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 3)
    assert main(["evaluate", str(run), *ARGV, "--models", str(tmp_path / "a")]) == 0
    assert main(["evaluate", str(run), *ARGV, "--models", str(tmp_path / "b")]) == 2
    assert "holds another evaluation: models: " in capsys.readouterr().err
    (run / "evaluation/rows.jsonl").unlink()  # its real images are those that the first ones decoded
    looked, whole = [], study.statistics_of
    monkeypatch.setattr(study, "statistics_of", lambda *a, **k: looked.append(1) or whole(*a, **k))
    assert main(["evaluate", str(run), *ARGV, "--models", str(tmp_path / "b")]) == 0 and looked == [1]


def test_beside_statistics_of_others_the_floor_is_the_runs_data_and_images_are_resized_as_theirs(
    run, tmp_path, monkeypatch, capsys
):
    asked = []

    def load(config, path, resize):
        asked.append(resize.name)
        return linear_features(SIDE, pool=12, spatial=20)

    monkeypatch.setattr(networks, "load_features", load)
    monkeypatch.setattr(study, "plan", lambda *a: [])
    broken = np.diag(np.r_[-3.0, np.ones(11)])  # no covariance
    np.savez(tmp_path / "adm.npz", mu=np.zeros(12), sigma=broken)
    argv = ["evaluate", str(run), "--features", "inception=file", "--metrics", "fid", "--samples", "20"]
    assert main([*argv, "--reference", str(tmp_path / "adm.npz")]) == 0
    (row,) = read(run)["rows"]
    assert asked == ["tensorflow"] and row["sampler"] == "the run's data (floor)" and row["samples"] == 20
    assert row["fid_clipped"] > 1e-6 and any("negative eigenvalues" in note for note in row["notes"])
    told = " ".join(capsys.readouterr().err.split())
    assert "does not tell its network, preprocessing and resolution" in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--features", "inception"], "give NETWORK=FILE"),
        (["--features", "magic=a.pth"], "one of the networks inception, clip-vit-b-16"),
        (["--features", "dinov2-vit-s-14=a", "--features", "dinov2-vit-b-14=b"], "two networks of the kind dinov2"),
        (["--features", "dinov2-vit-s-14=a", "--metrics", "fid"], "fid need features of inception"),
        (["--features", "dinov2-vit-s-14=a", "--metrics", "fad"], "no metric fad"),
        (["--features", "dinov2-vit-s-14=a", "--samples", "1"], "at least 2"),
        (["--metrics", "fid"], "only runs on digits can be judged by pixels"),
    ],
)
def test_wrong_requests_get_words(run, capsys, flags, words):
    assert main(["evaluate", str(run), *flags]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def judged_by(mesh, count, batch_size, *, draw=None):
    shape = (SIDE, SIDE, 3)
    none = Statistics(Seen(0, {}, {}, np.zeros(0)), None, {})
    decode = lambda x: (np.asarray(x) + 1) / 2  # noqa: E731
    return Study(edm(), shape, labels_in_turn(3, batch_size), decode, mesh, {}, (), none, count, batch_size)


def test_samples_depend_on_their_number_alone():
    eight, one = sharding.make_mesh(), sharding.local_mesh(jax.devices()[:1])

    def draw(noise, labels, key):  # a third of the range for each label
        return Solution((labels[:, None, None, None] - 1) / 2 + noise / 500, jnp.asarray(3))

    def images(mesh, count, batch_size):
        spent = Spent()
        parts = list(draws(Sampler("s", jax.jit(draw)), judged_by(mesh, count, batch_size), spent))
        assert spent.calls == 3 and spent.images == batch_size * len(parts)
        assert [i for numbers, _ in parts for i in numbers] == list(range(count))
        return np.concatenate([x for _, x in parts])

    x = images(eight, 20, 8)
    assert x.shape == (20, SIDE, SIDE, 3) and x.dtype == np.uint8
    np.testing.assert_array_equal(images(one, 20, 8), x)
    np.testing.assert_array_equal(images(eight, 11, 5), x[:11])  # batches that the devices do not divide
    level = x.astype(int).reshape(20, -1).mean(1)
    for label, brightness in enumerate((0.25, 0.5, 0.75)):
        np.testing.assert_allclose(level[label::3], 255 * brightness, atol=6)


def test_times_are_those_after_the_first_call(monkeypatch):
    now = [0.0]

    def draw(noise, labels, key):
        now[0] += 100.0 if now[0] < 50 else 2.0  # the first call compiles
        return Solution(noise, jnp.asarray(1))

    monkeypatch.setattr(quality.time, "perf_counter", lambda: now[0])
    spent = Spent()
    list(draws(Sampler("s", draw), judged_by(sharding.make_mesh(), 20, 8), spent))
    assert (spent.compiling, spent.sampling, spent.images) == (100, 6, 24)


def test_samples_that_are_not_finite_are_counted_and_told():
    def draw(noise, labels, key):
        broken = jnp.where((labels == 1)[:, None, None, None], jnp.asarray([jnp.nan, 1.0, jnp.inf]), noise / 500)
        return Solution(broken, jnp.asarray(1))

    row = quality.judge(Sampler("s", draw), judged_by(sharding.make_mesh(), 20, 8))
    assert row["not_finite"] == 7  # of 20 labels in turn
    real = Statistics(Seen(100_000, {}, {}, np.zeros(0, int)), None, {})
    assert notes_of(row, real)[-1] == "7 samples of s have values that are not finite"
    assert "not finite" not in " ".join(notes_of({**row, "not_finite": 0}, real))
    few = Statistics(Seen(100, {}, {}, np.zeros(0, int)), None, {})
    assert "100 real images, fewer than the standard 50,000" in notes_of(row, few)


def test_images_are_scored_with_the_prompts_that_they_were_drawn_for(monkeypatch):
    clip = linear_features(SIDE)
    texts = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    what = judged_by(sharding.make_mesh(), 20, 8)
    what = dataclasses.replace(what, networks={"clip": clip}, names=("clip_score",), texts=texts)
    sampler = Sampler("s", lambda x, c, key: Solution(x / 100 + c[:, None, None, None] / 4, 1))
    x = np.concatenate([x for _, x in draws(sampler, what, Spent())])
    embeddings = np.asarray(clip.apply(x)["embedding"])
    cosines = [
        e @ t / np.linalg.norm(e) / np.linalg.norm(t) for e, t in zip(embeddings, texts[np.arange(20) % 3], strict=True)
    ]
    expected = 100 * np.mean(np.maximum(cosines, 0))
    assert quality.judge(sampler, what)["clip_score"] == pytest.approx(expected, rel=1e-4)
    assert 0 < expected != 100 * np.mean(np.abs(cosines))


def test_variety_is_the_distance_within_a_condition():
    what = judged_by(sharding.make_mesh(), 20, 8)
    distance = lambda a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))  # noqa: E731
    what = dataclasses.replace(what, names=("lpips",), lpips=distance, num_classes=3)
    sampler = Sampler("s", lambda x, c, key: Solution(x / 400 + (c[:, None, None, None] - 1) / 3, 1))
    # Of x, y from N(shade, .2²) E|x − y| = .4/√π, whatever the shade.
    assert quality.judge(sampler, what)["lpips"] == pytest.approx(0.4 / np.sqrt(np.pi), rel=0.04)
    x = (
        0.2 * np.random.default_rng(0).standard_normal((60, SIDE, SIDE, 3))
        + (np.arange(60) % 3)[:, None, None, None] / 3
    )
    images = images_of(Data({"x": x, "cond": np.arange(60) % 3}, (SIDE, SIDE, 3), 3), "the data")
    assert quality.real_variety(images, distance) == pytest.approx(0.4 / np.sqrt(np.pi), rel=0.05)
    none = dataclasses.replace(what, num_classes=0, conditions=lambda number: None)
    plain = Sampler("s", lambda x, c, key: Solution(x / 400, 1))
    assert quality.judge(plain, none)["lpips"] == pytest.approx(0.4 / np.sqrt(np.pi), rel=0.04)
    # Of 7 prompts in turn, whose shades differ: a distance across them would be larger.
    shades = np.linspace(-0.5, 0.5, 7).astype(np.float32)
    prompted = dataclasses.replace(none, batch_size=7, conditions=lambda number: shades)
    of_prompts = Sampler("s", lambda x, c, key: Solution(x / 400 + c[:, None, None, None], 1))
    assert quality.variety(of_prompts, prompted) == pytest.approx(0.4 / np.sqrt(np.pi), rel=0.04)


def test_prompts_are_encoded_in_turn_and_classes_take_one_each(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    monkeypatch.setattr(
        networks, "open_prompts", lambda folder: lambda texts, sizes: Prompt(jnp.asarray([[[len(t)]] for t in texts]))
    )
    data = Data({}, (4, 4, 3), 0, null=Prompt(np.zeros((1, 1))))
    conditions = networks.prompt_conditions(data, ["a", "bb", "ccc"], tmp_path, 4, 64)
    assert [conditions(i).states.reshape(-1).tolist() for i in range(2)] == [[1, 2, 3, 1], [2, 3, 1, 2]]
    labels = networks.prompt_conditions(Data({}, (4, 4, 3), 3), ["a", "bb", "ccc"], None, 4, 64)
    assert labels(1).tolist() == [1, 2, 0, 1]
    with pytest.raises(ValueError, match="has 2 classes, and --prompts has 3 lines"):
        networks.prompt_conditions(Data({}, (4, 4, 3), 2), ["a", "bb", "ccc"], None, 4, 64)
    with pytest.raises(ValueError, match="give its folder, --models"):
        networks.prompt_conditions(data, ["a"], None, 4, 64)


def test_prompts_are_the_lines_of_a_file_which_empty_ones_may_end(tmp_path):
    file = tmp_path / "prompts.txt"
    with pytest.raises(FileNotFoundError, match="prompts.txt does not exist: give a file with a prompt in each line"):
        networks.read_prompts(file)
    file.write_text("a cat\n\n a dog \n\n \n", encoding="utf-8")
    assert networks.read_prompts(file) == ["a cat", "", "a dog"]  # no prompt is a prompt
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="prompts.txt is empty: give a file"):
        networks.read_prompts(file)


def shades():
    """The denoiser of one image for each class, of brightness (class + 1)/10, and 0 for none: where every path ends."""

    def apply(params, rest, x, t, cond, *, s=None, key=None):
        known = jnp.where(cond < 3, (cond + 1) / 10, 0.0)
        return jnp.broadcast_to(known[:, None, None, None], x.shape)

    return Net({}, {}, apply)


@pytest.mark.parametrize("method", [KD(), LatentConsistency()])
def test_a_guided_student_has_a_guided_teacher_beside_it(method, monkeypatch, tmp_path):
    scaled = isinstance(method, LatentConsistency)
    experiment = Experiment("noise", method, data=Noise(), guidance=1.0 if scaled else 2.0)
    opened = Opened(experiment, experiment.data.load(), shades(), flow_map())
    noise, labels, key = start(experiment.process, (SIDE, SIDE, 3), 3, 6, 0)
    expected = 2 * (np.arange(6) % 3 + 1) / 10

    def shade(x):
        return np.asarray(x).reshape(6, -1).mean(1)

    by_networks, by_pixels = study.plan(opened, [1], "ddim", 10), command.samplers_of(opened, [1])
    names = [sampler.name for sampler in (*by_networks, *by_pixels)]
    ends = ["DDIM", "DPM-Solver++(2M)", None, "Heun", "Euler", None]
    assert names == ["student" if end is None else f"teacher, {end}, w = 2" for end in ends]
    for sampler, calls in zip((*by_networks[:2], *by_pixels[:2]), (20, 2, 70, 2), strict=True):
        solution = sampler.draw(noise, labels, key)
        np.testing.assert_allclose(shade(solution.x), expected, atol=1e-5)
        assert int(solution.nfe) == calls  # with guidance the network is asked twice
    drawn = drawn_of(opened, (1,), 6, 0).drawn
    assert [d.label for d in drawn[1:3]] == ["teacher, Heun, w = 2", "teacher, DPM-Solver++(2M), w = 2"]
    for d in drawn[1:3]:
        (sheet,) = d.sheets.values()
        np.testing.assert_allclose(shade(sheet.x) / 127.5 - 1, expected, atol=0.01)
    draw = drawer(opened, most=6, most_steps=2)
    np.testing.assert_allclose(shade(draw(Asked(1, 2, 6))[1].x), expected, atol=1e-5)
    if scaled:
        np.testing.assert_allclose(shade(draw(Asked(1, 2, 6, guidance=3.0))[1].x), 1.5 * expected, atol=1e-5)
        near = draw(Asked(1, 2, 6, guidance=3.0000005))[1]
        assert near.first is not None and not np.array_equal(near.x, draw(Asked(1, 2, 6, guidance=3.0))[1].x)
    monkeypatch.setattr(commands, "open_run", lambda folder: opened)
    out = tmp_path / "x.npz"
    assert main(["sample", "run", "--teacher", "--steps", "2", "--n", "6", "--out", str(out)]) == 0
    np.testing.assert_allclose(shade(np.load(out)["x"]), expected, atol=1e-5)


def test_latents_are_decoded_by_the_autoencoder_that_is_given(tmp_path):
    config = AutoencoderKLConfig(
        down_block_types=(DOWN,) * 2, up_block_types=(UP,) * 2, block_out_channels=(4, 8), norm_num_groups=2,
        latent_channels=3, shift_factor=0.1, scaling_factor=0.5,
    )  # fmt: skip
    params, rest, code = with_weights(AutoencoderKL(config, rngs=nnx.Rngs(0)))
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **dataclasses.asdict(config)}))
    save_file(dict(tensors_from(params)), folder / "diffusion_pytorch_model.safetensors")
    experiment = Experiment("latents", KD(), data=LatentFolder(Path("none")))
    opened = Opened(experiment, Data({}, (4, 4, 3), 2), gaussian(), gaussian())
    with pytest.raises(ValueError, match="samples are latents: give the folder of their autoencoder, --models"):
        study.models_of(opened, None)
    assert study.models_of(opened, tmp_path) == tmp_path
    z = np.random.default_rng(0).standard_normal((3, 4, 4, 3)).astype(np.float32)
    got = study.decoder(opened, tmp_path)(z)
    expected = np.clip(jax.jit(lambda z: code(params, rest).decode(z))(z / 0.5 + 0.1), -1, 1)
    np.testing.assert_allclose(got, (expected + 1) / 2, atol=1e-5)
