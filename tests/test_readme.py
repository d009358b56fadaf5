"""The README, run: its Python blocks, its commands and flags, and the files it names."""

import re
import shlex
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddistill import Process, edm, from_nnx, sample
from ddistill.cli import Distill, Quickstart, commands, main
from ddistill.methods import METHODS
from ddistill.net import EDMPrecondition
from ddistill.networks import MLP
from ddistill.runs import load_experiment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    *("--network.width", "16", "--network.blocks", "1"),
    *("--teacher.steps", "2", "--steps", "2", "--batch-size", "8"),
]


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
    assert {words[1] for words in DDISTILL} == {"quickstart", "distill", "sample", "evaluate", "bench"}


@pytest.mark.parametrize("words", DDISTILL, ids=" ".join)
def test_every_command_line_parses(words, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "run", lambda command, flags: seen.append((command, flags)))
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
    # Inline: `ddistill methods`, `--fsdp 4`. Those in the tables and paragraphs belong to distill, except tpu_setup's.
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE))
    for text in inline:
        if text.startswith("--") and text != "--help":
            load_experiment(ROOT / "experiments" / "digits_kd.py", [*text.split(), *_value_for(text)])
        if text.startswith("process."):
            assert callable(getattr(edm(), re.match(r"process\.(\w+)", text)[1]))
        if text.startswith("x0_from_"):
            assert callable(getattr(Process, text))
        if text.startswith("ddistill ") and len(text.split()) == 2:
            assert text.split()[1] in {"methods", "quickstart"}
    subprocess.run(["bash", str(ROOT / "tpu_setup.sh"), "--help"], check=True, capture_output=True)


def _value_for(text):
    return ["0.6"] if text == "--network.precondition.sigma-data" else []


def test_the_table_of_methods_is_that_of_the_package():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    done = {name: (paper, file) for name, _, paper, file, status in rows if status == "done, tested"}
    assert done.keys() == METHODS.keys()
    for name, (paper, file) in done.items():
        assert METHODS[name].file in file
        assert METHODS[name].paper.split("arXiv:")[1] in paper
    planned = {name: file for name, _, _, file, status in rows if status == "planned"}
    assert len(done) + len(planned) == len(rows) == 10
    assert set(planned.values()) == {"–"}


def test_linked_and_listed_files_exist():
    links = [t.replace("\\_", "_") for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    layout = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", README[README.index("## Layout") :], re.MULTILINE)
    listed = [path for cell in layout for path in re.findall(r"`([^`]+)`", cell)]
    assert len(links) > 5 and len(listed) > 20
    missing = [path for path in [*links, *listed] if not (ROOT / path).exists()]
    assert not missing


def test_writing_a_method_takes_under_forty_lines():
    assert len(FILES["training.py"].splitlines()) < 40


def test_example_is_consistency_training():
    # Song et al. 2023, eq. 10: the same noise at both times, and the less noisy estimate a constant.
    namespace = {}
    exec(compile(FILES["training.py"], "training.py", "exec"), namespace)
    process = edm()
    loss = namespace["ConsistencyTraining"](intervals=3)(process).losses["student"]
    net = from_nnx(MLP(3, 8, 1, rngs=nnx.Rngs(0)), process, EDMPrecondition())
    x0 = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    key = jax.random.key(4)
    value, gradient = jax.value_and_grad(
        lambda p: loss({"student": net.replace(params=p)}, {"x": jnp.asarray(x0)}, jnp.zeros(()), key)[0]
    )(net.params)

    k_i, k_noise = jax.random.split(key)
    i = np.asarray(jax.random.randint(k_i, (8,), 0, 3))
    assert set(i) == {0, 1, 2}
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7  # Karras et al. 2022, eq. 5
    t, s = np.float32([80, middle, 0.002])[i], np.float32([middle, 0.002, 0])[i]
    noise = np.asarray(jax.random.normal(k_noise, x0.shape))
    at_s = x0 + s[:, None] * noise
    target = np.where(s[:, None] == 0, at_s, np.asarray(net(at_s, s, None, s=0.0)))  # f(x, 0) = x

    def expected(params):
        estimate = net.replace(params=params)(x0 + t[:, None] * noise, t, None, s=0.0)
        c = 0.00054 * np.sqrt(3)
        return jnp.mean((jnp.sqrt(jnp.sum((estimate - target) ** 2, axis=1) + c**2) - c) / (t - s))

    value_2, gradient_2 = jax.value_and_grad(expected)(net.params)
    np.testing.assert_allclose(value, value_2, rtol=1e-3)
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), gradient, gradient_2)


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_run_as_experiments(name, folder):
    flags = [*TINY, "--data.count", "64", "--method.pairs", "16", "--method.teacher-steps", "2"]
    flags = flags if name == "moons.py" else [*TINY, "--method.intervals", "4"]
    assert main(["distill", name, "--workdir", "run", *flags]) == 0
    assert main(["sample", "run", "--out", "x.npz", "--n", "4"]) == 0
    assert np.all(np.isfinite(np.load("x.npz")["x"]))


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: re.sub(r"\W+", " ", code.split("from ddistill")[-1][:40]))
def test_snippets_run(code, folder, capsys):
    if 'open_run("quickstart")' in code:
        assert main(["distill", "experiments/digits_consistency.py", "--workdir", "quickstart", *TINY]) == 0
    namespace = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    if "exact" in namespace:
        errors = [float(e) for e in re.findall(r"network calls, error ([\d.]+)", capsys.readouterr().out)]
        assert len(errors) == 3 and errors[0] > errors[1] > 0 and errors[0] > errors[2] > 0
    if "brightness" in namespace:
        assert namespace["brightness"].shape == (10, 8, 8, 1) and int(namespace["nfe"]) == 2
    if "stages" in namespace:
        process, student = namespace["process"], namespace["student"]
        noise = process.prior(jax.random.key(5), (2000, 2))
        x = sample.sample(student, process, [1.0, 0.0], noise).x
        assert np.std(np.asarray(x)[:, 0]) > 2 * np.std(np.asarray(x)[:, 1])  # the data's are 1 and .2
