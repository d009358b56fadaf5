"""Work folders in buckets: a file system in memory takes the place of s3://, with failures on demand."""

import json
import threading
from pathlib import Path

import fsspec
import jax.numpy as jnp
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from test_runs import TINY, Stop, leaves_equal

from ddistill import storage
from ddistill.checkpoint import CheckpointError, Checkpoints
from ddistill.log import Silent
from ddistill.runs import distil, load_experiment, open_run, read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


class Unreachable(Exception):
    """Of no kind that Python has, like those of the libraries of buckets."""


class Bucket(MemoryFileSystem):
    """s3:// in memory; `failures` more calls fail."""

    protocol = ("s3",)
    store: dict = {}  # noqa: RUF012  # as in the class it is of
    pseudo_dirs = [""]  # noqa: RUF012
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("s3://"))

    def _fail(self):
        if Bucket.failures:
            Bucket.failures -= 1
            raise Unreachable("Could not connect to the endpoint URL")

    def ls(self, path, detail=True, **kwargs):
        self._fail()
        return super().ls(path, detail=detail, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        self._fail()
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket():
    """An empty bucket."""
    before = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.failures = 0
    yield Bucket
    Bucket.failures = 0
    backend.fsspec_backend._get_filesystem.cache_clear()
    if before is not None:
        fsspec.register_implementation("s3", before, clobber=True)


def tree(value):
    return {"w": jnp.full(5000, value) * jnp.arange(5000.0), "n": jnp.asarray(int(value))}


def test_a_run_in_a_bucket_resumes_and_is_read_back_with_the_bits_of_one_on_disk(bucket, tmp_path):
    whole = distil(TINY, tmp_path / "disk")
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, "s3://bucket/run", Stop("student", 4))
    assert json.loads(bucket.store["/bucket/run/experiment.json"].getvalue())["overrides"] == []
    resumed = distil(TINY, Path("s3://bucket/run"))  # pathlib eats a slash
    assert leaves_equal(resumed.student, whole.student) and leaves_equal(resumed.teacher, whole.teacher)
    assert leaves_equal(open_run("s3://bucket/run", TINY).student, whole.student)
    rows = read_metrics("s3://bucket/run")["student"]
    assert [row["step"] for row in rows] == [3, 4, 5]
    last = read_metrics(tmp_path / "disk")["student"][-1]
    assert rows[-1]["student/loss"] == last["student/loss"]
    assert any(name.startswith("/bucket/run/events/") for name in bucket.store)
    with pytest.raises(ValueError, match="s3://bucket/other is not empty and is not the folder of a run"):
        bucket.store["/bucket/other/x"] = bucket.store["/bucket/run/experiment.json"]
        distil(TINY, "s3://bucket/other", Silent())


def test_an_experiment_is_read_from_a_bucket(bucket):
    file = "from ddistill import quickstart\n\n\ndef experiment():\n    return quickstart.experiment()\n"
    path = storage.folder("s3://bucket/e.py")
    path.write_text(file)
    assert load_experiment("s3://bucket/e.py", ["--seed", "3"]).seed == 3


def test_checkpoints_in_a_bucket_are_checked_and_the_newest_two_kept(bucket):
    with Checkpoints("s3://bucket/c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step))
    assert {name.split("/")[3] for name in bucket.store} <= {"2", "3", ".writable"}
    largest = max(
        (n for n in bucket.store if n.startswith("/bucket/c/3/")), key=lambda n: len(bucket.store[n].getvalue())
    )
    content = bytearray(bucket.store[largest].getvalue())
    content[len(content) // 2] ^= 4
    storage.folder(f"s3:/{largest}").write_bytes(bytes(content))
    told: list[str] = []
    with Checkpoints("s3://bucket/c", tell=told.append) as checkpoints:
        assert checkpoints.latest() == 2 and int(checkpoints.restore(tree(0))["n"]) == 2
    assert "s3://bucket/c/3 is damaged and skipped" in told[0] and "other bytes" in told[0]


def test_a_bucket_that_cannot_be_reached_is_tried_again_and_then_told_of(bucket):
    told: list[str] = []
    bucket.failures = 2
    with Checkpoints("s3://bucket/c", pauses=(0, 0), patience=0, tell=told.append) as checkpoints:
        assert len(told) == 2 and "cannot reach s3://bucket/c, tried again in 0 s: Could not connect" in told[0]
        checkpoints.save(1, tree(1), wait=True)
        bucket.failures = 1
        checkpoints.save(2, tree(2), wait=True)
        assert "cannot reach" in told[-1] or "step 2 failed" in told[-1]
        bucket.failures = 10**6
        words = r"cannot save step 3 to s3://bucket/c in 4 tries: Could not connect.*none that is seen"
        with pytest.raises(CheckpointError, match=words):
            checkpoints.save(3, tree(3), wait=True)
        assert "the state is kept in memory for one more try in 0 s" in told[-1]
        with pytest.raises(CheckpointError, match=r"cannot reach s3://bucket/c in 3 tries: Could not.*Is the bucket"):
            checkpoints.latest()
        bucket.failures = 0
        checkpoints.save(3, tree(3), wait=True)
    with Checkpoints("s3://bucket/c") as checkpoints:
        assert int(checkpoints.restore(tree(0))["n"]) == 3
        bucket.failures = 10**6
    with pytest.raises(CheckpointError, match="cannot reach s3://bucket/c"):
        Checkpoints("s3://bucket/c", pauses=())


def test_what_no_second_try_mends_is_not_tried_again():
    calls = []

    def work():
        calls.append(1)
        raise PermissionError("403")

    with pytest.raises(PermissionError):
        storage.retried(work, "read", pauses=(0, 0))
    assert len(calls) == 1


def test_a_file_on_disk_is_written_whole_and_of_many_that_claim_it_one_wins(tmp_path):
    barrier, won = threading.Barrier(8), []

    def claim(i):
        barrier.wait()
        if storage.put(tmp_path / "claim", f"{i}".encode() * 1000, new=True):
            won.append(i)

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (tmp_path / "claim").read_text() == f"{won[0]}" * 1000
    assert storage.put(tmp_path / "claim", b"x") and (tmp_path / "claim").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["claim"]


def test_a_log_that_cannot_be_copied_stays_on_disk_and_is_told_of(bucket):
    told: list[str] = []
    target = storage.folder("s3://bucket/run")
    with storage.mirrored(target, pauses=(), tell=told.append) as local:
        (local / "notes.txt").write_text("a")
        bucket.failures = 10**6
    bucket.failures = 0
    assert "cannot copy the log to s3://bucket/run" in told[0] and (local / "notes.txt").read_text() == "a"
    (target / "notes.txt").write_text("before\n")
    with storage.mirrored(target, every=0.01) as local, (local / "notes.txt").open("a") as file:
        file.write("after\n")
    assert bucket.store["/bucket/run/notes.txt"].getvalue() == b"before\nafter\n"
    assert not local.exists()
    assert list(bucket.store) == ["/bucket/run/notes.txt"]
    for name in (
        "metrics.jsonl",
        "notes.txt",
        "log.txt",
        "wandb.txt",
        "previews/numbers.jsonl",
    ):  # a later start goes on with all that the first one wrote
        for start in ("one\n", "two\n"):
            with storage.mirrored(target, every=60) as local:
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                with (local / name).open("a") as file:
                    file.write(start)
        assert bucket.store[f"/bucket/run/{name}"].getvalue().endswith(b"one\ntwo\n")
