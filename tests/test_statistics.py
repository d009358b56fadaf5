"""What networks see of images, kept as statistics: against the whole at once, and what is refused or skipped."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluate_peers import judged
from linear_features import linear_features
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from ddistill import sharding
from ddistill.config import Data
from ddistill.data.images import Pictures
from ddistill.data.loading import Readable
from ddistill.evaluate import seen
from ddistill.evaluate.kernels import cmmd, inception_score, kid
from ddistill.evaluate.metrics import frechet_parts
from ddistill.evaluate.moments import moments_of
from ddistill.evaluate.neighbours import manifold
from ddistill.evaluate.real import images_at, images_of, told
from ddistill.evaluate.scores import METRICS, chosen, scores, wanted
from ddistill.evaluate.statistics import (
    check_statistics,
    open_statistics,
    save_statistics,
    statistics_in,
    statistics_of,
    with_moments,
)

SIDE, COUNT = 8, 37


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def pixels(seed, count=COUNT, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture(scope="module")
def networks():
    return {"dinov2": linear_features(SIDE)}


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(pixels(0)):
        (tmp_path / f"{i:02}.png").write_bytes(png(image))
    return tmp_path


WANTED = seen.Wanted(frozenset({"dinov2.embedding"}), frozenset({"dinov2.embedding"}))


def statistics(images, networks, **options):
    return statistics_of(images, networks, WANTED, **{"kept": 1000, "batch_size": 16, **options})


def embeddings(networks, images):
    return np.asarray(networks["dinov2"].apply(images)["embedding"], np.float64)


def test_statistics_are_the_mean_and_covariance_of_all_features(folder, networks):
    images = images_at(folder, (SIDE, SIDE, 3))
    found = statistics(images, networks)
    x = embeddings(networks, pixels(0))
    moments = found.whole.moments["dinov2.embedding"]
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.whole.rows["dinov2.embedding"], x, rtol=1e-4, atol=1e-5)
    one, other = found.halves
    assert (one.count, other.count) == (19, 18) and set(one.numbers) | set(other.numbers) == set(range(COUNT))
    np.testing.assert_allclose(other.moments["dinov2.embedding"].mean, x[other.numbers].mean(0), rtol=1e-5, atol=1e-6)
    assert found.about["images"] == COUNT and found.about["resolution"] == [SIDE, SIDE]
    few = statistics(images, networks, kept=10)
    assert few.whole.count == COUNT and few.whole.rows["dinov2.embedding"].shape[0] == 10 == len(few.whole.numbers)


def test_a_file_gives_back_what_was_saved(folder, networks, tmp_path):
    made = statistics(images_at(folder, (SIDE, SIDE, 3)), networks, kept=21)
    file = tmp_path / "deep" / "s.npz"
    save_statistics(file, made)
    back = open_statistics(file)
    assert back.about == made.about
    for a, b in zip((made.whole, *made.halves), (back.whole, *back.halves), strict=True):
        assert a.count == b.count
        np.testing.assert_array_equal(a.numbers, b.numbers)
        np.testing.assert_array_equal(a.rows["dinov2.embedding"], b.rows["dinov2.embedding"])
        for of in ("mean", "covariance"):
            x, y = (getattr(s.moments["dinov2.embedding"], of) for s in (a, b))
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    assert check_statistics(file, back, networks, WANTED, (SIDE, SIDE, 3)) == ()


def test_other_networks_weights_preprocessings_and_resolutions_are_refused(folder, networks, tmp_path):
    made = statistics(images_at(folder, (SIDE, SIDE, 3)), networks)
    file = tmp_path / "s.npz"
    shape = (SIDE, SIDE, 3)
    with pytest.raises(ValueError, match="another dinov2 network: digest"):
        check_statistics(file, made, {"dinov2": linear_features(SIDE, 1)}, WANTED, shape)
    with pytest.raises(ValueError, match="preprocessing 'plain8, 8 pixels' there, 'plain16, 16 pixels' here"):
        check_statistics(file, made, {"dinov2": linear_features(16, 0)}, WANTED, shape)
    with pytest.raises(ValueError, match="images of 8 x 8 pixels, and the samples have 16 x 16"):
        check_statistics(file, made, networks, WANTED, (16, 16, 3))
    with pytest.raises(ValueError, match="lacks inception.pool"):
        check_statistics(file, made, networks, wanted(("fid",)), shape)


def test_files_of_adm_and_edm_are_read_and_those_of_other_widths_refused(tmp_path):
    inception = {"inception": linear_features(SIDE, pool=128, spatial=30)}
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 128)), rng.standard_normal((40, 30))
    file = tmp_path / "adm.npz"
    np.savez(file, mu=x.mean(0), sigma=np.cov(x, rowvar=False), mu_s=y.mean(0), sigma_s=np.cov(y, rowvar=False))
    found, pictured = statistics_in(file)
    assert not pictured
    assert found.halves is None and set(found.whole.moments) == {"inception.pool", "inception.spatial"}
    np.testing.assert_allclose(found.whole.moments["inception.pool"].covariance, np.cov(x, rowvar=False))
    (note,) = check_statistics(file, found, inception, wanted(("fid", "sfid")), (SIDE, SIDE, 3))
    assert "does not tell its network" in note
    np.savez(file, mu=x.mean(0)[:100], sigma=np.eye(100))
    with pytest.raises(ValueError, match="100 numbers for inception.pool, and the network has 128"):
        check_statistics(file, statistics_in(file)[0], inception, wanted(("fid",)), (SIDE, SIDE, 3))
    with pytest.raises(ValueError, match=r"lacks inception.pool, which these metrics need"):
        check_statistics(file, statistics_in(file)[0], inception, wanted(("kid",)), (SIDE, SIDE, 3))
    np.savez(file, nothing=np.ones(3))
    with pytest.raises(ValueError, match="holds nothing: statistics have mu and sigma"):
        open_statistics(file)
    file.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        statistics_in(file)
    with pytest.raises(FileNotFoundError):
        open_statistics(tmp_path / "none.npz")


def test_arrays_of_images_are_a_reference_and_the_moments_beside_them_count(tmp_path, networks):
    file = tmp_path / "batch.npz"
    np.savez(file, arr_0=pixels(0), arr_1=np.zeros(COUNT))
    assert statistics_in(file) == (None, True)
    images = images_at(file, (SIDE, SIDE, 3))
    made = statistics(images, networks)
    np.testing.assert_allclose(
        made.whole.rows["dinov2.embedding"], embeddings(networks, pixels(0)), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"holds uint8 \[8, 8, 3\]; reference images are bytes \(uint8\) \[16, 16, 3\]"
    ):
        images_at(file, (16, 16, 3))
    theirs = statistics(images_at(file, (SIDE, SIDE, 3)), networks)
    both = with_moments(made, theirs, file)
    assert both.whole.moments["dinov2.embedding"] is theirs.whole.moments["dinov2.embedding"]
    assert "moments of its own" in both.about["notes"][-1]


def test_a_damaged_image_is_skipped_and_named(folder, networks):
    (folder / "05.png").write_bytes(png(pixels(0)[5])[:60])
    images = images_at(folder, (SIDE, SIDE, 3))
    found = statistics(images, networks)
    assert found.whole.count == found.about["images"] == COUNT - 1 and 5 not in found.whole.numbers
    (note,) = found.about["notes"]
    assert note.startswith(f"1 of {COUNT} images could not be read and were skipped: 05.png")


def test_images_of_other_sizes_are_refused_or_cut(folder, networks):
    (folder / "wide.png").write_bytes(png(np.zeros((24, 40, 3), np.uint8)))
    with pytest.raises(
        ValueError, match=r"2 sizes: 37 of 8 x 8 \(00.png\), 1 of 40 x 24 \(wide.png\), and the .* --crop"
    ):
        images_at(folder, (SIDE, SIDE, 3))
    assert statistics(images_at(folder, (SIDE, SIDE, 3), crop=True), networks).whole.count == COUNT + 1
    with pytest.raises(ValueError, match="the samples are 16 x 16"):
        images_at(folder, (16, 16, 3))


def test_a_turned_image_counts_as_it_is_seen(tmp_path, networks):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(png(np.zeros((8, 12, 3), np.uint8), exif=exif))
    with pytest.raises(ValueError, match="1 of 8 x 12"):
        images_at(tmp_path, (SIDE, SIDE, 3))


def test_grey_images_among_colours_are_counted_and_named(folder):
    for name in ("20.png", "30.png"):
        (folder / name).write_bytes(png(pixels(0)[0, :, :, 0]))
    images = images_at(folder, (SIDE, SIDE, 3))
    assert told(images) == (f"2 of {COUNT} images are grey, and were made RGB: 20.png, 30.png",)
    (_, batch), *_ = images.batches(COUNT)
    np.testing.assert_array_equal(batch[20], np.repeat(pixels(0)[0, :, :, :1], 3, axis=2))


def test_tar_files_are_looked_at_as_folders_are(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "20.png").write_bytes(png(pixels(0)[0, :, :, 0]))
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    images = images_at(shard, (SIDE, SIDE, 3))
    assert told(images) == (f"1 of {COUNT} images are grey, and were made RGB: a.tar/20.png",)
    (folder / "wide.png").write_bytes(png(np.zeros((24, 40, 3), np.uint8)))
    with tarfile.open(shard, "a") as tar:
        tar.add(folder / "wide.png", "wide.png")
    with pytest.raises(ValueError, match=r"2 sizes: 37 of 8 x 8 \(a.tar/00.png\), 1 of 40 x 24 \(a.tar/wide.png\)"):
        images_at(shard, (SIDE, SIDE, 3))


def test_the_heads_of_png_files_are_read_without_their_pixels(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(np.zeros((SIDE, SIDE, 3), np.uint8)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a head has no pixels"))
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("a head has no pixels"))
    assert len(images_at(tmp_path, (SIDE, SIDE, 3))) == 1


def test_folders_without_an_image_are_refused(tmp_path, networks):
    with pytest.raises(ValueError, match="holds no images"):
        images_at(tmp_path, (SIDE, SIDE, 3))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images_at(tmp_path / "none", (SIDE, SIDE, 3))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="holds no image that can be read; 1 of 1 images could not be read"):
        statistics(images_at(tmp_path, (SIDE, SIDE, 3)), networks)


def test_data_of_a_run_is_neither_mirrored_nor_cut_at_random():
    x = pixels(3)
    contents = [png(np.pad(image, ((0, 0), (4, 4), (0, 0)))) for image in x]
    names = [f"{i}.png" for i in range(COUNT)]
    data = Data({}, (SIDE, SIDE, 3), 0, items=Readable(Pictures(names, lambda i: contents[i], SIDE, crop="random")))
    images = images_of(data, "the data")
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in images.batches(10)]), x)
    rows = images_of(Data({"x": x / np.float32(127.5) - 1}, (SIDE, SIDE, 3), 0), "the data")
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in rows.batches(10)]), x)
    with pytest.raises(ValueError, match=r"networks look at images"):
        images_of(Data({"x": np.zeros((5, 2))}, (2,), 0), "the data")


def test_one_device_and_two_processes_see_what_eight_devices_see(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")}
    script = Path(__file__).parent / "evaluate_peers.py"
    peers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(i), str(port)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    eight = judged()
    told = [peer.communicate()[0] for peer in peers]
    assert [peer.returncode for peer in peers] == [0, 0], "\n".join(told)
    mesh = sharding.local_mesh(jax.devices()[:1])
    for module in (seen, sharding):
        monkeypatch.setattr(module, "local_mesh", lambda devices=None: mesh)
    monkeypatch.setattr(sharding, "make_mesh", lambda fsdp=1, tensor=1: mesh)
    others = [judged(), *(json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))]
    for rows in others:
        for row, expected in zip(rows, eight, strict=True):
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)
    floor, row, images = eight
    assert row["samples"] == 29 and floor["samples"] == 16 and images["skipped"] == 2
    assert set(METRICS) <= set(row) and min(images["lpips of prompts"], row["lpips"]) > 0
    assert row["fid"] > floor["fid"] > 0 and row["recall"] < floor["recall"]


def test_every_metric_reads_its_own_features_of_samples_and_of_the_real():
    rng = np.random.default_rng(0)

    def look(shift, n=40):
        rows = {
            key: (shift + rng.standard_normal((n, 5))).astype(np.float32)
            for key in ("inception.pool", "inception.logits", "clip.embedding")
        }
        rows["clip.embedding"] /= np.linalg.norm(rows["clip.embedding"], axis=1, keepdims=True)
        moments = {
            key: moments_of(scale * (shift + rng.standard_normal((n, 5))))
            for key, scale in (("inception.pool", 1), ("inception.spatial", 2), ("dinov2.embedding", 3))
        }
        return seen.Seen(n, moments, rows, np.arange(n))

    fake, real = look(0.0), look(0.7)
    found = scores(tuple(METRICS), fake, real, seed=3)

    def distance(key):
        one, other = fake.moments[key], real.moments[key]
        return frechet_parts(one.mean, one.covariance, other.mean, other.covariance).distance

    pools = [part.rows["inception.pool"] for part in (real, fake)]
    near, far = (manifold(*pools, k) for k in (3, 5))
    mean, std = inception_score(fake.rows["inception.logits"], seed=3)
    by_kernel = kid(pools[1], pools[0], seed=3)
    expected = {
        "fid": distance("inception.pool"), "sfid": distance("inception.spatial"), "kid": by_kernel.mean,
        "kid_std": by_kernel.std, "inception_score": mean, "inception_score_std": std, "precision": near.precision,
        "recall": near.recall, "density": far.density, "coverage": far.coverage,
        "fd_dinov2": distance("dinov2.embedding"),
        "cmmd": cmmd(fake.rows["clip.embedding"], real.rows["clip.embedding"]),
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-6)
    assert len({round(value, 6) for value in expected.values()}) == len(expected)  # none stands for another


def test_metrics_are_named_with_the_networks_they_need():
    assert chosen("fid, is", {"inception"}) == ("fid", "inception_score")
    assert set(chosen(None, {"clip"})) == {"cmmd"} and "fid" in chosen(None, {"inception"})
    with pytest.raises(ValueError, match="no metric fdi; known are fid"):
        chosen("fdi", {"inception"})
    with pytest.raises(ValueError, match="fd_dinov2 need features of dinov2: give the file of its weights"):
        chosen("fid,fd_dinov2", {"inception"})
    assert json.dumps(sorted(wanted(("fid", "kid")).moments)) == '["inception.pool"]'
