import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.config import Data, DigitsData, Experiment
from ddistill.data import ArraySource, arrays, label_dropout, load_digits
from ddistill.data.pair_store import open_pairs, write_pairs
from ddistill.data.records import Records
from ddistill.methods import KD
from ddistill.net import Net
from ddistill.process import edm
from ddistill.runs import student_stages


def items(n: int) -> dict[str, np.ndarray]:
    """Every value names its item, so that a batch says which items it holds."""
    index = np.arange(n)
    return {"x": np.stack([index, -index], 1).astype(np.float64), "cond": index % 3}


def drawn(source, steps) -> np.ndarray:
    return np.concatenate([source(step)["x"][:, 0] for step in steps]).astype(int)


def test_one_epoch_is_a_permutation_and_epochs_differ():
    source = ArraySource(items(12), batch_size=4, seed=3)
    first, second = drawn(source, range(3)), drawn(source, range(3, 6))
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) != list(second) and list(first) != list(range(12))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (5, 1), (3, 11), (1, 4)])
def test_batches_cross_epochs_without_loss(n, batch_size):
    source = ArraySource(items(n), batch_size, seed=1)
    stream = drawn(source, range(3 * n))
    assert all(len(source(step)["x"]) == batch_size for step in range(3))
    assert np.array_equal(np.sort(stream.reshape(-1, n), axis=1), np.tile(np.arange(n), (3 * batch_size, 1)))


def test_batch_size_only_cuts_the_stream():
    streams = [drawn(ArraySource(items(10), b, seed=2), range(60 // b)) for b in (1, 4, 15)]
    assert all(np.array_equal(streams[0], stream) for stream in streams)


def test_a_batch_depends_on_seed_and_step_alone():
    late, early = ArraySource(items(10), 4, seed=5), ArraySource(items(10), 4, seed=5)
    resumed = [late(step) for step in (41, 40, 7)]
    uninterrupted = [early(step) for step in range(42)]
    for a, b in zip(resumed, (uninterrupted[i] for i in (41, 40, 7)), strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(drawn(late, range(5)), drawn(ArraySource(items(10), 4, seed=6), range(5)))
    assert np.array_equal(late(jnp.asarray(7))["x"], late(np.int64(7))["x"])


@pytest.mark.parametrize("parts", [2, 3])
def test_several_processes_share_a_batch(parts):
    whole = ArraySource(items(10), 12, seed=2)
    shares = [ArraySource(items(10), 12, seed=2, part=(p, parts)) for p in range(parts)]
    for step in (0, 1, 2, 9):
        for name, expected in whole(step).items():
            assert np.array_equal(np.concatenate([share(step)[name] for share in shares]), expected)
    with pytest.raises(ValueError, match="a batch of 7 does not split over 2 processes"):
        ArraySource(items(10), 7, part=(1, 2))


def test_a_process_reads_its_own_rows_alone(monkeypatch, tmp_path):
    """Of arrays in memory and of pairs on disk: a fourth of the rows of a batch, in each of four processes."""
    read = []

    class Counted(np.ndarray):
        def __getitem__(self, rows):
            read.append(len(rows))
            return np.asarray(self)[rows]

    net = Net({}, {}, lambda params, rest, x, t, cond, *, s=None, key=None: 0.5 * x)
    write_pairs(tmp_path, net, edm(), jax.random.key(0), 20, (2,), steps=2, shard_size=8)
    stored, rows = open_pairs(tmp_path), Records.rows
    monkeypatch.setattr(arrays, "_numbers", lambda name, array: np.asarray(array).view(Counted))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    batch = Data({"x": np.ones((20, 2), np.float32)}, (2,), 0).source(8, 0, 0.0)(5)
    assert read == [2] and batch["x"].shape == (2, 2)
    monkeypatch.setattr(Records, "rows", lambda self, numbers: read.append(len(numbers)) or rows(self, numbers))
    experiment = Experiment("pairs", KD(steps=(1,), pairs=20), DigitsData(), batch_size=8)
    (stage,) = student_stages(experiment, Data({}, (2,), 0, pairs=stored))
    del read[:]
    assert stage.source(net)(5)["noise"].shape == (2, 2)
    assert read == [2, 2]  # of the rows' numbers, and of the rows


def test_rows_stay_together_and_types_are_fixed():
    batch = ArraySource(items(30), 8)(2)
    assert np.array_equal(batch["x"][:, 0] % 3, batch["cond"])
    assert np.array_equal(batch["x"][:, 0], -batch["x"][:, 1])
    assert batch["x"].dtype == np.float32 and batch["cond"].dtype == np.int32
    assert ArraySource({"x": jnp.ones((3, 2), jnp.bfloat16)}, 2)(0)["x"].dtype == np.float32


def test_a_changed_batch_leaves_the_source_alone():
    source = ArraySource(items(6), 6)
    before = source(0)["x"].copy()
    source(0)["x"][:] = 99
    assert np.array_equal(source(0)["x"], before)


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"x": np.ones((3, 2)), "cond": np.zeros(4, int)}, {}, r"unequal leading lengths.*'x': 3.*'cond': 4"),
        ({"x": np.ones((0, 2))}, {}, "empty"),
        ({}, {}, "No arrays"),
        ({"x": np.float64(3)}, {}, "single number"),
        ({"x": np.ones((3, 2))}, {"batch_size": 0}, "batch_size is 0"),
        ({"x": np.ones((3, 2))}, {"seed": -1}, "seed is -1"),
        ({"x": np.array([[1, 2], [3, np.nan], [np.inf, 1]])}, {}, r"'x' holds 2 values.*index \(1, 1\)"),
        ({"x": np.ones((3, 2)), "noise": np.array([1.0, 1e39, 1])}, {}, r"'noise' holds 1 .*float32.*\(1,\)"),
        ({"x": np.ones((3, 2), np.uint8)}, {}, "'x' has dtype uint8"),
        ({"x": np.ones((3, 2)), "cond": np.array(["a", "b", "c"])}, {}, "'cond' has dtype <U1"),
        ({"x": np.ones((3, 2)), "cond": np.array([0, 10, -1])}, {"num_classes": 10}, "Label 10 at index 1.*0 to 9"),
        ({"x": np.ones((3, 2)), "cond": np.array([0, 1, -1])}, {"num_classes": 10}, "Label -1 at index 2"),
        ({"x": np.ones((3, 2)), "cond": np.ones(3)}, {"num_classes": 10}, "float32.*expected integers"),
        ({"x": np.ones((3, 2)), "cond": np.ones((3, 1), int)}, {"num_classes": 10}, r"\(3, 1\).*expected integers"),
        ({"x": np.ones((3, 2))}, {"num_classes": 10}, "needs labels"),
        ({"x": np.ones((3, 8, 8))}, {"shape": (8, 8, 1)}, r"shape \(8, 8\); expected \(8, 8, 1\)"),
        ({"noise": np.ones((3, 8))}, {"shape": (8,)}, "no array 'x'"),
    ],
)
def test_wrong_input_is_met_with_words(arrays, options, words):
    with pytest.raises(ValueError, match=words):
        ArraySource(arrays, **{"batch_size": 2, **options})


def test_steps_count_from_zero():
    with pytest.raises(ValueError, match="step is -1"):
        ArraySource(items(3), 2)(-1)


def test_label_dropout_drops_the_share_asked_and_nothing_else():
    source = ArraySource(items(600), 500, seed=0)
    dropped = label_dropout(source, 0.2, null=3)
    share = []
    for step in range(40):
        before, after = source(step), dropped(step)
        gone = after["cond"] == 3
        share.append(gone.mean())
        assert np.array_equal(before["x"], after["x"])
        assert np.array_equal(before["cond"][~gone], after["cond"][~gone]) and after["cond"].dtype == np.int32
    # 20 000 independent draws: five standard errors of the mean; the spread of the 40 shares is binomial.
    assert abs(np.mean(share) - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 20_000)
    assert 0.6 < np.std(share) / np.sqrt(0.2 * 0.8 / 500) < 1.4


def test_label_dropout_is_a_function_of_the_step():
    dropped = label_dropout(ArraySource(items(50), 50, seed=4), 0.5, null=3)
    again, other = dropped(9)["cond"], dropped(10)["cond"]
    dropped(3)
    assert np.array_equal(dropped(9)["cond"], again)
    assert not np.array_equal(again == 3, other == 3)
    assert not (label_dropout(ArraySource(items(50), 50), 0.0, null=3)(0)["cond"] == 3).any()
    assert (label_dropout(ArraySource(items(50), 50), 1.0, null=3)(0)["cond"] == 3).all()


def test_label_dropout_refuses_what_it_cannot_drop():
    with pytest.raises(ValueError, match=r"1\.5; it must lie between 0 and 1"):
        label_dropout(ArraySource(items(5), 2), 1.5, null=3)
    with pytest.raises(ValueError, match="given: none"):
        label_dropout(ArraySource({"x": np.ones((5, 2))}, 2), 0.1, null=3)(0)
    with pytest.raises(ValueError, match="float32"):
        label_dropout(ArraySource({"x": np.ones((5, 2)), "cond": np.ones((5, 4))}, 2), 0.1, null=3)(0)


def test_digits_are_the_scans_split_by_class():
    from sklearn.datasets import load_digits as bundled

    digits = load_digits()
    assert digits.train_x.shape == (1257, 8, 8, 1) and digits.held_out_x.shape == (540, 8, 8, 1)
    pixels, labels = bundled(return_X_y=True)
    both = np.concatenate([digits.train_x, digits.held_out_x])
    assert np.allclose(np.sort(digits.to_unit(both).reshape(-1, 64), 0), np.sort(pixels / 16, 0), atol=1e-6)
    for kind in range(10):
        share = (digits.train_labels == kind).sum() / (labels == kind).sum()
        assert share == pytest.approx(0.7, abs=0.01)
    original = {row.tobytes(): label for row, label in zip(pixels.astype(np.uint8), labels, strict=True)}
    back = np.rint(digits.to_unit(digits.held_out_x) * 16).astype(np.uint8).reshape(-1, 64)
    assert [original[row.tobytes()] for row in back] == list(digits.held_out_labels)


def test_digits_have_mean_zero_and_rms_one_half():
    digits = load_digits(1)
    x = digits.train_x.astype(np.float64)
    assert abs(x.mean()) < 1e-6
    assert np.sqrt((x**2).mean()) == pytest.approx(0.5, abs=1e-6)
    # Law of total variance: the mean scan's own mean square and the variance about it make up the whole.
    assert digits.variance + (x.mean(0) ** 2).mean() == pytest.approx(0.25, abs=1e-6)


def test_to_unit_clips_and_seeds_split():
    digits = load_digits()
    assert np.array_equal(digits.to_unit(np.array([-9.0, 9.0])), [0, 1])
    assert np.array_equal(digits.train_x, load_digits(0).train_x)
    assert not np.array_equal(digits.train_x, load_digits(1).train_x)
