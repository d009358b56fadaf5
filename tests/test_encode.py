"""Encoded items: a folder that goes on where it was stopped, and what training reads from it."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import made, with_weights
from PIL import Image
from safetensors.numpy import save_file

from ddistill import datasets
from ddistill.cli import main
from ddistill.data.latents import encode, open_latents
from ddistill.data.loading import Unreadable
from ddistill.datasets import LatentFolder
from ddistill.hub.autoencoders import load_autoencoder
from ddistill.hub.weights import tensors_from
from ddistill.networks.autoencoder import DOWN, UP, AutoencoderKL, AutoencoderKLConfig
from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import rngs_of

COUNT = 21
BAD = (3, 16)


class Squares:
    """Item i is an image [4, 4, 1] whose left half is i / 10 and whose right half is 0; two cannot be read."""

    def __init__(self, count=COUNT, bad=BAD):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise Unreadable(f"{i}: broken")
        x = np.zeros((4, 4, 1), np.float32)
        x[:, :2] = i / 10
        return x, i % 3

    def finish(self, item, rng):
        return {"x": item[0], "cond": np.int32(item[1])}


def means(x):
    """The mean of each 2 x 2 square, and a standard deviation of 1/4."""
    x = jnp.asarray(x)
    mean = x.reshape(-1, 2, 2, 2, 2, 1).mean(axis=(2, 4))
    return {"mean": mean, "std": jnp.full_like(mean, 0.25)}


def texts(prompts):
    """Prompt(states [B, 2, 3] that hold the length of the text, pooled half of it)."""
    length = np.array([len(p) for p in prompts], np.float32)
    return Prompt(np.broadcast_to(length[:, None, None], (len(prompts), 2, 3)), pooled=length[:, None] / 2)


def write(folder, items=None, encoder=means, **options):
    items = Squares() if items is None else items
    options = {"made": {"encoder": "means"}, "num_classes": 3, "shard_size": 8, "batch_size": 3, **options}
    return encode(folder, items, encoder, names=[f"{i:02d}.png" for i in range(len(items))], **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode") / "latents"
    done = write(folder)
    assert done.shards == 3 and done.records == COUNT - 2 and done.skipped == ["03.png", "16.png"]
    return folder


def test_a_folder_holds_what_the_encoder_gave_for_each_item(stored):
    latents = open_latents(stored)
    assert len(latents) == 19 and latents.shape == (2, 2, 1)
    kept = [i for i in range(COUNT) if i not in BAD]
    for row, i in enumerate(kept):
        record = latents[row]
        assert record["index"] == i and record["label"] == i % 3 and record["mean"].dtype == np.float16
        np.testing.assert_allclose(record["mean"][..., 0], [[i / 10, 0]] * 2, rtol=1e-3)


def test_latents_are_drawn_anew_each_epoch_from_the_stored_moments(stored):
    data = LatentFolder(stored).load()
    assert data.shape == (2, 2, 1) and data.num_classes == 3
    source = data.source(19, 0, 0.0)
    batches = [source(step) for step in range(20)]
    again = LatentFolder(stored).load().source(19, 0, 0.0)(7)
    np.testing.assert_array_equal(again["x"], batches[7]["x"])
    noise = []
    for batch in batches:
        assert sorted(batch["cond"]) == sorted(i % 3 for i in range(COUNT) if i not in BAD)
        noise.append(batch["x"][:, :, 1].ravel())  # the mean is 0 there
    noise = np.stack(noise)
    n = noise.size
    assert len(np.unique(noise)) == n
    assert abs(noise.mean()) < 5 * 0.25 / np.sqrt(n) and abs(noise.std() / 0.25 - 1) < 5 / np.sqrt(2 * n)
    left = np.stack([b["x"][:, :, 0].mean() for b in batches])
    mean = np.mean([i / 10 for i in range(COUNT) if i not in BAD])
    assert abs(left.mean() - mean) < 5 * 0.25 / np.sqrt(n) + 1e-3


def test_a_killed_call_goes_on_where_it_stopped(stored, tmp_path):
    def killed_after(done, total):
        assert total == COUNT
        if done == 16:
            raise KeyboardInterrupt

    folder = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        write(folder, report=killed_after)
    with pytest.raises(ValueError, match=r"1 of 3 shards .* \(numbers 2\): repeat the command"):
        open_latents(folder)
    done = write(folder)
    assert done.shards == 1 and done.skipped == ["03.png", "16.png"]  # also those of the call before
    assert contents(folder) == contents(stored)
    assert write(folder).shards == 0


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard_is_found_and_remade(stored, tmp_path, verify):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in contents(stored).items():
        (folder / name).write_bytes(content)
    (cut,) = folder.glob("00001-*.npy")
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"1 of 3 shards .* \(numbers 1\)"):
        LatentFolder(folder, verify=verify).load()
    assert write(folder).shards == 1
    assert contents(folder) == contents(stored)


def test_several_processes_share_the_work(stored, tmp_path):
    assert [write(tmp_path / "s", part=(p, 2)).shards for p in (1, 0)] == [1, 2]
    assert contents(tmp_path / "s") == contents(stored)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"made": {"encoder": "others"}}, "encoder: means before, others now"),
        ({"dtype": "bfloat16"}, "dtype: float16 before, bfloat16 now"),
        ({"mirrored": True}, "mirrored"),
        ({"items": Squares(COUNT + 1)}, "items: sha256.*count: 21 before, 22 now"),
        ({"prompts": ["a"] * COUNT, "texts": texts}, "prompts"),
    ],
)
def test_a_folder_of_others_is_refused(stored, other, words):
    before = contents(stored)
    with pytest.raises(ValueError, match=f"holds other items: .*{words}"):
        write(stored, **other)
    assert contents(stored) == before


def test_bfloat16_keeps_what_float16_cannot_hold(tmp_path):
    def large(x):
        return {"x": jnp.asarray(x) + 1e5}

    with pytest.raises(ValueError, match=r"x of 00\.png is NaN or too large for float16"):
        write(tmp_path / "a", encoder=large)
    write(tmp_path / "b", encoder=large, dtype="bfloat16")
    latents = open_latents(tmp_path / "b")
    assert latents[0]["x"].dtype == jnp.bfloat16
    row = latents.finish(latents[0], np.random.default_rng(0))
    np.testing.assert_array_equal(row["x"], np.full((4, 4, 1), jnp.bfloat16(1e5), np.float32))


def test_mirror_images_are_encoded_too(stored, tmp_path):
    write(tmp_path / "m", mirrored=True)
    latents = open_latents(tmp_path / "m", flip=True)
    assert latents.shape == (2, 2, 1)
    rng = np.random.default_rng(0)
    right = [latents.finish(latents[18], rng)["x"][0, 1, 0] > 1 for _ in range(200)]
    assert abs(np.mean(right) - 0.5) < 5 * 0.5 / np.sqrt(200)
    assert not any(open_latents(tmp_path / "m").finish(latents[18], rng)["x"][0, 1, 0] > 1 for _ in range(20))
    with pytest.raises(ValueError, match="holds no mirror images"):
        LatentFolder(stored, flip=True).load()


def test_prompts_become_conditions_and_the_empty_one_means_none(tmp_path):
    prompts = ["a" * i for i in range(COUNT)]
    write(tmp_path, prompts=prompts, texts=texts, dtype="float32", encoder=lambda x: {"x": x})
    data = LatentFolder(tmp_path).load()
    assert data.num_classes == 0 and isinstance(data.none, Prompt)
    np.testing.assert_array_equal(data.none.states, np.zeros((2, 3)))
    source = data.source(8, 0, 0.0)
    batch, dropped = source(2), data.source(8, 0, 0.5)(2)
    length = np.rint(batch["x"][:, 0, 0, 0] * 10)
    assert isinstance(batch["cond"], Prompt) and batch["cond"].mask is None
    np.testing.assert_array_equal(batch["cond"].states, np.broadcast_to(length[:, None, None], (8, 2, 3)))
    np.testing.assert_array_equal(batch["cond"].pooled[:, 0], length / 2)
    gone = dropped["cond"].pooled[:, 0] != batch["cond"].pooled[:, 0]
    assert 0 < gone.sum() < 8  # by the same draws in every field
    np.testing.assert_array_equal(dropped["cond"].states[gone], 0)
    np.testing.assert_array_equal(dropped["cond"].states[~gone], batch["cond"].states[~gone])
    zeros = Prompt(np.zeros((1, 2, 3)), pooled=np.full((1, 1), -1.0))
    write(tmp_path, prompts=prompts, texts=texts, dtype="float32", encoder=lambda x: {"x": x}, none=zeros)
    assert LatentFolder(tmp_path).load().none.pooled == [-1]
    (none,) = tmp_path.glob("none-*.npy")
    none.unlink()
    with pytest.raises(ValueError, match="lacks the condition that means none: repeat"):
        open_latents(tmp_path)


def test_a_shard_of_gaps_alone_is_whole(tmp_path):
    items = Squares(bad=tuple(range(8)))
    done = write(tmp_path / "a", items)
    assert done.records == 13 and done.skipped == [f"{i:02d}.png" for i in range(8)]
    assert write(tmp_path / "a", items).shards == 0
    latents = open_latents(tmp_path / "a")
    assert latents[0]["index"] == 8 and len(latents.records.arrays()["index"]) == 13
    with pytest.raises(ValueError, match="none of its 21 items could be read"):
        write(tmp_path / "b", Squares(bad=tuple(range(COUNT))))


def test_the_encoder_sees_one_size_of_batch_over_all_devices(tmp_path):
    seen = []

    def spy(x):
        seen.append((x.shape, len(x.sharding.device_set)))
        return {"x": x}

    write(tmp_path / "a", encoder=spy, batch_size=5)
    assert set(seen) == {((8, 4, 4, 1), jax.local_device_count())}  # 5 rounded up to the devices' number


def test_wrong_requests_get_words(tmp_path):
    with pytest.raises(ValueError, match="a text encoder is what is missing"):
        write(tmp_path, prompts=["a"] * COUNT)
    with pytest.raises(ValueError, match=r"fields \['label'\] are given twice"):
        write(tmp_path / "a", encoder=lambda x: {"label": x})
    with pytest.raises(ValueError, match="batch_size = 0"):
        write(tmp_path / "b", batch_size=0)
    with pytest.raises(FileNotFoundError, match=r"is not a folder of encoded items: give one that `ddistill encode`"):
        open_latents(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.json").write_text(json.dumps({"kind": "x", "count": 1, "shard_size": 1, "made": {}}))
    with pytest.raises(ValueError, match="of the kind 'x'"):
        open_latents(tmp_path / "c")


CONFIG = AutoencoderKLConfig(
    down_block_types=(DOWN,) * 2, up_block_types=(UP,) * 2, block_out_channels=(4, 8), norm_num_groups=2,
    latent_channels=3, shift_factor=0.1, scaling_factor=0.5,
)  # fmt: skip


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The encoder and decoder of a small autoencoder, and its folder in a pipeline of diffusers."""
    pipeline = tmp_path_factory.mktemp("pipeline")
    folder = pipeline / "vae"
    folder.mkdir()
    params, rest, code = with_weights(made(lambda: AutoencoderKL(CONFIG, rngs=rngs_of(0)), ours=()))
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **dataclasses.asdict(CONFIG)}))
    save_file(dict(tensors_from(params)), folder / "diffusion_pytorch_model.safetensors")
    encode, decode = (
        jax.jit(lambda z, name=name: getattr(code(params, rest), name)(z)) for name in ("encode", "decode")
    )
    return encode, decode, pipeline


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images of 8 x 8 in two classes, with prompts, and one that is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    for i, image in enumerate(pixels):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(png(image))
        (folder / "ab"[i % 2] / f"{i}.txt").write_text("x" * i)
    (folder / "b" / "cut.png").write_bytes(png(pixels[0])[:50])
    (folder / "b" / "cut.txt").write_text("none")
    order = [0, 2, 4, 1, 3]
    return folder, pixels[order] / 127.5 - 1, order


def test_the_command_stores_what_the_autoencoder_gives(autoencoder, pictures, tmp_path, capsys):
    encoder, decoder, pipeline = autoencoder
    folder, x, order = pictures
    argv = ["encode", str(folder), "--to", str(tmp_path / "l"), "--models", str(pipeline), "--size", "8"]
    argv += ["--dtype", "float32", "--mirrored", "--shard-size", "4"]
    assert main(argv) == 0
    told = capsys.readouterr().err
    assert "1 items could not be read" in told and "b/cut.png" in told and "5 images in" in told
    assert main(argv) == 0 and "0 files made now" in capsys.readouterr().err
    records = open_latents(tmp_path / "l").records.arrays()
    np.testing.assert_array_equal(records["label"], [i % 2 for i in order])
    for side, images in enumerate((x, x[:, :, ::-1])):
        posterior = encoder(jnp.asarray(images, jnp.float32))
        np.testing.assert_allclose(records["mean"][:, side], (posterior.mean - 0.1) * 0.5, rtol=1e-4, atol=1e-5)
        expected = 0.5 * jnp.exp(0.5 * posterior.log_variance)
        np.testing.assert_allclose(records["std"][:, side], expected, rtol=1e-4, atol=1e-6)
    data = LatentFolder(tmp_path / "l", flip=True, models=pipeline).load()
    assert data.shape == (4, 4, 3) and data.num_classes == 2
    z = records["mean"][:2, 0]
    decoded = np.clip(decoder(z / 0.5 + 0.1), -1, 1)
    np.testing.assert_allclose(data.to_unit(z), (decoded + 1) / 2, atol=1e-5)
    assert main(["6" if word == "8" else word for word in argv]) == 2
    assert "holds other items: " in capsys.readouterr().err


def test_the_command_makes_conditions_of_prompts(autoencoder, pictures, tmp_path, monkeypatch, capsys):
    class Encoder:
        """A stand-in for the pipeline's text encoders."""

        params = (jnp.ones(3),)

        def tokenize(self, prompts):
            return np.array([len(p) for p in prompts])

        def encode(self, params, tokens):
            return Prompt(tokens[:, None, None] * params[0], pooled=tokens[:, None] + 0.0)

        def null(self):
            return Prompt(jnp.zeros((1, 1, 3)), pooled=jnp.full((1, 1), -1.0))

    *_, pipeline = autoencoder
    folder, _, order = pictures
    monkeypatch.setattr(datasets, "open_prompts", lambda *_, **__: Encoder())
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    argv = ["encode", str(folder), "--to", str(tmp_path), "--models", str(pipeline), "--size", "8", "--prompts"]
    assert main([*argv, "beside"]) == 0
    data = LatentFolder(tmp_path).load()
    assert data.num_classes == 0 and float(data.none.pooled[0]) == -1
    records = open_latents(tmp_path).records.arrays()
    np.testing.assert_array_equal(records["states"][:, 0, 2], order)
    np.testing.assert_array_equal(records["sizes"], [[8, 8, 0, 0, 8, 8]] * 5)
    assert main([*argv, "nowhere.txt"]) == 2
    assert "no file nowhere.txt" in capsys.readouterr().err


def test_what_holds_no_autoencoder_is_refused_in_words(autoencoder, tmp_path):
    *_, pipeline = autoencoder
    with pytest.raises(FileNotFoundError, match=r"config\.json, the configuration of an autoencoder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="a model of the class UNet2DModel; autoencoders are AutoencoderKL"):
        load_autoencoder(tmp_path)
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    weights = (pipeline / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 4}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"another shape: .*encoder\.conv_out\.weight"):
        load_autoencoder(tmp_path)


def test_open_images_knows_folders_tar_files_and_arrays(pictures, tmp_path):
    folder, x, _ = pictures
    np.save(tmp_path / "x.npy", np.rint((x + 1) * 127.5).astype(np.uint8))
    rows, classes = datasets.open_images(tmp_path / "x.npy", 8)
    assert classes == 0 and len(rows) == 5
    images, classes = datasets.open_images(folder, 8)
    assert classes == 2 and len(images) == 6 and not images.flip and images.crop == "centre"
    with pytest.raises(ValueError, match=r"rows of shape \[8, 8, 3\]: expected images \[16, 16, 3\]"):
        datasets.open_images(tmp_path / "x.npy", 16)
