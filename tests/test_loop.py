"""The loop: batches ahead, metrics late, several steps in one call, profiles, goodput, and what diverges."""

import dataclasses
import gzip
import json
import threading
from collections import deque
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddistill import goodput
from ddistill import log as log_module
from ddistill.checkpoint import Checkpoints
from ddistill.cli import main
from ddistill.data.loading import prefetched
from ddistill.divergence import Back, DivergedError, Divergence, Rollbacks, Watch, slower
from ddistill.log import RunLog, Silent
from ddistill.loop import IN_FLIGHT, Pace, fit
from ddistill.methods.base import Memory, Method, Sampling
from ddistill.net import Net
from ddistill.runs import read_metrics
from ddistill.signals import Stop, Stopped
from ddistill.stages import Stage, prepare, result, run, trainer_of

pytestmark = pytest.mark.usefixtures("one_device")


def linear(params, rest, x, t, cond, *, s, key):
    return params["w"] * x


def net(*w):
    return Net({"w": jnp.asarray(w, jnp.float32)}, {}, linear)


def batches(step):
    return {"x": np.random.default_rng(step).normal(size=(8, 2)).astype(np.float32)}


def student(nets, batch, progress, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    error = nets["student"](batch["x"], 1.0) - nets["teacher"](batch["x"], 1.0) - noise
    return jnp.mean(error**2) + 0.0 * batch["sum"], {"share": progress.share}


def fake(nets, batch, progress, key):
    return jnp.mean((nets["fake"](batch["x"], 1.0) - nets["student"](batch["x"], 1.0)) ** 2), {}


METHOD = Method(
    losses={"student": student, "fake": fake},
    init={"student": lambda teacher, key, space: net(0, 1), "fake": lambda teacher, key, space: net(4, 1)},
    sampling=Sampling(lambda steps: [1.0, 0.0]),
    every={"student": 3},
    ema={"ema": ("student", 0.9)},
    memory={
        "sum": Memory(lambda nets, space: jnp.zeros(()), lambda old, nets, batch, progress, key: old + batch["x"].sum())
    },
    needs=frozenset({"x"}),
    result="ema",
)


def adam(steps):
    return optax.adam(0.1)


STAGE = Stage("s", METHOD, 11, lambda teacher: batches, adam)


def train(stage=STAGE, **options):
    return run([stage], net(2, 3), jax.random.key(0), **options)[0].params["w"]


def sourced(source, steps=11):
    return dataclasses.replace(STAGE, source=lambda teacher: source, steps=steps)


@pytest.fixture(scope="module")
def single(one_device):
    """Rows and result of a training by single steps, whose batches are made when they are needed."""
    log = Silent()
    return train(log=log, log_every=2, ahead=0), log.rows


def test_items_are_made_in_order_and_not_further_ahead_than_allowed():
    made, taken = [], []
    for item, value in prefetched(lambda i: made.append(i) or 10 * i, range(9), 3):
        taken.append(item)
        assert value == 10 * item
        assert len(made) <= len(taken) + 3
    assert taken == made == list(range(9))
    assert list(prefetched(str, range(3), 0)) == [(0, "0"), (1, "1"), (2, "2")]


def test_what_a_thread_meets_is_raised_in_its_turn_and_no_thread_stays():
    def make(i):
        if i == 2:
            raise OSError("no such file")
        return i

    got = []
    with pytest.raises(OSError, match="no such file"):
        got += [item for item, _ in prefetched(make, range(5), 4) if not got.append(item)]
    assert got == [0, 1]
    some = prefetched(make, range(5), 1)
    next(some)
    some.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


@pytest.mark.parametrize("per", [1, 4, 100])
def test_batches_ahead_and_several_steps_in_a_call_change_nothing(single, tmp_path, per):
    log = Silent()
    made = train(log=log, log_every=2, ahead=2, steps_per_dispatch=per, workdir=tmp_path, checkpoint_every=5)
    np.testing.assert_allclose(made, single[0], rtol=1e-6)
    assert [row["step"] for row in log.rows] == [2, 4, 6, 8, 10, 11]
    assert [set(row) for row in log.rows] == [set(row) for row in single[1]], "each row has its own turn's losses"
    for ours, theirs in zip(log.rows, single[1], strict=True):
        for name in set(ours) - {"stage"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "s").iterdir()) == ["10", "11"]


def test_calls_of_several_steps_stop_at_their_ends_and_go_on_with_the_same_bits(tmp_path):
    class Asks(Silent):
        def progress(self, step):
            if step == 6:
                stop.request()

    stop, options = Stop(), {"log_every": 3, "steps_per_dispatch": 4}
    with pytest.raises(Stopped, match="saved at step 9 of 11"):
        train(workdir=tmp_path, log=Asks(), stop=stop, **options)
    log = Silent()
    np.testing.assert_array_equal(train(workdir=tmp_path, log=log, **options), train(**options))
    assert [row["step"] for row in log.rows] == [11]


def test_a_batch_that_cannot_be_made_is_told_when_its_step_comes(tmp_path):
    def source(step):
        if step == 7:
            raise OSError("the disk is gone")
        return batches(step)

    with pytest.raises(OSError, match="the disk is gone"):
        train(sourced(source), workdir=tmp_path, checkpoint_every=1)
    assert (tmp_path / "checkpoints" / "s" / "7").is_dir()


def test_batches_made_on_devices_are_asked_for_in_the_loops_own_thread():
    threads = set()

    def source(step):
        threads.add(threading.current_thread().name)
        return jax.tree.map(jnp.asarray, batches(step))

    np.testing.assert_allclose(train(sourced(source), steps_per_dispatch=4), train(), rtol=1e-6)
    assert threads == {threading.current_thread().name}


class Late:
    """A number on a device, which tells when it is waited for and when it is read."""

    def __init__(self, told, step):
        self.told, self.step = told, step

    def block_until_ready(self):
        self.told.append(("wait", self.step))
        return self

    def __array__(self, dtype=None, copy=None):
        self.told.append(("read", self.step))
        return np.zeros((), np.int32)


def test_the_loop_reads_metrics_one_report_late_and_keeps_a_bounded_number_of_calls_in_flight():
    told = []

    def step(state, nets, batch, turn, steps, round):
        told.append(("call", len([t for t in told if t[0] == "call"]) + 1))
        return state, {"failing": Late(told, told[-1][1])}

    trainer = dataclasses.replace(trainer_of(STAGE, jax.make_mesh((1, 1), ("data", "fsdp"))), step=step)
    state = SimpleNamespace(step=0)
    fit(trainer, state, {}, batches, stage="s", steps=11, pace=Pace(log_every=4))
    calls = [i for i, (what, _) in enumerate(told) if what == "call"]
    reads = {n: sum(i < told.index(("read", n)) for i in calls) for what, n in told if what == "read"}
    assert reads == {4: 8, 8: 11, 11: 11}, "the metrics of step 4 are read when step 8 is under way"
    flying = deque()
    for what, n in told:
        if what == "call":
            flying.append(n)
        elif what == "wait":
            assert flying.popleft() == n
        assert len(flying) <= IN_FLIGHT + 1


@pytest.mark.parametrize("per", [1, 4])
def test_numbers_go_to_the_devices_only_where_the_loop_puts_them_there(per):
    trainer = trainer_of(STAGE, jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")))
    nets, state = prepare(trainer, net(2, 3), net(2, 3), jax.random.key(0))
    pace = Pace(log_every=3, steps_per_dispatch=per)
    twice = [jax.tree.map(jnp.copy, state), state]
    fit(trainer, twice[0], nets, batches, stage="s", steps=11, pace=pace)  # compiling moves constants
    with jax.transfer_guard("disallow"):
        fit(trainer, twice[1], nets, batches, stage="s", steps=11, pace=pace)


def test_a_profile_holds_the_steps_it_was_asked_for(tmp_path):
    log = Silent()
    train(workdir=tmp_path, profile=range(4, 7), log=log)
    (trace,) = (tmp_path / "profile" / "s").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "train"}
    assert steps == {4, 5, 6} and log.notes == []
    assert list((tmp_path / "profile" / "s").rglob("*.xplane.pb"))
    train(sourced(batches, 12), workdir=tmp_path, profile=range(4, 7), log=log)
    assert log.notes == ["no stage took steps 4:7 now: nothing was profiled"]
    with pytest.raises(ValueError, match="needs a workdir"):
        train(profile=range(4, 7))


@pytest.mark.parametrize("given", ["10", "a:b", "5:5", "7:3", "-1:4", "1:2:3", ""])
def test_a_profile_that_is_no_range_of_steps_is_refused_with_words(given, capsys):
    assert main(["distill", "x.py", f"--profile={given}"]) == 2
    assert f"--profile {given}: give two steps, FIRST:END, such as 10:15" in capsys.readouterr().err


def test_goodput_counts_what_was_done_again_and_all_but_steps_as_lost():
    def spent(first, steps, **rest):
        return {"began": 0.0, "first": first, **dict.fromkeys(goodput.KINDS, 0.0), **rest, "steps": steps}

    one = goodput.of_starts([(10, spent(0, 6.0, compile=1.0, data=2.0, checkpoints=1.0))])
    assert (one.share, one.redone, one.starts) == (0.6, 0, 1)
    # Killed at step 10, gone on from 5: half of the first start's steps are lost.
    two = goodput.of_starts([(10, spent(0, 6.0, start=2.0)), (20, spent(5, 11.0, data=1.0))])
    assert (two.share, two.redone, two.starts) == ((3 + 11) / 20, 5, 2)
    assert two.words().startswith("goodput 70.0% of 20 s over 2 starts, 5 steps done again: start 10.0%")
    # And a third start from before the second's beginning.
    three = goodput.of_starts([(10, spent(0, 10.0)), (20, spent(5, 15.0)), (10, spent(2, 8.0))])
    assert three.redone == 8 + 15 and three.share == pytest.approx((2 + 8) / 33)


def test_the_time_that_batches_and_saves_take_is_not_that_of_steps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(goodput, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 1e9))

    def source(step):
        now[0] += 3.0
        return batches(step)

    class Slow(Silent):
        def progress(self, step):
            now[0] += 1.0

    log = Slow()
    train(sourced(source, 5), log=log, log_every=1, ahead=0)
    assert {k: v for k, v in log.clock.items() if v} == {"began": 1e9, "data": 15.0, "steps": 5.0}


def test_every_run_tells_where_its_time_went_over_all_its_starts(tmp_path, capsys):
    stop = Stop()
    for steps in (6, 11):
        with RunLog(tmp_path) as log:
            stop.request() if steps == 6 else None
            options = {"workdir": tmp_path, "log": log, "log_every": 1, "ahead": 0}
            if steps == 6:
                with pytest.raises(Stopped):
                    train(stop=stop, **options)
            else:
                train(**options)
    told = capsys.readouterr().err
    assert "s: goodput" in told and "over 2 starts" in told
    starts = goodput.read_starts(tmp_path / "metrics.jsonl")["s"]
    assert [(step, spent["first"]) for step, spent in starts] == [(1, 0), (11, 1)]
    assert all(spent["compile"] > 0 and spent["start"] > 0 for _, spent in starts)
    assert [row["step"] for row in read_metrics(tmp_path)["s"]] == list(range(1, 12))


def test_where_time_went_is_written_once_a_minute_and_at_the_end_of_each_stage(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log_module, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=lambda form: ""))
    with RunLog(tmp_path) as log:
        for stage, steps in (("long", 5), ("short", 2)):
            log.start(stage, 0, steps)
            for step in range(1, steps + 1):
                now[0] += 25.0
                log.spent(step, {"began": now[0] - 25 * step, "first": 0, "steps": 25.0 * step})
            log.stop()
    rows = list(map(json.loads, (tmp_path / "metrics.jsonl").open()))
    assert [(row["stage"], row["step"]) for row in rows] == [("long", 3), ("long", 5), ("short", 2)]


def poisoned(bad):
    def source(step):
        batch = batches(step)
        return {"x": np.full_like(batch["x"], np.nan)} if step in bad else batch

    return source


BACK = Divergence("rollback", failing=3, rate=0.5, most=2)


def test_a_rollback_goes_on_from_the_last_good_step_with_later_batches_and_a_lower_rate(tmp_path):
    log = Silent()
    options = {"log_every": 1, "checkpoint_every": 2, "divergence": BACK}
    made = train(sourced(poisoned({5, 6, 7, 8})), workdir=tmp_path, log=log, **options)
    # Steps 5, 6, 7 are not finite, which is seen one report late; 6 was not saved, as 5 had failed: back to 4, without
    # batches 4 to 7. Number 8 is bad too, and one is not yet divergence.
    (note,) = log.notes
    assert "Rollback 1 of 2: back to step 4, without the 4 batches since, and with 0.5 times the learning rate" in note
    assert json.loads((tmp_path / "checkpoints" / "s" / "rollbacks.json").read_text()) == [[8, 4]]

    def expected():
        teacher = net(2, 3)
        key = jax.random.fold_in(jax.random.key(0), 0)
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
        before, after = trainer_of(STAGE, mesh), trainer_of(STAGE, mesh, rate=0.5, draw=1)
        nets, state = prepare(before, teacher, teacher, key)
        for step in range(4):
            state, _ = before.step(state, nets, batches(step), METHOD.turn(step), 11)
        for step in range(4, 11):
            state, _ = after.step(state, nets, poisoned({8})(step + 4), METHOD.turn(step), 11)
        return result(after, state, nets).params["w"]

    np.testing.assert_allclose(made, expected(), rtol=1e-6)
    np.testing.assert_array_equal(train(sourced(None), workdir=tmp_path, **options), made)


def test_a_run_killed_after_a_rollback_goes_on_as_if_it_had_not_been(tmp_path):
    class Killed(Silent):
        def progress(self, step):
            if self.notes and step == 8:
                raise KeyboardInterrupt

    options = {"log_every": 1, "checkpoint_every": 2, "divergence": BACK}
    stage = sourced(poisoned({5, 6, 7, 8}))
    whole = train(stage, workdir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(stage, workdir=tmp_path / "killed", log=Killed(), **options)
    np.testing.assert_array_equal(train(stage, workdir=tmp_path / "killed", **options), whole)


def test_a_run_told_to_leave_while_its_loss_grows_rolls_back_when_it_goes_on(tmp_path):
    """What may have diverged is not saved, and what later losses are large beside is remembered."""
    grown = sourced(lambda step: {"x": (30 if 8 <= step < 12 else 1) * batches(step)["x"]}, 20)
    rule = Divergence("rollback", growth=50, reports=3)
    log, options = Silent(), {"log_every": 1, "checkpoint_every": 2, "divergence": rule}
    whole = train(grown, workdir=tmp_path / "whole", log=log, **options)
    assert ["back to step 8, without the" in note for note in log.notes] == [True]

    stop, log, folder = Stop(), Silent(), tmp_path / "left"
    with pytest.raises(Stopped, match="stopped, and not saved since it may diverge, at step 10 of 20"):
        train(grown, workdir=folder, log=Telling(stop, 10), stop=stop, **options)
    with Checkpoints(folder / "checkpoints" / "s") as checkpoints:
        assert checkpoints.latest() == 8
    np.testing.assert_array_equal(train(grown, workdir=folder, log=log, **options), whole)
    assert len(log.notes) == 1


class Telling(Silent):
    """A log that asks for a stop at a step."""

    def __init__(self, stop, at):
        super().__init__()
        self._stop, self._at = stop, at

    def progress(self, step):
        if step == self._at - 1:
            self._stop.request()


def test_rollbacks_have_an_end_and_without_checkpoints_go_back_to_the_start():
    log = Silent()
    with pytest.raises(DivergedError, match="NaN or infinite.*That was after 2 rollbacks"):
        train(sourced(poisoned(range(3, 1000)), 40), log=log, log_every=1, divergence=BACK)
    assert ["back to step 0" in note for note in log.notes] == [True, True]


def test_a_state_at_its_last_step_is_trained_no_more():
    trainer = trainer_of(STAGE, jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")))
    nets, state = prepare(trainer, net(2, 3), net(2, 3), jax.random.key(0))
    state = dataclasses.replace(state, step=jnp.int32(11))
    assert fit(trainer, state, nets, batches, stage="s", steps=11) is state


def watched(losses, **rule):
    watch = Watch(Divergence(**rule), "s")
    for step, value in enumerate(losses):
        watch.see(step, {"failing": 0, "student/loss": value})
    return watch


def test_a_loss_that_stays_far_above_its_median_is_divergence_and_a_spike_is_not():
    calm = [1.0, -2.0, 1.5, 1.0, 2.0, 1.2]
    with pytest.raises(DivergedError, match=r"step 8: student/loss is 70, and for 3 reports was above 10 times .*1.35"):
        watched([*calm, 50.0, -60.0, 70.0], growth=10.0)
    watched([*calm, 50.0, 60.0, 1.0, 50.0, 60.0], growth=10.0)
    watched([*calm, 50.0, 60.0, 70.0, 1e9])  # by default no loss is looked at
    watched([0.1, 50.0, 60.0, 70.0], growth=10.0)  # too few for a median
    watch = watched(calm, growth=10.0)
    assert watch.trusts({"failing": 0, "student/loss": 9.0})
    assert not watch.trusts({"failing": 0, "student/loss": -14.0})
    assert not watch.trusts({"failing": 1, "student/loss": 1.0})


def test_rules_that_mean_nothing_are_refused_with_words():
    for wrong, words in (
        ({"action": "retry"}, "give stop or rollback"), ({"failing": 0}, "count from 1"), ({"growth": 0.5}, "above 1"),
        ({"rate": 0.0}, "must lie in"), ({"most": -1}, "from 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Divergence(**wrong)
    with pytest.raises(ValueError, match="steps_per_dispatch = 0 must be at least 1"):
        train(steps_per_dispatch=0)


def test_a_slower_optimiser_has_the_same_state_and_a_share_of_the_updates(tmp_path):
    plain, slow = optax.adamw(0.1, weight_decay=0.3), slower(optax.adamw(0.1, weight_decay=0.3), 0.25)
    params = {"w": jnp.asarray([1.0, -2.0])}
    full, state = plain.update({"w": jnp.asarray([0.3, 4.0])}, plain.init(params), params)
    part, other = slow.update({"w": jnp.asarray([0.3, 4.0])}, slow.init(params), params)
    np.testing.assert_allclose(part["w"], 0.25 * full["w"], rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    backs = Rollbacks(tmp_path)
    backs.add(Back(9, 4))
    backs.add(Back(20, 10))
    assert Rollbacks(tmp_path).skipped == 15
