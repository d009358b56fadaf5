"""What training survives: damaged checkpoints, signals, a full disk, being killed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddistill import hosts, seals
from ddistill.checkpoint import CheckpointError, Checkpoints
from ddistill.cli import commands, main
from ddistill.log import RunLog, Silent
from ddistill.methods.base import Method, Sampling
from ddistill.net import Net
from ddistill.runs import read_metrics
from ddistill.signals import Stop, Stopped, on_signals
from ddistill.stages import Stage, run

pytestmark = pytest.mark.usefixtures("one_device")
CHAOS = Path(__file__).parents[1] / "experiments" / "bench" / "chaos.py"


def net(w):
    return Net({"w": jnp.asarray(w, jnp.float32)}, {}, lambda params, rest, x, t, cond, *, s, key: params["w"] * x)


def loss(nets, batch, progress, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return jnp.mean((nets["student"](batch["x"], 1.0) - nets["teacher"](batch["x"], 1.0) - noise) ** 2), {}


def batches(step):
    return {"x": np.random.default_rng(step).normal(size=(16, 2)).astype(np.float32)}


METHOD = Method({"student": loss}, {"student": lambda teacher, key, space: net([0.0, 1.0])}, Sampling(lambda n: [1, 0]))


def train(folder=None, source=batches, steps=8, **kwargs):
    stage = Stage("s", METHOD, steps, lambda teacher: source, lambda steps: optax.adam(0.1))
    return run([stage], net([2.0, 3.0]), jax.random.key(0), workdir=folder, **kwargs)[0].params["w"]


@pytest.fixture(scope="module")
def undisturbed(one_device):
    return train()


def tree(value):
    return {"w": jnp.full(5000, value) * jnp.arange(5000.0), "n": jnp.asarray(int(value))}


def saved(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step))


def restored(folder, told=None):
    with Checkpoints(folder, tell=(told if told is not None else []).append) as checkpoints:
        return int(checkpoints.restore(tree(0))["n"])


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "words"), [(flip, "other bytes"), (cut, "bytes of"), (os.remove, "cannot be read \\(No such file")]
)
def test_a_damaged_step_is_named_and_skipped_for_the_one_before(tmp_path, harm, words):
    saved(tmp_path, 3, 5)
    harm(largest(tmp_path / "5"))
    with (
        pytest.warns(UserWarning, match=f"{tmp_path / '5'} is damaged and skipped.*{words}"),
        Checkpoints(tmp_path) as c,
    ):
        assert c.latest() == 3 and int(c.restore(tree(0))["n"]) == 3
        with pytest.raises(CheckpointError, match="5 is damaged"):
            c.restore(tree(0), 5)
        c.save(5, tree(50))  # in the place of the damaged one
    assert restored(tmp_path) == 50


def test_every_file_of_a_step_is_checked_and_checksums_that_are_damaged_are_damage_too(tmp_path):
    saved(tmp_path / "whole", 5)
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "5").rglob("*") if p.stat().st_size]
    files = [p for p in files if (tmp_path / "whole" / p).is_file()]
    assert len(files) > 5
    for i, name in enumerate(files):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        flip(folder / name)
        with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged: step 5"):
            restored(folder)


def test_where_all_are_damaged_the_files_are_kept_and_nothing_is_trained(tmp_path):
    train(tmp_path, checkpoint_every=4)
    for step in ("4", "8"):
        flip(largest(tmp_path / "checkpoints" / "s" / step))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"damaged: step 4, .*; step 8, .*left as they are.*begin anew"):
        train(tmp_path, source=None, log=Silent())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_goes_on_from_the_step_before_a_damaged_one_and_says_so(tmp_path, undisturbed):
    with pytest.raises(Stopped):
        train(tmp_path, checkpoint_every=2, ahead=0, source=asks(stop := Stop(), 5), stop=stop)
    flip(largest(tmp_path / "checkpoints" / "s" / "6"))
    log = Silent()
    np.testing.assert_array_equal(train(tmp_path, log=log, log_every=1), undisturbed)
    assert [row["step"] for row in log.rows] == [5, 6, 7, 8]
    assert len(log.notes) == 1 and "6 is damaged" in log.notes[0]


def test_an_unfinished_step_is_absent_and_removed_by_the_next_save(tmp_path):
    saved(tmp_path, 3, 5)
    (tmp_path / "5" / "checksums.0-of-1.json").unlink()
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    told = []
    assert restored(tmp_path, told) == 3 and told == []
    shutil.rmtree(tmp_path / "3")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore(tree(0))
        checkpoints.save(6, tree(6))
    assert [p.name for p in tmp_path.iterdir()] == ["6"]


def test_the_newest_two_are_kept_and_shares_of_several_processes_make_one_step(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    step = tmp_path / "4"
    (step / "checksums.0-of-1.json").unlink()
    for part in range(3):
        assert not seals.is_sealed(step)
        seals.seal(step, part, 3)
    assert seals.is_sealed(step) and restored(tmp_path) == 4
    flip(largest(step))
    assert sum(bool(seals.damage(step, part, 2)) for part in range(2)) == 1, "two processes share the reading"


def failing(monkeypatch, times, where="seal"):
    """Let writing fail so many times, as on a full disk."""
    kept, calls = getattr(seals, where), []

    def write(*args):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(28, "No space left on device")
        return kept(*args)

    monkeypatch.setattr(seals, where, write)
    return calls


@pytest.mark.parametrize("where", ["seal", "remove"])  # in the thread, and before it
def test_a_save_that_fails_is_tried_again_and_nothing_saved_is_lost(tmp_path, monkeypatch, where):
    saved(tmp_path, 3)
    failing(monkeypatch, 2, where)
    told = []
    with Checkpoints(tmp_path, pauses=(0, 0), tell=told.append) as checkpoints:
        checkpoints.save(5, tree(5), wait=True)
    assert len(told) == 2 and "step 5 failed and is tried again in 0 s: [Errno 28] No space left" in told[0]
    assert restored(tmp_path) == 5
    failing(monkeypatch, 99, where)
    with Checkpoints(tmp_path, pauses=(0, 0), patience=0, tell=told.append) as checkpoints:
        words = r"cannot save step 7 .* in 4 tries: .*No space left.*still there: \[3, 5\]. Make room"
        with pytest.raises(CheckpointError, match=words):
            checkpoints.save(7, tree(7), wait=True)
    assert re.search(r"in 3 tries: .*Make room.*: the state is kept in memory for one more try in 0 s", told[-1])
    assert restored(tmp_path) == 5
    if where == "seal":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "5"], "what fills the disk is not left there"


def test_a_save_that_failed_in_the_background_is_made_good_by_the_training_that_went_on(
    tmp_path, monkeypatch, undisturbed
):
    failing(monkeypatch, 1)
    log = Silent()
    np.testing.assert_array_equal(train(tmp_path, checkpoint_every=3, log=log), undisturbed)
    assert any("could not be written ([Errno 28] No space" in note for note in log.notes)
    assert restored_step(tmp_path) == 8


def restored_step(folder):
    with Checkpoints(folder / "checkpoints" / "s") as checkpoints:
        return checkpoints.latest()


def asks(stop, at, number=signal.SIGTERM):
    """Batches, and a request to stop in the midst of step `at`."""

    def source(step):
        if step == at:
            stop.request(number)
        return batches(step)

    return source


def test_a_stop_saves_the_step_and_the_same_call_goes_on_with_the_same_bits(tmp_path, undisturbed):
    log = Silent()
    with pytest.raises(Stopped, match="stage 's' is stopped and saved at step 4 of 8") as stopped:
        train(tmp_path, ahead=0, source=asks(stop := Stop(), 3), stop=stop, log=log, log_every=2)
    assert stopped.value.status == 75 and restored_step(tmp_path) == 4
    np.testing.assert_array_equal(train(tmp_path, log=log, log_every=2), undisturbed)
    assert [row["step"] for row in log.rows] == [2, 4, 6, 8]
    with pytest.raises(Stopped, match="is stopped at step 1 of 8") as stopped:
        train(ahead=0, source=asks(stop := Stop(), 0, signal.SIGINT), stop=stop)
    assert stopped.value.status == 130


def test_signals_are_heard_in_the_block_only_and_a_second_one_does_not_wait():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        with on_signals() as stop:
            assert not stop.now()
            with pytest.raises(Stopped) as stopped, stop.watch():
                os.kill(os.getpid(), number)
                assert stop.now()
                os.kill(os.getpid(), number)
                raise AssertionError("the second signal did not stop")
            assert stopped.value.status == status
        with on_signals() as stop, pytest.raises(Stopped):
            os.kill(os.getpid(), number)  # nothing is training that could be saved
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_thread_other_than_the_main_one_leaves_the_handlers_alone():
    def inside():
        with on_signals() as stop:
            found.append((stop.now(), signal.getsignal(signal.SIGTERM)))

    found: list = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGTERM))]


def test_the_command_leaves_with_75_when_preempted_and_says_how_to_go_on(monkeypatch, capsys):
    def preempted(*_):
        raise Stopped("stage 's' is stopped and saved at step 4 of 8")

    monkeypatch.setattr(commands, "run", preempted)
    assert main(["distill", "x.py"]) == 75
    told = capsys.readouterr().err
    assert "saved at step 4 of 8. The same command goes on" in told


def test_the_command_asks_for_a_later_try_where_another_trains(monkeypatch, capsys):
    def busy(*_):
        raise hosts.Busy("another process, 7, is training in runs/x")

    monkeypatch.setattr(commands, "run", busy)
    assert main(["distill", "x.py"]) == 75
    assert capsys.readouterr().err == "ddistill: another process, 7, is training in runs/x\n"


def test_a_signal_while_the_last_step_is_saved_is_not_forgotten(tmp_path, undisturbed):
    stop, save = Stop(), Checkpoints.save

    def told(checkpoints, step, tree, *, wait):
        save(checkpoints, step, tree, wait=wait)
        stop.request()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="saved at step 8 of 8") as stopped:
        patch.setattr(Checkpoints, "save", told)
        train(tmp_path, stop=stop)
    assert stopped.value.status == 75 and not stopped.value.together
    np.testing.assert_array_equal(train(tmp_path, source=None), undisturbed)


def test_a_process_that_leaves_alone_does_not_wait_for_others_and_one_that_leaves_with_them_does(monkeypatch):
    ended, waited, others = [], [], threading.Event()
    monkeypatch.setattr(hosts, "PATIENCE", 0.1)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: waited.append(others.wait(20)))  # they do not leave
    assert hosts.leave(Stopped("told"), 75) == 75 and not ended, "there are no others"
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert hosts.leave(Stopped("told", together=True), 75) == 75 and not ended
    for why, status in ((Stopped("told"), 75), (KeyboardInterrupt(), 130), (ValueError("of this one"), 2)):
        hosts.leave(why, status)
        assert ended.pop() == status and not ended and not waited
    others.set()


def test_processes_that_are_connected_leave_at_once_outside_a_training_and_with_jax_within(tmp_path):
    script = tmp_path / "connected.py"
    script.write_text(CONNECTED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(script), str(port)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["75", "75", "130", "together", "75"]


CONNECTED = """
import ctypes, os, signal, sys, threading, time
from unittest import mock

import jax

from ddistill import hosts
from ddistill.launchers import Cluster, Peers
from ddistill.signals import Stopped, on_signals


def told():  # while it waits in compiled code, where Python's handlers do not run
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


one = Cluster("one", f"localhost:{sys.argv[1]}", 1, 0)
try:
    with mock.patch.object(hosts, "found", lambda *_: one), mock.patch.object(jax, "device_count", told):
        hosts.join(Peers())
except Stopped as stopped:
    print(stopped.status)


def tell(number, stop):
    try:
        os.kill(os.getpid(), number)
        while not stop.now():  # JAX looks once a second
            time.sleep(0.01)
        print("together")
    except Stopped as stopped:
        print(stopped.status)


for number in (signal.SIGTERM, signal.SIGINT):
    with on_signals() as stop:
        tell(number, stop)
with on_signals() as stop, stop.watch():
    tell(signal.SIGINT, stop)
    tell(signal.SIGTERM, stop)
"""


def test_a_row_that_a_kill_cut_off_does_not_swallow_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1, "loss": 1.0}\n{"stage": "a", "st')
    for step in (2, 3):
        with RunLog(tmp_path) as log:
            log.start("a", 1, 3)
            log.metrics(step, {"loss": step})
    assert [row["step"] for row in read_metrics(tmp_path)["a"]] == [1, 2, 3]
    assert "\n\n" not in (tmp_path / "metrics.jsonl").read_text()


def test_runs_killed_at_random_moments_and_within_saves_end_with_the_bits_of_an_undisturbed_one(tmp_path):
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")  # one device
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "4", "--processes", "1"],
        capture_output=True, text=True, check=False, cwd=CHAOS.parents[2],
        env={**os.environ, "XLA_FLAGS": flags, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost" in done.stdout and "lost: 0" in done.stdout and "ends: 1" in done.stdout
