"""Images in folders, tar files and arrays, from their bytes to batches that depend on the step alone."""

import dataclasses
import io
import json
import os
import tarfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddistill import previews
from ddistill.config import Data, Experiment, MLPNetwork, Teacher
from ddistill.data import loading
from ddistill.data.images import centre_crop, decode, folder_images, random_crop, tar_images, tar_index
from ddistill.data.loading import Readable, Unreadable, loader
from ddistill.data.rows import array_rows
from ddistill.datasets import ArrayFile, ImageFolder, TarShards
from ddistill.evaluate.quality import conditions_of
from ddistill.log import Silent
from ddistill.methods import KD
from ddistill.runs import distil


def content(pixels, kind="PNG", **options):
    """The bytes of an image file; pixels: an array or an image."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(value, size=(8, 8)):
    return content(np.full((*size, 3), value, np.uint8))


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def values(batch):
    """The number that every pixel of each image was given, from 0 to 255."""
    return np.rint((batch["x"].mean(axis=(1, 2, 3)) + 1) * 127.5).astype(int)


def test_bytes_become_numbers_from_minus_one_to_one(tmp_path):
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[:] = 0, 255, 51
    images, _ = folder_images(write(tmp_path, {"a.png": content(colours)}), 4, flip=False)
    row = images.finish(images[0], np.random.default_rng(0))
    assert row["x"].dtype == np.float32 and row["x"].shape == (4, 4, 3) and "cond" not in row
    np.testing.assert_allclose(row["x"][2, 1], [-1, 1, 51 / 127.5 - 1], atol=1e-7)


RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17  # 0 to 255


@pytest.mark.parametrize(
    ("file", "grey"),
    [
        (content(RAMP), RAMP),
        (content(np.stack([RAMP] * 3, -1)), RAMP),
        (content(RAMP > 99), 255 * (RAMP > 99)),
        (content(RAMP.astype(np.uint16) * 257), RAMP),  # 16 bits: 255 · 257 = 65535
        (content(RAMP.astype(np.uint16) * 257, "TIFF"), RAMP),
        (content(RAMP.astype(np.int32) * 257, "TIFF"), RAMP),
        (content(Image.fromarray(RAMP).convert("P"), "GIF"), RAMP),
        (content(Image.fromarray(np.stack([RAMP] * 3, -1)).convert("CMYK"), "TIFF"), RAMP),
        (content(np.stack([RAMP, np.full_like(RAMP, 255)], -1)), RAMP),
        # Transparency over white: a v + (1 − a) 255.
        (content(np.stack([RAMP, np.full_like(RAMP, 51)], -1)), 0.2 * RAMP + 0.8 * 255),
        (content(np.stack([RAMP] * 3 + [np.full_like(RAMP, 51)], -1)), 0.2 * RAMP + 0.8 * 255),
        (content(Image.fromarray(RAMP).convert("P"), "PNG", transparency=0), np.where(RAMP == 0, 255, RAMP)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(file, grey, channels):
    image = decode(file, channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    pixels = np.asarray(image).reshape(4, 4, channels)
    assert np.abs(pixels - np.asarray(grey)[..., None].astype(float)).max() <= 1


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_orientation_is_respected(orientation, turn):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(decode(content(pixels, exif=exif), 3))
    assert np.array_equal(upright, np.rot90(pixels, turn))  # EXIF 6: to be turned by 90 degrees clockwise


def test_what_has_no_scale_is_unreadable():
    for pixels in (RAMP.astype(np.float32), RAMP.astype(np.int32) * 1000):
        with pytest.raises(ValueError, match="no known scale"):
            decode(content(pixels, "TIFF"), 3)


def ramp(height, width):
    """An image whose red grows with x and whose green grows with y, by 1 for each pixel."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [8, 10, 30])
def test_the_middle_square_is_resized_as_positions_say(size):
    """A resized ramp is a ramp: pixel j of n lies at (j + 1/2) L/n − 1/2, and the square in the middle."""
    height, width = 60, 100
    pixels = np.asarray(centre_crop(ramp(height, width), size)).astype(float)
    step = height / size
    j = np.arange(size)
    inner = slice(1, -1)  # bicubic kernels are cut at the border
    left = (width - height) / 2
    np.testing.assert_allclose(pixels[5, inner, 0], (left + (j + 0.5) * step - 0.5)[inner], atol=step / 2 + 0.5)
    np.testing.assert_allclose(pixels[inner, 5, 1], ((j + 0.5) * step - 0.5)[inner], atol=1.1)  # rounded thrice


def test_resizing_averages_what_is_too_fine_to_show():
    y, x = np.mgrid[:96, :96]
    board = Image.fromarray(((x + y) % 2 * 255).astype(np.uint8))
    for size in (7, 24, 60):
        assert np.abs(np.asarray(centre_crop(board, size)).astype(float) - 127.5).max() < 10
    assert np.array_equal(np.asarray(centre_crop(ramp(9, 9), 9)), np.asarray(ramp(9, 9)))


def test_random_squares_are_four_fifths_of_the_side_or_more_and_anywhere():
    rng = np.random.default_rng(0)
    image = ramp(100, 120)
    crops = [np.asarray(random_crop(image, 40, rng)).astype(float) for _ in range(300)]
    inner = slice(1, -1)
    sides = np.array([(c[20, inner, 0][-1] - c[20, inner, 0][0]) * 40 / 37 for c in crops])
    assert 78 < sides.min() < 82 and 98 < sides.max() < 103
    left, top = (np.array([c[20, 20, k] for c in crops]) for k in (0, 1))
    assert left.min() < 43 and left.max() > 77  # the middle of a square of 80 lies between 40 and 80
    assert top.min() < 43 and top.max() > 57
    assert abs(left.mean() - 60) < 5 * 10 / np.sqrt(300) + 1


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Twelve images in three classes; image i is plain, of brightness 10 i; the last three are in a folder's folder."""
    files = {f"{'abc'[i // 4]}/{'deep/' * (i > 8)}{i:02d}.png": plain(10 * i) for i in range(12)}
    folder = tmp_path_factory.mktemp("classes")
    return write(folder, {**files, "a/readme.md": "not an image", "b/.hidden.png": b"no image"})


def test_folders_are_classes_and_flat_folders_have_none(classes, tmp_path):
    images, count = folder_images(classes, 8)
    assert count == 3 and len(images) == 12
    assert [int(label) for label in images.labels] == [0] * 4 + [1] * 4 + [2] * 4
    for i, name in enumerate(images.names):
        assert name.startswith("abc"[i // 4] + "/")
    without, none = folder_images(classes, 8, classes=False)
    assert none == 0 and without.labels is None and len(without) == 12
    flat, none = folder_images(write(tmp_path, {"x.JPG": content(RAMP, "JPEG"), "y.webp": content(RAMP, "WEBP")}), 4)
    assert none == 0 and list(flat.names) == ["x.JPG", "y.webp"]


def test_datasets_are_fields_of_an_experiment(classes):
    data = ImageFolder(classes, size=8, channels=1, flip=False).load()
    assert data.shape == (8, 8, 1) and data.num_classes == 3
    batch = data.source(12, 0, 0.0)(0)
    assert batch["x"].shape == (12, 8, 8, 1) and batch["cond"].dtype == np.int32
    np.testing.assert_array_equal(values(batch) // 40, batch["cond"])
    dropped = data.source(12, 0, 1.0)(0)
    np.testing.assert_array_equal(dropped["cond"], 3)
    np.testing.assert_array_equal(dropped["x"], batch["x"])
    assert data.to_unit(batch["x"]).min() >= 0


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"notes.txt": "no"}, {}, "holds no images .*jpeg"),
        ({"a/x.png": plain(0), "y.png": plain(0)}, {}, "images beside folders of images, y.png among them"),
        ({"x.png": plain(0)}, {"size": 0}, "size is 0"),
        ({"x.png": plain(0)}, {"channels": 4}, "channels is 4"),
        ({"x.png": plain(0)}, {"crop": "middle"}, "'middle'; 'centre' and 'random'"),
        ({"x.png": plain(0)}, {"prompts": "beside"}, "x.png has no prompt beside it, x.txt"),
        ({"x.png": plain(0)}, {"prompts": "all.txt"}, "no file all.txt"),
        ({"x.png": plain(0), "all.txt": "a\nb"}, {"prompts": "all.txt"}, "2 lines for 1 images"),
        ({"x.png": plain(0), "m.jsonl": "{"}, {"prompts": "m.jsonl"}, "m.jsonl, line 1: expected"),
        ({"x.png": plain(0), "m.jsonl": '{"prompt": "a"}'}, {"prompts": "m.jsonl"}, "line 1: expected .*file_name"),
        (
            {"x.png": plain(0), "m.jsonl": '\n{"file_name": "x.png", "label": "cat"}'},
            {"prompts": "m.jsonl"},
            "line 2: .*label 'cat' is no whole number",
        ),
        (
            {"x.png": plain(0), "y.png": plain(0), "m.jsonl": '{"file_name": "x.png", "label": 1}\n{"file_name": "z"}'},
            {"prompts": "m.jsonl"},
            "1 images are not in it, y.png among them; 1 of its files are no images .* z among them",
        ),
        (
            {"x.png": plain(0), "y.png": plain(0), "m.jsonl": '{"file_name":"x.png","label":1}\n{"file_name":"y.png"}'},
            {"prompts": "m.jsonl"},
            "1 of 2 images have not a label, y.png among them",
        ),
        ({"x.png": plain(0), "m.jsonl": '{"file_name":"x.png","label":-1}'}, {"prompts": "m.jsonl"}, "run from -1"),
        (
            {"x.png": plain(0), "m.jsonl": '{"file_name":"x.png","label":7}'},
            {"prompts": "m.jsonl", "num_classes": 5},
            "run from 7 to 7; expected 0 to 4",
        ),
    ],
)
def test_folders_that_do_not_fit_are_met_with_words(tmp_path, files, options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        folder_images(write(tmp_path, files), **{"size": 8, **options})


def test_no_folder_is_told():
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ImageFolder(Path("nowhere")).load()


def test_prompts_come_from_beside_from_lines_and_from_json(tmp_path):
    rows = [{"file_name": f"{c}.png", "text": c.upper(), "label": i} for i, c in enumerate("cab")]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows)
    files = {f"{c}.png": plain(0) for c in "abc"} | {f"{c}.txt": f" {c}é\n" for c in "abc"}
    write(tmp_path, {**files, "lines.txt": "one\ntwo\nthree\n", "meta.jsonl": jsonl})
    told = {p: folder_images(tmp_path, 8, prompts=p) for p in ("beside", "lines.txt", "meta.jsonl")}
    assert list(told["beside"][0].prompts) == ["aé", "bé", "cé"]
    assert list(told["lines.txt"][0].prompts) == ["one", "two", "three"]
    images, classes = told["meta.jsonl"]
    assert list(images.prompts) == ["A", "B", "C"] and list(images.labels) == [1, 2, 0] and classes == 3
    assert told["beside"][1] == 0 and told["beside"][0].labels is None


def tar_of(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else data.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Seven images in two files; image i is of brightness 10 i and class i % 3, with a long name among them."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        files = {}
        for i in range(4 * shard, min(7, 4 * shard + 4)):
            key = f"{'long/' * 40 * (i == 5)}{i:04d}"
            files |= {f"{key}.cls": f"{i % 3}", f"{key}.txt": f"image {i}", f"{key}.png": plain(10 * i)}
        tar_of(folder / f"{shard:05d}.tar", {"__info.md": "of the whole", **files})
    return folder


def test_reading_at_random_equals_reading_in_order(shards):
    images, classes = tar_images(shards, 8)
    assert classes == 3 and len(images) == 7
    whole = {}
    for file in sorted(shards.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                whole[f"{file.name}/{member.name}"] = tar.extractfile(member).read()
    for i in (6, 0, 5, 3):
        assert images.read(i) == whole[images.names[i]]
        assert images.prompts[i] == f"image {i}" and images.labels[i] == i % 3


def test_tar_files_train_as_the_same_images_in_a_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, _ = tar_images(shards, 8)
    write(tmp_path / "same", {f"{i:04d}.png": images.read(i) for i in range(7)})
    a, b = TarShards(shards, size=8).load().source(5, 3, 0.0), ImageFolder(tmp_path / "same", size=8).load()
    b = b.source(5, 3, 0.0)
    for step in range(4):
        np.testing.assert_array_equal(a(step)["x"], b(step)["x"])
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2


def test_the_table_of_a_tar_file_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    file, cache = tar_of(tmp_path / "a.tar", {"x.png": plain(1), "x.cls": "4"}), tmp_path / "cache"
    first = tar_index(file, cache)
    assert first == {"x.png": (512, len(plain(1)), 4, None)}
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert tar_index(file, cache) == first
    (kept,) = cache.iterdir()
    kept.write_text("{")  # damaged
    assert tar_index(file, cache) == first
    tar_of(file, {"y.png": plain(1), "y.json": '{"label": 2, "caption": "why"}'})
    os.utime(file, ns=(1, 1))
    assert tar_index(file, cache) == {"y.png": (512, len(plain(1)), 2, "why")}
    tar_of(file, {})
    (tmp_path / "file").write_text("")
    assert tar_index(file, tmp_path / "file" / "cache") == {}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tar_files_are_refused_in_words(tmp_path, mode):
    file = tar_of(tmp_path / "a.tar", {"x.png": plain(1)}, mode)
    with pytest.raises(ValueError, match=r"a\.tar is compressed \((gzip|bzip2|xz)\).*unpack it"):
        tar_images(file, 8)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x.txt": "a prompt"}, "holds no images"),
        ({"x.png": plain(0), "x.cls": "cat"}, "x.cls holds no label"),
        ({"x.png": plain(0), "x.json": "[]"}, "x.json holds no label"),
        ({"x.png": plain(0), "x.jpg": plain(0)}, "x.jpg is a second image of x"),
        ({"x.png": plain(0), "x.cls": "1", "y.png": plain(0)}, r"1 of 2 images have not a label, a\.tar/y\.png"),
    ],
)
def test_tar_files_that_do_not_fit_are_met_with_words(tmp_path, files, words):
    with pytest.raises(ValueError, match=words):
        tar_images(tar_of(tmp_path / "a.tar", files), 8)


def test_what_is_no_tar_file_is_told(tmp_path):
    write(tmp_path, {"a.tar": b"not a tar file at all" * 100, "empty/x": ""})
    with pytest.raises(ValueError, match=r"a\.tar is no tar file"):
        tar_images(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match="holds no files that end in .tar"):
        tar_images(tmp_path / "empty", 8)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tar_images(tmp_path / "none", 8)


def test_an_image_that_ends_beyond_the_file_is_unreadable(shards, tmp_path):
    file = tmp_path / "cut.tar"
    file.write_bytes((shards / "00000.tar").read_bytes())
    images, _ = tar_images(file, 8)
    os.truncate(file, 1100)
    with pytest.raises(Unreadable, match=r"cut\.tar/0003\.png: .*ends within it"):
        images[3]


def test_array_files_are_rows(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 5), np.uint8)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(6) % 2)
    rows, shape, classes = array_rows(tmp_path / "x.npy", labels=tmp_path / "y.npy")
    assert shape == (4, 5, 1) and classes == 2 and isinstance(rows.x, np.memmap)
    row = rows.finish(rows[3], np.random.default_rng(0))
    np.testing.assert_allclose(row["x"][..., 0], x[3] / 127.5 - 1, atol=1e-6)
    assert row["cond"] == 1 and row["x"].dtype == np.float32
    points = np.random.default_rng(1).normal(size=(7, 2))
    np.savez(tmp_path / "p.npz", x=points, labels=np.arange(7))
    data = ArrayFile(tmp_path / "p.npz", num_classes=9).load()
    assert data.shape == (2,) and data.num_classes == 9
    batch = data.source(7, 0, 0.0)(0)
    np.testing.assert_allclose(batch["x"], points[batch["cond"]], rtol=1e-6)


def test_array_files_that_do_not_fit_are_met_with_words(tmp_path):
    def told(words, name="x.npz", options=None, **arrays):
        if arrays:
            np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            array_rows(tmp_path / name, **(options or {}))

    told("does not exist", "none.npy")
    write(tmp_path, {"bad.npy": "no array", "bad.npz": "no archive"})
    told("cannot be read", "bad.npy")
    told("cannot be read", "bad.npz")
    told("expected an array x among a, b", a=np.ones(3), b=np.ones(3))
    told("expected uint8", x=np.ones((3, 2), np.int64))
    told("holds no rows", x=np.ones((0, 2)))
    told("one for each|its 3 rows", x=np.ones((3, 2)), labels=np.zeros(4, int))
    told("run from 0 to 5; expected 0 to 3", x=np.ones((2, 2)), labels=np.array([0, 5]), options={"num_classes": 4})
    told("flip needs images", x=np.ones((2, 2)), options={"flip": True})
    told("cannot be read", x=np.array([{}], object))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Item i is i; its row holds a random number too."""

    count: int
    bad: frozenset = frozenset()

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise Unreadable(f"item {i}: broken")
        return i

    def finish(self, item, rng):
        return {"x": np.float32([item]), "r": rng.random()}


def drawn(source, steps):
    return np.concatenate([source(step)["x"][:, 0] for step in steps]).astype(int)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (3, 7), (1, 2)])
def test_epochs_hold_every_item_once(n, size):
    stream = drawn(loader(Numbers(n), size, seed=1), range(3 * n))
    np.testing.assert_array_equal(np.sort(stream.reshape(-1, n)), np.tile(np.arange(n), (3 * size, 1)))


def test_orders_differ_between_epochs_and_between_seeds():
    orders = [drawn(loader(Numbers(20), 20, seed=seed), range(3)).reshape(3, 20) for seed in range(3)]
    distinct = {tuple(order) for seed in orders for order in seed}
    assert len(distinct) == 9 and tuple(range(20)) not in distinct


def test_a_batch_depends_on_seed_and_step_alone():
    early = loader(Numbers(10), 4, seed=5)
    uninterrupted = [early(step) for step in range(42)]
    late = loader(Numbers(10), 4, seed=5, threads=3)
    for step in (40, 41, 7, 8, 7):
        again = late(step)
        assert all(np.array_equal(again[name], uninterrupted[step][name]) for name in ("x", "r"))
    random = np.concatenate([b["r"] for b in uninterrupted])
    assert len(np.unique(random)) == len(random)  # an item is finished otherwise in each epoch
    with pytest.raises(ValueError, match="step is -1"):
        late(-1)


@pytest.mark.parametrize("parts", [2, 3])
def test_several_processes_share_a_batch(parts):
    whole = loader(Numbers(10), 6, seed=2)
    shares = [loader(Numbers(10), 6, seed=2, part=(p, parts)) for p in range(parts)]
    for step in (0, 1, 2, 9):
        for name in ("x", "r"):
            expected = whole(step)[name]
            np.testing.assert_array_equal(np.concatenate([share(step)[name] for share in shares]), expected)


def test_data_gives_each_process_its_rows_and_drops_labels_alike(classes, monkeypatch):
    held = ImageFolder(classes, size=8).load()
    in_memory = Data({"x": np.arange(24, dtype=np.float32).reshape(12, 2), "cond": np.arange(12) % 3}, (2,), 3)
    for data in (held, in_memory):
        whole = data.source(12, 0, 0.5)(3)
        shares = []
        for p in range(3):
            monkeypatch.setattr(jax, "process_index", lambda p=p: p)
            monkeypatch.setattr(jax, "process_count", lambda: 3)
            shares.append(data.source(12, 0, 0.5)(3))
        monkeypatch.undo()
        assert 0 < (whole["cond"] == 3).sum() < 12
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), whole[name])


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="a batch of 7 does not split over 2 processes"):
        loader(Numbers(3), 7, part=(0, 2))
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(Numbers(3), 0)
    with pytest.raises(ValueError, match="seed is -1"):
        loader(Numbers(3), 1, seed=-1)
    with pytest.raises(ValueError, match="no items"):
        loader(Numbers(0), 1)


def test_what_needs_a_few_batches_closes_what_reads_them(monkeypatch):
    class Labelled(Numbers):
        def finish(self, item, rng):
            return {"x": np.float32([item]), "cond": np.int32(item % 3)}

    open_now = []

    class Watched(loading.Reading):
        def __init__(self, values):
            super().__init__(values)
            open_now.append(self)

        def close(self):
            super().close()
            open_now.remove(self)

    monkeypatch.setattr(loading, "Reading", Watched)
    data = Data({}, (1,), 0, items=Readable(Labelled(10)), null=np.int32(3))
    batch = previews._batch(data, 4, 5)
    conditions = conditions_of(data, 4, 5)
    assert not open_now
    np.testing.assert_array_equal(conditions(0), batch["cond"])
    np.testing.assert_array_equal(conditions(0), batch["x"][:, 0] % 3)
    assert len(open_now) == 1
    with loading.released(conditions):
        conditions(1)
    assert not open_now
    np.testing.assert_array_equal(conditions(0), batch["cond"])  # it begins anew
    conditions.close()
    failing = loader(Readable(Numbers(3, frozenset(range(3)))), 2)
    with pytest.raises(ValueError, match="none of 100 items"):
        failing(0)
    assert not open_now


def test_batches_are_read_ahead_and_threads_end():
    class Slow(Numbers):
        def __getitem__(self, i):
            time.sleep(0.02)
            return i

    before = threading.active_count()
    source = loader(Slow(64), 8, threads=8, ahead=2)
    source(0)
    time.sleep(0.2)
    start = time.monotonic()
    source(1)
    assert time.monotonic() - start < 0.1  # 8 × .02 s, had they not been there
    source(5)
    deadline = time.monotonic() + 5
    while threading.active_count() > before + 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 8  # those of step 2 have gone


def test_half_of_the_images_are_mirrored_anew_each_epoch(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    write(tmp_path, {f"{i}.png": content(pixels) for i in range(40)})
    source = ImageFolder(tmp_path, size=8).load().source(40, 0, 0.0)
    mirrored = np.stack([source(step)["x"][:, 0, 0, 0] > 0 for step in range(10)])
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / 20
    still = ImageFolder(tmp_path, size=8, flip=False).load().source(40, 0, 0.0)
    assert not (still(0)["x"][:, 0, 0, 0] > 0).any()


@pytest.fixture
def damaged(tmp_path):
    """Ten images, and three that cannot be read or are too small."""
    good = {f"{i:02d}.png": plain(10 * i) for i in range(10)}
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    bad = {"cut.jpg": content(noise, "JPEG")[:-400], "empty.png": b"", "small.png": plain(0, (7, 30))}
    return write(tmp_path / "images", {**good, **bad})


def test_unreadable_images_are_replaced_counted_and_named(damaged, monkeypatch):
    data = ImageFolder(damaged, size=8).load()
    source = data.source(13, 0, 0.0)
    stream = np.concatenate([values(source(step)) for step in range(8)])
    counts = np.bincount(stream // 10, minlength=10)
    assert counts.sum() == 104 and counts.min() >= 8  # every good one once in each epoch, and others' stand-ins
    told = data.items.told()
    assert told.startswith("3 items could not be read")
    for line in ("cut.jpg: ", "empty.png: ", "small.png: 30 x 7 pixels are too few for 8"):
        assert told.count(line) == 1
    with monkeypatch.context() as patch:  # of several processes each knows of its own
        patch.setattr(jax, "process_count", lambda: 2)
        assert data.items.told() == f"in the part of batches that process 0 of 2 reads, {told}"
    again = ImageFolder(damaged, size=8).load().source(13, 0, 0.0)
    np.testing.assert_array_equal(again(5)["x"], source(5)["x"])  # stand-ins are the same after resuming
    assert ImageFolder(damaged, size=8, enlarge=True).load().items.told() is None


def test_a_folder_of_damaged_images_ends_with_words(tmp_path):
    write(tmp_path, {f"{i}.png": b"damaged" for i in range(5)})
    with pytest.raises(ValueError, match=r"none of 100 items drawn in a row .*the first: 0\.png: cannot identify"):
        ImageFolder(tmp_path, size=8).load()
    source = loader(Readable(Numbers(3, frozenset(range(3)))), 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="none of 100 items"):
            source(0)


def test_a_run_on_a_folder_resumes_and_names_what_it_skipped(damaged, tmp_path):
    experiment = Experiment(
        "folder", KD(pairs=16, teacher_steps=2, steps=(1,)), data=ImageFolder(damaged, size=8, channels=1),
        network=MLPNetwork(width=8, blocks=1), teacher=Teacher(steps=6), steps=1, batch_size=16, checkpoint_every=3,
    )  # fmt: skip

    class Stop(Silent):
        def progress(self, step):
            if step == 4:
                raise KeyboardInterrupt

    experiment = dataclasses.replace(experiment, log_every=1)
    whole = distil(experiment)
    with pytest.raises(KeyboardInterrupt):
        distil(experiment, tmp_path / "run", Stop())
    log = Silent()
    resumed = distil(experiment, tmp_path / "run", log)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole.teacher.params, resumed.teacher.params))
    (note,) = log.notes
    assert "empty.png" in note and "3 items" in note
