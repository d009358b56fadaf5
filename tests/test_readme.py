"""The README, run: its Python blocks, its commands and flags, and the files it names."""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddistill import Process, edm, grids, sample
from ddistill.cli import Command, Distill, Quickstart, commands, main
from ddistill.methods import METHODS
from ddistill.methods.base import Progress
from ddistill.net import Net
from ddistill.runs import load_experiment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    *("--network.width", "16", "--network.blocks", "1"),
    *("--teacher.steps", "2", "--steps", "2", "--batch-size", "8"),
]

pytestmark = pytest.mark.usefixtures("one_device")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


FILES = {m[1]: code for code in blocks("python") if (m := re.match(r"# file: (\S+)\n", code))}
SNIPPETS = [code for code in blocks("python") if not code.startswith("# file:")]


def command_lines():
    """The shell commands, one list of words for each, without the variables before them."""
    for block in blocks("bash"):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


DDISTILL = [words for words in command_lines() if words[0] == "ddistill"]
OTHERS = [words for words in command_lines() if words[0] != "ddistill"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the README asks for, and experiments/."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_two_commands_come_first_and_ci_runs_them():
    first_screen = README[: README.index("## ")]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("pip install . && ddistill quickstart", 'pip install ".[test]" && pytest -n 2'):
        assert f"```bash\n{command}\n```" in first_screen
    for part in ('pip install --quiet ".[test]"', "pytest -n 2", "ddistill quickstart"):
        assert part in ci


def test_commands_are_known():
    assert {words[0] for words in OTHERS} == {"pip", "pytest"}
    known = "quickstart import distill plan pairs encode sample serve invert export evaluate compare report bench"
    assert {words[1] for words in DDISTILL} == set(known.split())


@pytest.mark.parametrize("words", DDISTILL, ids=" ".join)
def test_every_command_line_parses(words, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "run", lambda command, flags, *_: seen.append((command, flags)))
    assert main(words[1:]) == 0
    ((command, flags),) = seen
    if isinstance(command, Distill) and flags == ["--help"]:
        with pytest.raises(SystemExit) as exit:
            load_experiment(command.experiment, flags)
        assert exit.value.code == 0
    elif isinstance(command, Distill):
        load_experiment(command.experiment, flags)  # exits for an unknown flag
    else:
        assert not flags or isinstance(command, Quickstart)


def test_flags_and_calls_in_the_text_exist(folder):
    # Inline: `ddistill methods`, `--fsdp 4`. Flags are those of a command, or of an experiment.
    kinds = [get_args(kind)[0] for kind in get_args(Command)]
    flags = {f"--{field.name.replace('_', '-')}" for kind in kinds for field in dataclasses.fields(kind)}
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE))
    for text in inline:
        if text.startswith("--") and text.split()[0] not in {"--help", *flags}:
            imported = text.startswith("--network.remat")
            name = "published/imagenet256_dit_consistency.py" if imported else "digits_kd.py"
            load_experiment(ROOT / "experiments" / name, [*text.split(), *_value_for(text)])
        if text.startswith("process."):
            assert callable(getattr(edm(), re.match(r"process\.(\w+)", text)[1]))
        if text.startswith("x0_from_"):
            assert callable(getattr(Process, text))
        if text.startswith("ddistill ") and len(text.split()) == 2:
            assert text.split()[1] in {get_args(kind)[1].name for kind in get_args(Command)}
    subprocess.run(["bash", str(ROOT / "tpu_setup.sh"), "--help"], check=True, capture_output=True)


def _value_for(text):
    return ["0.6"] if text == "--network.precondition.sigma-data" else []


def test_the_table_of_methods_is_that_of_the_package():
    rows = re.findall(r"^\| `(\w+)` \| .+? \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(METHODS)
    for name, paper, file in rows:
        assert METHODS[name].file in file
        assert METHODS[name].paper.split("arXiv:")[1] in paper


def test_the_quickstarts_table_and_text_are_its_published_rows():
    rows = json.loads((ROOT / "experiments/results/quickstart.json").read_text("utf-8"))["rows"]
    known = {(row["sampler"], row["nfe"]): row for row in rows}
    section = README.partition("### Digits: `ddistill quickstart`")[2].partition("\n### ")[0]
    assert f"Seed {Quickstart().seed}, " in section
    seen = []

    def check(sampler, calls, name, word):
        digits = len(word.partition(".")[2])
        assert known[sampler, calls][name] == pytest.approx(float(word), abs=0.5001 * 10**-digits), (sampler, name)
        seen.append((sampler, calls))

    for line in section.partition("|---|")[2].partition("\n\n")[0].splitlines()[1:]:
        sampler, calls, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for name, cell in zip(("accuracy", "frechet", "precision", "recall"), cells, strict=True):
            for n, word in zip(calls.split(" / "), cell.split(" / "), strict=True):
                check(sampler, None if n == "–" else int(n), name, word)
    assert set(seen) == set(known)
    text = " ".join(section.partition("Accuracy:")[2].split())
    teacher, *student, floor = re.search(
        r"held-out scans, (\S+) for the teacher with 35 calls and (\S+), (\S+), (\S+) for the student with 1, 2 and 4, "
        r"where the training scans themselves are at (\S+)\. ", text
    ).groups()  # fmt: skip
    check("teacher, Heun", 35, "frechet_held_out", teacher)
    for n, word in zip((1, 2, 4), student, strict=True):
        check("student", n, "frechet_held_out", word)
    check("held-out scans (floor)", None, "frechet", floor)
    four = re.search(
        r"teacher with 4 calls .*: precision (\S+) and coverage (\S+), but diversity (\S+)\. ", text
    ).groups()
    for name, word in zip(("precision", "coverage", "diversity"), four, strict=True):
        check("teacher, Euler", 4, name, word)


def test_linked_and_listed_files_exist():
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    links = [t.replace("\\_", "_") for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("http")]
    layout = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", README[README.index("## Layout") :], re.MULTILINE)
    listed = [path for cell in layout for path in re.findall(r"`([^`]+)`", cell)]
    assert len(links) > 5 and len(listed) > 20
    missing = [path for path in [*links, *listed] if not (ROOT / path).exists()]
    assert not missing


def test_writing_a_method_takes_under_forty_lines():
    assert len(FILES["training.py"].splitlines()) < 40


def test_example_asks_a_jump_to_equal_two_half_as_long():
    namespace = {}
    exec(compile(FILES["training.py"], "training.py", "exec"), namespace)
    process, key = edm(), jax.random.key(4)
    loss = namespace["Halves"](levels=2)(process).losses["student"]

    def net(a):  # the denoiser of data N(0, 1/4), times a
        return Net({"a": a}, {}, lambda p, r, x, t, c, **k: p["a"] * x * 0.25 / (0.25 + t[:, None] ** 2))

    x0 = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    nets = {"teacher": net(1.0)}
    value, gradient = jax.value_and_grad(
        lambda a: loss({**nets, "student": net(a)}, {"x": jnp.asarray(x0)}, Progress(0), key)[0]
    )(1.0)

    k_level, k_start, k_noise = jax.random.split(key, 3)
    length = 2 ** np.asarray(jax.random.randint(k_level, (16,), 1, 3))
    start = length * np.asarray(jax.random.randint(k_start, (16,), 0, 4 // length))
    assert {(2, 0), (2, 2), (4, 0)} == set(zip(length, start, strict=True))
    nodes = np.asarray(grids.karras(process, 4))
    t, m, s = (nodes[n][:, None] for n in (start, start + length // 2, start + length))
    x_t = x0 + t * np.asarray(jax.random.normal(k_noise, x0.shape))
    x_m = x_t * (0.25 + m * t) / (0.25 + t**2)  # a DDIM step of this denoiser
    x_s = x_m * (0.25 + s * m) / (0.25 + m**2)
    target, estimate = (x_s - s / t * x_t) / (1 - s / t), x_t * 0.25 / (0.25 + t**2)
    np.testing.assert_allclose(value, np.mean((estimate - target) ** 2), rtol=1e-4)
    np.testing.assert_allclose(gradient, np.mean(2 * (estimate - target) * estimate), rtol=1e-4)  # targets are fixed


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_run_as_experiments(name, folder):
    flags = [*TINY, "--data.count", "64", "--method.pairs", "16", "--method.teacher-steps", "2"]
    flags = flags if name == "moons.py" else [*TINY, "--method.levels", "2"]
    assert main(["distill", name, "--workdir", "run", *flags]) == 0
    assert main(["sample", "run", "--out", "x.npz", "--n", "4"]) == 0
    assert np.all(np.isfinite(np.load("x.npz")["x"]))


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: re.sub(r"\W+", " ", code.split("from ddistill")[-1][:40]))
def test_snippets_run(code, folder, capsys):
    if 'open_run("quickstart")' in code:
        assert main(["distill", "experiments/digits_consistency.py", "--workdir", "quickstart", *TINY]) == 0
    if 'ImageFolder("photos"' in code:
        for i in range(4):
            path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((70, 80, 3), 60 * i, np.uint8)).save(path)
    namespace = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    if "exact" in namespace:
        errors = [float(e) for e in re.findall(r"network calls, error ([\d.]+)", capsys.readouterr().out)]
        assert len(errors) == 3 and errors[0] > errors[1] > 0 and errors[0] > errors[2] > 0
    if "batch" in namespace:
        shapes = {name: array.shape for name, array in namespace["batch"].items()}
        assert shapes == {"x": (16, 64, 64, 3), "cond": (16,)} and set(namespace["batch"]["cond"]) <= {0, 1, 2}
    if "brightness" in namespace:
        assert namespace["brightness"].shape == (10, 8, 8, 1) and int(namespace["nfe"]) == 2
    if "stages" in namespace:
        process, student = namespace["process"], namespace["student"]
        noise = process.prior(jax.random.key(5), (2000, 2))
        x = sample.sample(student, process, [1.0, 0.0], noise).x
        assert np.std(np.asarray(x)[:, 0]) > 2 * np.std(np.asarray(x)[:, 1])  # the data's are 1 and .2
