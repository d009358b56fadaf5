"""tpu_setup.sh as far as it goes without a TPU: its words, the commands it would run, and a stand-in for gcloud."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tpu_setup.sh"


def run(*words, path=None, home=None):
    env = {**os.environ, **({"PATH": path} if path else {}), **({"HOME": str(home)} if home else {})}
    return subprocess.run(
        [shutil.which("bash"), str(SCRIPT), *words], env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def tools(tmp_path):
    """A folder with the few programs that the script calls, and no gcloud."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "dirname", "mktemp", "rm", "tar", "gzip", "bash"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_help_says_what_it_does_not_do():
    done = run("--help")
    assert done.returncode == 0
    for word in ("--here", "--name", "--dry-run", "does not do yet", "create"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say where to install"),
        (["--name", "pod"], "--zone is missing"),
        (["--zone", "z"], "--name is missing"),
        (["--name"], "--name needs a value"),
        (["--name", "--zone", "z"], "--name needs a value"),
        (["--speed", "9"], "unknown argument '--speed'"),
        (["--here", "--name", "pod"], "leave --name"),
        (["--name", "pod", "--zone", "z", "--slice"], "--slice belongs to --here"),
        (["--here", "--dry-run", "--python", "false"], "false is not Python 3.11"),
    ],
)
def test_wrong_arguments_are_met_with_words(words, message):
    done = run(*words)
    assert done.returncode == 2
    assert message in done.stderr


def test_missing_gcloud_and_missing_python_say_what_to_do(tools, tmp_path):
    done = run("--name", "pod", "--zone", "z", path=str(tools))
    assert done.returncode == 2 and "Install the Google Cloud CLI" in done.stderr.replace("install", "Install")
    done = run("--here", path=str(tools), home=tmp_path)
    assert done.returncode == 2 and "--install-python" in done.stderr
    done = run("--here", "--dry-run", "--install-python", path=str(tools), home=tmp_path)
    assert done.returncode == 0 and "+ sudo apt-get install --yes python3.11 python3.11-venv" in done.stdout


def test_dry_run_prints_the_commands_and_runs_none(tools, tmp_path):
    done = run("--name", "pod", "--zone", "us-central2-b", "--project", "p", "--dry-run", path=str(tools))
    assert done.returncode == 0
    copy, install = (line for line in done.stdout.splitlines() if line.startswith("+ gcloud"))
    where = "--zone us-central2-b --worker=all --project p"
    assert copy.startswith("+ gcloud compute tpus tpu-vm scp ") and copy.endswith(where)
    assert install.startswith(f"+ gcloud compute tpus tpu-vm ssh pod {where} --command ")
    venv = tmp_path / "with space" / "venv"
    done = run("--here", "--dry-run", "--venv", str(venv))
    assert done.returncode == 0 and "[tpu]" in done.stdout.replace("\\", "") and not venv.exists()


def test_the_source_that_workers_get_installs_itself(tools, tmp_path):
    # A gcloud that keeps what it is given: the archive must hold a checkout whose script plans its installation.
    gcloud = tools / "gcloud"
    gcloud.write_text(
        f'#!/bin/bash\nif [[ $4 == scp ]]; then cat "$5" > {tmp_path}/sent.tar.gz; fi\necho "$@" >> {tmp_path}/log\n'
    )
    gcloud.chmod(0o755)
    done = run("--name", "pod", "--zone", "z", "--venv", "v", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert "--here --slice --venv v" in (tmp_path / "log").read_text()
    with tarfile.open(tmp_path / "sent.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there"
    assert (there / "ddistill" / "mixtures" / "ring8.npz").is_file() and (there / "README.md").is_file()
    plan = subprocess.run(
        ["bash", str(there / "tpu_setup.sh"), "--here", "--slice", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install --upgrade" in plan.stdout
