"""Teacher pairs in memory and on disk; the teacher is a mixture's exact denoiser."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill import grids, integrators
from ddistill.cli import Pairs, commands, main
from ddistill.config import Data, Experiment
from ddistill.data import ArraySource
from ddistill.data.pair_store import fingerprint, open_pairs, write_pairs
from ddistill.data.pairs import _draws_noise, _segments, teacher_pairs
from ddistill.integrators import ddim, dpmpp_3m, dpmpp_3s, predictor_corrector
from ddistill.integrators.exact import flow_map
from ddistill.methods import KD
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import guided, retime
from ddistill.process import edm, flow, ve, vp_cosine
from ddistill.runs import Opened

MIXTURE = Mixture.from_covariances(
    [0.5, 0.3, 0.2], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.02 * np.eye(2)] * 3, labels=[0, 1, 2]
)
TEACHER = as_teacher(MIXTURE, edm())
PATHS = {"steps": 7, "points": 4, "num_classes": 3, "integrator": dpmpp_3s}
STOCHASTIC = {"ddpm", "euler_maruyama", "heun_churn", "predictor_corrector", "sde_dpmpp_2m"}


def pairs(count, batch_size, key=0, **kwargs):
    kwargs = {"steps": 6, "num_classes": 3, **kwargs}
    return teacher_pairs(TEACHER, edm(), jax.random.key(key), count, (2,), batch_size=batch_size, **kwargs)


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def whole():
    return pairs(11, 64)


@pytest.fixture(scope="module")
def paths():
    return pairs(22, 64, **PATHS)


def test_a_pair_depends_on_the_key_and_its_number_alone(whole):
    assert {name: a.shape for name, a in whole.items()} == {"noise": (11, 2), "x": (11, 2), "cond": (11,)}
    told = []
    part = pairs(7, 3, report=lambda *done: told.append(done))
    assert told == [(0, 7), (3, 7), (6, 7)]
    np.testing.assert_array_equal(part["noise"], whole["noise"][:7])
    np.testing.assert_array_equal(part["cond"], whole["cond"][:7])
    np.testing.assert_allclose(part["x"], whole["x"][:7], rtol=1e-5, atol=1e-6)
    assert len(np.unique(whole["noise"])) == 22
    assert not np.any(pairs(11, 64, key=1)["noise"] == whole["noise"])


def test_one_device_and_eight_make_the_same_pairs(paths):
    assert jax.local_device_count() == 8
    assert_same(pairs(22, 5, devices=jax.devices()[:1], **PATHS), paths)


def test_a_pair_is_where_the_integrator_takes_its_noise(whole):
    grid = grids.karras(edm(), 6)

    @functools.partial(jax.jit, static_argnums=0)
    def again(integrator, x, cond):
        return integrator(TEACHER.bind(cond), edm(), grid, x).x

    by_ddim = pairs(11, 64, integrator=ddim)
    assert np.abs(by_ddim["x"] - whole["x"]).max() > 1e-3
    for made, integrator in ((whole, dpmpp_3m), (by_ddim, ddim)):
        np.testing.assert_allclose(made["x"], again(integrator, made["noise"], made["cond"]), rtol=1e-5, atol=1e-6)
        # A label's only mode attracts its samples: 1 is seven of its standard deviations.
        assert np.abs(made["x"] - MIXTURE.means[made["cond"]]).max() < 1


def test_noise_is_normal_and_labels_are_uniform():
    n = 6000
    made = pairs(n, n, steps=1)
    np.testing.assert_allclose(made["noise"].std() / 80, 1, atol=4 / np.sqrt(2 * 2 * n))
    np.testing.assert_allclose(made["noise"].mean() / 80, 0, atol=4 / np.sqrt(2 * n))
    counts = np.bincount(made["cond"], minlength=3)
    assert made["cond"].min() == 0 and made["cond"].max() == 2
    np.testing.assert_allclose(counts / n, 1 / 3, atol=4 * np.sqrt(2 / 9 / n))
    assert set(pairs(3, 3, steps=1, num_classes=0)) == {"noise", "x"}


def test_a_path_leads_from_the_noise_to_x_over_the_nodes(paths):
    path, nodes = paths["path"], grids.karras(edm(), 4)
    assert path.shape == (22, 5, 2)
    np.testing.assert_array_equal(path[:, 0], paths["noise"])
    np.testing.assert_array_equal(path[:, -1], paths["x"])
    # 7 steps: two in each of three intervals, one in the last; so the grid is Karras' own of 7 intervals.
    fine = grids.karras(edm(), 7)
    solve = jax.jit(lambda grid, x, cond: dpmpp_3s(TEACHER.bind(cond), edm(), grid, x).x)
    for k in range(4):
        grid = fine[2 * k : 2 * k + 3]
        np.testing.assert_allclose(grid[[0, -1]], nodes[k : k + 2], rtol=1e-5)
        np.testing.assert_allclose(solve(grid, path[:, k], paths["cond"]), path[:, k + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", [edm(), flow(), vp_cosine(), ve()], ids=lambda p: type(p.schedule).__name__)
def test_a_path_follows_the_exact_flow(process):
    teacher = as_teacher(MIXTURE, process)
    made = teacher_pairs(
        teacher, process, jax.random.key(0), 32, (2,), steps=37, points=4, integrator=dpmpp_3s, num_classes=3
    )
    nodes = grids.karras(process, 4)
    for k in range(4):
        exact = flow_map(teacher.bind(made["cond"]), process, made["path"][:, k], nodes[k], nodes[k + 1])
        error = np.abs(made["path"][:, k + 1] - exact) / float(np.hypot(*map(float, _scales(process, nodes[k + 1]))))
        assert error.max() < 5e-3, (k, error.max())


@pytest.mark.parametrize("process", [edm(), vp_cosine(), ve()], ids=lambda p: type(p.schedule).__name__)
@pytest.mark.parametrize(("steps", "points"), [(22, 8), (7, 4), (3, 5), (64, 2)])
def test_the_grids_of_a_path_follow_each_other_downwards_over_its_nodes(process, steps, points):
    segments = np.concatenate([part[:, [0, -1]] for part in _segments(process, steps, points)])
    np.testing.assert_array_equal(segments.ravel()[::2], grids.karras(process, points)[:-1])
    np.testing.assert_array_equal(segments[1:, 0], segments[:-1, 1])
    assert segments[-1, 1] == 0
    for part in _segments(process, steps, points):
        assert np.all(np.diff(part, axis=1) < 0)


def _scales(process, t):
    return process.alpha(t), process.sigma(t)


@pytest.mark.parametrize("integrator", [predictor_corrector, functools.partial(ddim, eta=0.5)])
def test_an_integrator_that_draws_noise_draws_each_pairs_own(integrator):
    made = pairs(9, 16, integrator=integrator, points=3)
    assert_same(pairs(5, 2, integrator=integrator, points=3), {name: a[:5] for name, a in made.items()})
    # Alike but for their noise, samples of one start would be alike but for rounding.
    assert len(np.unique(np.round(made["x"] - made["noise"] / 80, 3))) == 18


def test_wrong_numbers_are_refused_in_words():
    for kwargs in ({"steps": 0}, {"batch_size": 0}, {"points": -1}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            pairs(**{"count": 3, "batch_size": 3, **kwargs})
    with pytest.raises(ValueError, match="count = 0"):
        pairs(0, 3)
    with pytest.raises(ValueError, match=r"broken with 2 steps led 3 of 3 samples to NaN .* from pair 0"):

        def broken(denoise, process, grid, x):
            return integrators.Solution(x * jnp.nan, jnp.int32(0))

        pairs(3, 3, steps=2, integrator=broken)


def write(folder, count=22, teacher=TEACHER, process=None, key=0, **kwargs):
    process = edm() if process is None else process
    return write_pairs(
        folder, teacher, process, jax.random.key(key), count, (2,), **{**PATHS, "shard_size": 8, **kwargs}
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "store"
    assert write(folder) == 3
    return folder


@pytest.fixture
def copy(stored, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in contents(stored).items():
        (folder / name).write_bytes(content)
    return folder


def shard(folder, i):
    (path,) = folder.glob(f"{i:05d}-*.npy")
    return path


def test_a_store_holds_the_pairs_whatever_the_size_of_its_shards(stored, paths, tmp_path):
    store = open_pairs(stored)
    assert len(store) == 22 and [len(np.load(path)) for path in store.shards] == [8, 8, 6]
    assert_same(store.arrays(), paths)
    assert write(tmp_path / "five", shard_size=5) == 5
    assert_same(open_pairs(tmp_path / "five").arrays(), paths)


def test_batches_are_those_of_the_same_arrays_in_memory(stored):
    store = open_pairs(stored)
    batch, reference = store.source(7, seed=3), ArraySource(store.arrays(), 7, seed=3)
    for step in (0, 1, 40, 3):
        for name, array in reference(step).items():
            np.testing.assert_array_equal(batch(step)[name], array)
            assert batch(step)[name].dtype == array.dtype and batch(step)[name].flags.writeable


def test_a_killed_run_goes_on_where_it_stopped(stored, tmp_path):
    def killed_after(done, total):
        assert total == 22
        if done == 16:
            raise KeyboardInterrupt

    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        write(folder, report=killed_after)
    (folder / ".00002-0123456789abcdef.npy.part").write_bytes(b"half a shard")  # killed while writing
    before = {path: path.stat().st_ino for path in folder.glob("*.npy")}
    assert len(before) == 2
    with pytest.raises(ValueError, match=r"1 of 3 shards .* missing or damaged \(numbers 2\)"):
        open_pairs(folder)
    assert write(folder) == 1
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert contents(folder) == contents(stored)
    assert write(folder) == 0


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_is_found_and_remade(stored, copy, damage):
    damage(shard(copy, 1))
    with pytest.raises(ValueError, match=r"numbers 1\).*repeat the command"):
        open_pairs(copy)
    assert write(copy) == 1
    assert contents(copy) == contents(stored)


def test_a_larger_count_adds_and_a_smaller_one_is_refused(copy, paths):
    assert write(copy, 30) == 2  # the last shard was not full
    store = open_pairs(copy)
    assert len(store) == 30
    assert_same({name: a[:22] for name, a in store.arrays().items()}, paths)
    with pytest.raises(ValueError, match="count: 30 before, 22 now"):
        write(copy)


def test_several_processes_share_the_work(stored, tmp_path):
    assert [write(tmp_path / "s", part=(p, 2)) for p in (1, 0)] == [1, 2]
    assert contents(tmp_path / "s") == contents(stored)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"teacher": as_teacher(MIXTURE.standardised(0.5), edm())}, "teacher: sha256"),
        ({"process": edm(sigma_max=40.0)}, "process.t_max: 80.0 before, 40.0 now"),
        ({"key": 1}, "key"),
        ({"steps": 10}, "steps: 7 before, 10 now"),
        ({"points": 0}, "points: 4 before, 0 now"),
        ({"integrator": ddim}, "integrator"),
        ({"num_classes": 0}, "num_classes"),
        ({"shard_size": 9}, "shard_size: 8 before, 9 now"),
    ],
)
def test_a_store_of_other_pairs_is_refused(copy, other, named):
    before = contents(copy)
    with pytest.raises(ValueError, match=f"holds other pairs: .*{named}"):
        write(copy, **other)
    assert contents(copy) == before


def test_a_folder_of_another_kind_is_refused(stored, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no teacher pairs but thesis.txt"):
        write(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder of teacher pairs"):
        open_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_pairs(tmp_path / "none")
    manifest = json.loads((stored / "manifest.json").read_text())
    for text, words in (("{", "damaged"), (json.dumps({**manifest, "kind": "format 9"}), "of the kind 'format 9'")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            open_pairs(tmp_path)
    with pytest.raises(OSError, match="cannot write pairs to"):
        write(tmp_path / "thesis.txt" / "store")


def test_a_bucket_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pairs are mapped from a disk, and gs:/+bucket/pairs is a bucket"):
        write_pairs(Path("gs://bucket/pairs"), TEACHER, edm(), jax.random.key(0), 4, (2,), num_classes=3)
    assert not list(tmp_path.iterdir())


def test_a_store_says_whether_it_fits(stored):
    store = open_pairs(stored)
    store.check_fits(edm(), (2,), 3, 4)
    store.check_fits(edm(), (2,), 3)
    for wanted, words in (((flow(), (2,), 3), "process"), ((edm(), (3,), 3), "shape"), ((edm(), (2,), 3, 8), "points")):
        with pytest.raises(ValueError, match=f"do not fit: {words}.* stored, .* wanted"):
            store.check_fits(*wanted)


def test_the_fingerprint_is_of_names_and_values():
    net = TEACHER.replace(params={"a": jnp.ones(2), "b": jnp.zeros(2)})
    assert fingerprint(net) == fingerprint(net.replace(params={"b": np.zeros(2, "f"), "a": np.ones(2, "f")}))
    swapped = net.replace(params={"b": jnp.ones(2), "a": jnp.zeros(2)})
    assert len({fingerprint(n) for n in (net, swapped, TEACHER, net.replace(rest={}))}) == 4


def test_every_integrator_of_the_command_line_makes_pairs():
    names = set(Pairs.__annotations__["integrator"].__args__)
    assert names == set(integrators.__all__) - {"Denoise", "Solution", "ancestral", "reverse_diffusion", "unip"}
    nodes, x = grids.karras(edm(), 4), jnp.ones((3, 2))
    for name in names:
        integrator = getattr(integrators, name)
        assert _draws_noise(integrator, edm(), nodes, (2,)) == (name in STOCHASTIC), name
        # Grids reach it traced.
        end = jax.eval_shape(lambda n, k, f=integrator: f(TEACHER.bind(), edm(), n, x, k).x, nodes, jax.random.key(0))
        assert end.shape == (3, 2)


def test_the_command_stores_pairs_of_a_runs_guided_teacher_in_its_students_process(tmp_path, capsys, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class InFlow:
        def __call__(self, process):
            return dataclasses.replace(KD(steps=(1,))(process), process=flow())

    @dataclasses.dataclass(frozen=True)
    class Points:
        def load(self):
            return Data({"x": np.zeros((4, 2), np.float32), "cond": np.zeros(4, np.int32)}, (2,), 3)

    data = Points().load()
    experiment = Experiment("tiny", InFlow(), Points(), guidance=2.0)
    monkeypatch.setattr(commands, "open_run", lambda run: Opened(experiment, data, TEACHER, TEACHER))
    out = tmp_path / "pairs"
    argv = ["pairs", "run", "--out", str(out), "--count", "20", "--shard-size", "8"]
    argv += ["--integrator", "ddim", "--steps", "4", "--points", "2"]
    assert main(argv) == 0 and "20 pairs" in capsys.readouterr().err
    teacher = retime(guided(TEACHER, 2.0, np.int32(3)), edm(), flow())
    wanted = {"steps": 4, "points": 2, "num_classes": 3, "integrator": ddim}
    assert_same(open_pairs(out).arrays(), teacher_pairs(teacher, flow(), jax.random.key(0), 20, (2,), **wanted))
    assert main(argv) == 0 and "0 of 3 files made now" in capsys.readouterr().err
    assert main([*argv, "--seed", "1"]) == 2
    assert "holds other pairs: key" in capsys.readouterr().err
