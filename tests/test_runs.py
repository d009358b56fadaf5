"""Runs: overrides, work folders, resuming, reading back."""

import dataclasses
import errno
import functools
import json
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen

import jax
import numpy as np
import pytest

from ddistill import hosts, quickstart, runs, seals, storage
from ddistill.checkpoint import CheckpointError
from ddistill.config import Data, Experiment, Imported, MLPNetwork, Optimizer, PairsData, Teacher
from ddistill.data.pair_store import open_pairs, write_pairs
from ddistill.integrators import euler, heun
from ddistill.log import Silent
from ddistill.losses.distances import L2, PseudoHuber
from ddistill.methods import KD, Consistency
from ddistill.overrides import describe, differences, override
from ddistill.process import edm
from ddistill.runs import distil, load_experiment, open_run, read_metrics, stages


@dataclasses.dataclass(frozen=True)
class Plane:
    """64 points of a plane in two classes."""

    classes: int = 2

    def load(self) -> Data:
        x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32) / 2
        cond = (x[:, 0] > 0).astype(np.int32)
        return Data({"x": x, "cond": cond} if self.classes else {"x": x}, (2,), self.classes)


TINY = Experiment(
    name="tiny",
    method=Consistency(intervals=4, max_intervals=8, solver=euler),
    data=Plane(),
    network=MLPNetwork(width=8, blocks=1),
    teacher=Teacher(steps=3),
    steps=5,
    batch_size=8,
    log_every=1,
    checkpoint_every=2,
)


pytestmark = pytest.mark.usefixtures("one_device")


def leaves_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


class Stop(Silent):
    """A log that kills the run when a stage reaches a step."""

    def __init__(self, stage, step):
        super().__init__()
        self.at = stage, step

    def progress(self, step):
        if (self._stage, step) == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole():
    return distil(TINY)


def test_every_plain_field_is_a_flag_however_deep():
    flags = (
        "--optimizer.learning-rate 3e-4 --steps 7 --method.intervals 20 --network.width 64 --process.t-max 40 "
        "--method.distance.scale 0.5 --network.precondition.sigma-data 1 --teacher.method.times.std 2 "
        "--optimizer.no-decay --guidance 2 --name other --data.seed 3"
    )
    changed = override(quickstart.experiment(), flags.split(), "test")
    before = quickstart.experiment()
    assert changed.optimizer == dataclasses.replace(before.optimizer, learning_rate=3e-4, decay=False)
    assert (changed.steps, changed.name, changed.guidance, changed.data.seed) == (7, "other", 2.0, 3)
    assert changed.method == dataclasses.replace(before.method, intervals=20, distance=PseudoHuber(0.5))
    assert (changed.network.width, changed.network.precondition.sigma_data) == (64, 1.0)
    assert (changed.process.t_max, changed.process.t_min) == (40.0, before.process.t_min)
    assert changed.process.schedule == before.process.schedule
    assert changed.teacher.method.times.std == 2.0
    assert override(before, [], "test") == before


@dataclasses.dataclass(frozen=True)
class Odd:
    """Fields of all kinds."""

    pair: tuple[int, ...] = (1, 2)
    maybe: int | None = None
    call: object = heun
    bound: object = functools.partial(heun, 3)
    table: tuple[float, ...] = tuple(range(1000))
    array: object = dataclasses.field(default_factory=lambda: np.arange(3.0))


def test_overrides_of_tuples_and_optional_fields_and_what_stays_fixed():
    changed = override(Odd(), ["--pair", "5", "6", "7", "--maybe", "3"], "test")
    assert (changed.pair, changed.maybe, changed.call) == ((5, 6, 7), 3, heun)
    for flag in ("--call", "--table", "--array=1"):
        with pytest.raises(ValueError, match="is set in the experiment's file"):
            override(Odd(), [flag, "1"], "test")


def test_an_unknown_flag_and_a_wrong_type_get_words(capsys):
    with pytest.raises(ValueError, match="--optimizer.learnign-rate: .* did you mean learning-rate"):
        override(quickstart.experiment(), ["--optimizer.learnign-rate", "1"], "ddistill distill x.py")
    with pytest.raises(SystemExit):
        override(quickstart.experiment(), ["--steps", "many"], "ddistill distill x.py")
    assert "many" in capsys.readouterr().err


def test_describe_is_json_and_differences_name_the_fields():
    described = describe(quickstart.experiment())
    assert json.loads(json.dumps(described)) == described
    assert described["method"]["solver"].endswith(".heun")
    assert differences(described, described) == []
    other = describe(dataclasses.replace(quickstart.experiment(), method=KD(), steps=1))
    told = "; ".join(differences(described, other))
    assert "method: ddistill.methods.consistency.Consistency before, ddistill.methods.kd.KD now" in told
    assert "steps: " in told and "optimizer" not in told
    assert differences(describe(L2()), describe(PseudoHuber()))
    odd = describe(Odd())
    assert odd == describe(Odd()), "no memory addresses"
    assert odd != describe(Odd(array=np.arange(4.0)))


MADE = """
from ddistill import Experiment
from ddistill.methods import KD

def experiment():
    return Experiment({})
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "no function `experiment`"),
        ("def experiment():\n    return 3\n", "answered int"),
        ("def experiment():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("\ndef experiment(:\n", r"wrong.py, line 2: SyntaxError: invalid syntax \(in: def experiment\(:\)"),
        ("import torchy\n", r"line 1: ModuleNotFoundError: .*torchy' \(in: import torchy\)"),
        (MADE.format("'x', KD"), r"line 6: ValueError: method is the class KD: write KD\(\)"),
        (MADE.format("'x', 'kd'"), "method = 'kd' is no method"),
        (MADE.format("'x', KD(), 'photos'"), r"data = 'photos' has no load\(\): give a dataset, ImageFolder\("),
        (MADE.format("'x', KD(), network='mlp'"), r"network = 'mlp' has no build\(\)"),
    ],
)
def test_a_wrong_experiment_file_gets_words(tmp_path, monkeypatch, text, words):
    (tmp_path / "wrong.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "wrong.py", "wrong.py"):
        with pytest.raises(ValueError, match=words):
            load_experiment(path)


def test_a_missing_experiment_file_gets_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; an experiment is a Python file"):
        load_experiment(tmp_path / "none.py")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_experiment(tmp_path)
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="not a Python file"):
        load_experiment(tmp_path / "text.txt")


@pytest.mark.parametrize(("stage", "step"), [("teacher", 1), ("student", 3)])
def test_an_interrupted_run_resumes_to_exactly_the_uninterrupted_one(tmp_path, whole, stage, step):
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, tmp_path, Stop(stage, step))
    resumed = distil(TINY, tmp_path, Silent())
    assert leaves_equal(resumed.student, whole.student) and leaves_equal(resumed.teacher, whole.teacher)


def test_resuming_goes_on_from_the_checkpoint_and_a_finished_run_trains_no_more(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, tmp_path, Stop("student", 4))
    log = Silent()
    distil(TINY, tmp_path, log)
    assert [(row["stage"], row["step"]) for row in log.rows] == [("student", s) for s in (3, 4, 5)]
    log = Silent()
    distil(TINY, tmp_path, log)
    assert log.rows == []


def test_a_run_is_read_back_without_training(tmp_path, whole):
    distil(TINY, tmp_path)
    opened = open_run(tmp_path, TINY)
    assert leaves_equal(opened.student, whole.student) and leaves_equal(opened.teacher, whole.teacher)
    assert not leaves_equal(opened.student, opened.teacher)
    metrics = read_metrics(tmp_path)
    assert [row["step"] for row in metrics["teacher"]] == [1, 2, 3]
    assert all(np.isfinite(row["student/loss"]) for row in metrics["student"])
    with pytest.raises(FileNotFoundError, match="pass the experiment"):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="seed: 0 before, 1 now"):
        open_run(tmp_path, dataclasses.replace(TINY, seed=1))
    # By a version whose method lacked one field and had another; to train on it is another matter.
    record = json.loads((tmp_path / "experiment.json").read_text())
    method = record["experiment"]["method"]
    method["of_before"] = method.pop("weighted")
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    assert leaves_equal(open_run(tmp_path, TINY).student, whole.student)
    with pytest.raises(
        ValueError, match=r"method\.of_before: True before, absent now; method\.weighted: absent before"
    ):
        distil(TINY, tmp_path, Silent())


def test_metrics_of_repeated_steps_are_read_once_and_a_torn_line_not_at_all(tmp_path):
    rows = [{"stage": "a", "step": s, "loss": v} for s, v in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, 3.5))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "a", "st')
    assert [row["loss"] for row in read_metrics(tmp_path)["a"]] == [1.0, 2.5, 3.5]


def test_metrics_after_the_step_that_a_run_went_back_to_are_those_told_since(tmp_path):
    # Killed after step 8 and begun again at 4, with reports every third step; then rolled back below its first report.
    told = (("a", 2), ("a", 4), ("a", 6), ("b", 9), ("a", 8), ("a", 6), ("b", 12), ("a", 7))

    def steps(rows):
        lines = [json.dumps({"stage": stage, "step": step, "loss": i}) for i, (stage, step) in enumerate(rows)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return {stage: [(row["step"], row["loss"]) for row in kept] for stage, kept in read_metrics(tmp_path).items()}

    assert steps(told) == {"a": [(2, 0), (4, 1), (6, 5), (7, 7)], "b": [(9, 3), (12, 6)]}
    assert steps([*told, ("a", 1)])["a"] == [(1, 8)]


def test_an_unfinished_run_and_a_folder_that_is_none_get_words(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, tmp_path / "run", Stop("student", 3))
    with pytest.raises(CheckpointError, match="unfinished: 2 of 5 steps of stage 'student'"):
        open_run(tmp_path / "run", TINY)
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        open_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_run(tmp_path / "nothing")


def test_a_teacher_taken_from_another_run_gives_the_student_of_one_trained_anew(tmp_path, whole, monkeypatch):
    with pytest.raises(KeyboardInterrupt):  # its teacher is trained, its student is not
        distil(dataclasses.replace(TINY, guidance=2.0), tmp_path / "a", Stop("student", 1))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(storage.shutil, "copyfileobj", half)
        distil(TINY, tmp_path / "b", Silent(), teacher_from=tmp_path / "a")
    seen = Silent()
    assert leaves_equal(distil(TINY, tmp_path / "b", seen, teacher_from=tmp_path / "a"), whole)
    assert {row["stage"] for row in seen.rows} == {"student"}
    (tmp_path / "a").rename(tmp_path / "moved")  # what was taken is kept
    assert leaves_equal(distil(TINY, tmp_path / "b", Silent(), teacher_from=tmp_path / "a"), whole)


def half(read, write, *_):
    """A copy that is cut off at the arrays, which come after all else."""
    if "/d/" in read.name:
        raise KeyboardInterrupt
    write.write(read.read())


@pytest.fixture
def taught(tmp_path):
    """A run with its teacher alone."""
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, tmp_path / "taught", Stop("student", 1))
    return tmp_path / "taught"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "differs in seed: 0 before, 1 now. Give the experiment the values of"),
        ({"teacher": Teacher(steps=2)}, "differs in teacher.steps: 3 before, 2 now"),
        ({"data": Plane(0)}, "differs in data.classes: 2 before, 0 now"),
    ],
)
def test_another_teacher_is_not_taken_and_the_folder_stays_free_for_the_right_one(tmp_path, taught, changed, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        distil(dataclasses.replace(TINY, **changed), tmp_path / "b", Silent(), teacher_from=taught)
    assert not (tmp_path / "b").exists()


def test_pairs_beside_the_data_do_not_make_another_teacher_but_other_data_in_them_does():
    beside = describe(dataclasses.replace(TINY, data=PairsData(Path("pairs"), Plane())))
    assert runs.teacher_differences(describe(TINY), beside) == []
    other = describe(dataclasses.replace(TINY, data=PairsData(Path("pairs"), Plane(0))))
    assert runs.teacher_differences(beside, other) == ["data.classes: 2 before, 0 now"]
    del other["accumulate"]  # of an earlier version
    assert runs.teacher_differences(beside, other)[1:] == ["accumulate: 1 before, None now"]


def test_a_teacher_that_is_imported_damaged_unfinished_or_not_there_is_not_taken(tmp_path, taught):
    imported = dataclasses.replace(TINY, network=Imported(Path("sit")))
    with pytest.raises(ValueError, match="imported from sit: none is to be taken from"):
        runs._check_teacher(imported, taught, tmp_path / "c")

    def take():
        distil(TINY, tmp_path / "c", Silent(), teacher_from=taught)

    last = taught / "checkpoints/teacher/3"
    file = max(storage.files(last / "d").values(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is damaged: d/\w+ has \d+ bytes of \d+\. Take it from another run"):
        take()
    seals.remove(last)
    with pytest.raises(CheckpointError, match=r"is unfinished: there is no .*teacher/3\. Finish that run first"):
        take()
    (taught / "experiment.json").unlink()
    with pytest.raises(FileNotFoundError, match="no teacher is there"):
        take()
    with pytest.raises(ValueError, match="into a workdir: give one"):
        distil(TINY, teacher_from=taught)
    assert not (tmp_path / "c").exists()


def test_a_folder_of_another_experiment_is_refused_and_left_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, tmp_path, Stop("teacher", 3))
    before = (tmp_path / "experiment.json").read_text()
    other = dataclasses.replace(TINY, steps=6, optimizer=Optimizer(learning_rate=0.5))
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 before, 0.5 now.*new folder") as error:
        distil(other, tmp_path, Silent())
    assert "steps: 5 before, 6 now" in str(error.value) and "warmup" not in str(error.value)
    assert (tmp_path / "experiment.json").read_text() == before


@dataclasses.dataclass(frozen=True)
class Broken:
    """What it is given, as data."""

    data: object = None

    def load(self):
        return self.data


def test_data_that_are_none_or_damaged_are_refused_before_the_folder_is_claimed(tmp_path):
    bad = Data({"x": np.full((4, 2), np.nan), "cond": np.zeros(4, int)}, (2,), 2)
    for data, words in (
        (None, r"Broken.load\(\) answered None"), ({}, "answered a dict: a ddistill.config.Data"), (bad, "NaN or Inf"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            distil(dataclasses.replace(TINY, data=Broken(data)), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_is_none_is_refused_before_the_folder_is_claimed(tmp_path, monkeypatch):
    def make_mesh(fsdp, tensor):
        raise ValueError(f"fsdp = {fsdp} does not divide")

    monkeypatch.setattr(runs.sharding, "make_mesh", make_mesh)
    with pytest.raises(ValueError, match="fsdp = 3 does not"):
        distil(dataclasses.replace(TINY, fsdp=3), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_nothing_was_trained_is_taken_over_where_no_other_holds_it(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("no pairs")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no pairs"):
        patch.setattr(runs, "_run", fails)
        distil(TINY, tmp_path, source=__file__)
    other = dataclasses.replace(TINY, seed=1)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="holds another experiment"):
        patch.setattr(hosts.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError()))  # no locks on this disk
        distil(other, tmp_path, Silent())
    distil(other, tmp_path, Silent())
    assert "held another experiment, of which nothing was saved" in capsys.readouterr().err
    assert json.loads((tmp_path / "experiment.json").read_text())["experiment"]["seed"] == 1
    assert not (tmp_path / "experiment.py").exists()
    with pytest.raises(ValueError, match="holds another experiment"):
        distil(TINY, tmp_path, Silent())


def test_a_folder_with_other_files_and_one_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis.tex.*new or an empty folder"):
        distil(TINY, tmp_path, Silent())
    with pytest.raises(OSError, match="cannot write to the work folder"):
        distil(TINY, tmp_path / "thesis.tex" / "run", Silent())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "experiment.json").write_text("{")
    with pytest.raises(ValueError, match="no record of a run"):
        distil(TINY, tmp_path / "damaged", Silent())


def test_of_two_starts_that_claim_a_folder_at_once_the_same_goes_on_and_another_is_refused(tmp_path, monkeypatch):
    def claim(experiment, *overrides):
        with ExitStack() as held:
            runs._claim(tmp_path, experiment, None, overrides, held)

    claim(TINY, "--first")
    seen, record = [], runs._record

    def late(workdir):  # the other start writes just after this one has looked
        seen.append(workdir)
        return None if len(seen) == 1 else record(workdir)

    monkeypatch.setattr(runs, "_record", late)
    claim(TINY, "--second")
    assert record(tmp_path)["overrides"] == ["--second"]
    seen.clear()
    with pytest.raises(ValueError, match=r"holds another experiment, which differs in seed: 0 before, 1 now"):
        claim(dataclasses.replace(TINY, seed=1))
    assert record(tmp_path)["overrides"] == ["--second"]


HOLDS = """
import sys
from pathlib import Path
from ddistill.hosts import alone_in
with alone_in(Path(sys.argv[1]), print):
    print(flush=True)
    sys.stdin.read()
"""


def test_a_second_start_in_a_folder_where_one_trains_is_refused_until_that_one_is_gone(tmp_path, whole):
    with Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        words = f"process, {other.pid}, is training in {tmp_path}: wait for its end or stop it, kill {other.pid}, and"
        with pytest.raises(hosts.Busy, match=words):
            distil(TINY, tmp_path, Silent())
        assert os.listdir(tmp_path) == [".lock"]
        other.kill()
    assert leaves_equal(distil(TINY, tmp_path, Silent()).student.params, whole.student.params)
    with hosts.alone_in(tmp_path, print):
        open_run(tmp_path, TINY)  # those who read are not kept out


def test_a_folder_is_free_where_locks_are_unknown_or_may_be_those_of_a_host_that_is_lost(tmp_path, monkeypatch):
    told = []
    with hosts.alone_in(tmp_path, told.append):
        (tmp_path / ".lock").write_text("7 elsewhere")
        with hosts.alone_in(tmp_path, told.append):
            (words,) = told
        assert words.startswith(f"another process, 7, is training in {tmp_path} on another host, unless that is lost")
        (tmp_path / ".lock").write_text("")
        with pytest.raises(hosts.Busy, match="another process is training .* end and repeat"):
            hosts.alone_in(tmp_path, told.append).__enter__()

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(hosts.fcntl, "flock", unknown)
    with hosts.alone_in(tmp_path, told.append), hosts.alone_in(tmp_path, told.append):
        assert len(told) == 1


def test_the_students_stage_sees_the_guided_teacher_and_trains_without_dropped_labels():
    data = TINY.data.load()
    teacher_stage, student_stage = stages(dataclasses.replace(TINY, guidance=3.0), data)
    net = TINY.network.build(data, TINY.process, jax.random.key(0))
    rng = np.random.default_rng(0)
    net = net.replace(params=jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), net.params))
    x, t, cond = np.ones((4, 2), np.float32), 0.5, np.array([0, 1, 0, 1], np.int32)
    with_label, without = net(x, t, cond), net(x, t, np.full(4, 2, np.int32))
    assert not np.allclose(with_label, without)
    np.testing.assert_allclose(student_stage.guide(net)(x, t, cond), without + 3 * (with_label - without), rtol=1e-5)
    assert teacher_stage.guide(net) is net
    assert any((teacher_stage.source(net)(i)["cond"] == 2).any() for i in range(20))
    assert not any((student_stage.source(net)(i)["cond"] == 2).any() for i in range(20))
    with pytest.raises(ValueError, match=r"guidance = 3\.0 needs classes"):
        stages(dataclasses.replace(TINY, guidance=3.0), Plane(classes=0).load())


def test_pairs_for_a_method_that_learns_from_them_are_trajectories_of_the_guided_teacher():
    e = dataclasses.replace(TINY, method=KD(steps=(1,), pairs=16, teacher_steps=24), guidance=2.0, batch_size=16)
    data = e.data.load()
    net = e.network.build(data, e.process, jax.random.key(0))
    told, log = [], Silent()
    log.waits = told.append
    _, student_stage = stages(e, data, log)
    batch = student_stage.source(student_stage.guide(net))(0)
    assert told == ["making 16 teacher pairs: 0"]
    assert set(batch) == {"noise", "x", "cond"} and set(batch["cond"]) == {0, 1}
    # An untrained network answers c_skip x, for which the ODE ends at x_T s / sqrt(T² + s²), s = sigma_data.
    expected = batch["noise"] * 0.5 / np.hypot(edm().t_max, 0.5)
    assert np.max(np.abs(batch["x"] - expected)) < 0.2 * np.max(np.abs(expected))
    given = dataclasses.replace(data, arrays={**data.arrays, "noise": data.arrays["x"] + 1})
    batch = stages(e, given)[1].source(net)(0)
    np.testing.assert_array_equal(batch["noise"], batch["x"] + 1)


def test_pairs_on_disk_are_an_experiments_data_for_its_first_round(tmp_path):
    data = Plane().load()
    net = TINY.network.build(data, TINY.process, jax.random.key(0))
    write_pairs(tmp_path, net, TINY.process, jax.random.key(1), 16, (2,), steps=4, num_classes=2)
    e = dataclasses.replace(TINY, data=PairsData(tmp_path, Plane()), method=KD(steps=(1,)), batch_size=16)
    loaded = e.data.load()
    batch = stages(e, loaded)[1].source(net)(0)
    stored = open_pairs(tmp_path).arrays()
    np.testing.assert_array_equal(np.sort(batch["noise"][:, 0]), np.sort(stored["noise"][:, 0]))
    np.testing.assert_array_equal(stages(e, loaded)[0].source(net)(0)["x"].shape, (16, 2))  # the teacher's own data
    with pytest.raises(ValueError, match="do not fit: points"):
        stages(dataclasses.replace(e, method=KD(steps=(1, 2))), loaded)[1].source(net)


def test_a_run_goes_on_and_is_read_with_another_layout_interval_and_number_of_devices(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        distil(TINY, tmp_path, Stop("student", 4))
    other = dataclasses.replace(TINY, fsdp=2, layout={"*.kernel": (None, "fsdp")}, log_every=2, steps_per_dispatch=3)
    with pytest.raises(ValueError, match=r"another experiment, which differs in batch_size: 8 before, 16 now\. Start"):
        distil(dataclasses.replace(other, batch_size=16), tmp_path, Silent())
    assert leaves_equal(distil(other, tmp_path, Silent()).student.params, whole.student.params)
    recorded = json.loads((tmp_path / "experiment.json").read_text())["experiment"]
    assert recorded["fsdp"] == 2 and recorded["log_every"] == 2
    assert leaves_equal(open_run(tmp_path, TINY).student.params, whole.student.params)
    assert open_run(tmp_path, dataclasses.replace(TINY, fsdp=16)).experiment.fsdp == 8  # of the devices that are here
    pod = dataclasses.replace(TINY, fsdp=16, tensor=2, layout={"*.kernel": (None, "fsdp")})
    assert (runs._fitting(pod).fsdp, runs._fitting(pod).tensor, runs._fitting(pod).layout) == (8, 1, {})
    assert runs._fitting(dataclasses.replace(pod, fsdp=4)).fsdp == 4
