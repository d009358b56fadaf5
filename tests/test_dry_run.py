"""Dry runs: published settings build and trace, counts are those published, and bytes are what a run really holds."""

import dataclasses
from pathlib import Path

import jax
import pytest

from ddistill import published
from ddistill.cli import main
from ddistill.config import Imported, MLPNetwork, Teacher
from ddistill.dry_run import dry_run
from ddistill.hub.weights import OURS
from ddistill.lora import adapt
from ddistill.net import module_of
from ddistill.runs import load_experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PUBLISHED = sorted((EXPERIMENTS / "published").glob("*.py"))
SMALL = {
    "SongUNetConfig": {"model_channels": 16, "num_blocks": 1, "channel_mult": (1,), "attn_resolutions": ()},
    "DhariwalUNetConfig": {"model_channels": 32, "num_blocks": 1, "channel_mult": (1,), "attn_resolutions": ()},
    "DiTConfig": {"num_layers": 2, "attention_head_dim": 8},
    "UNet2DConditionConfig": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "transformer_layers_per_block": 1,
    },
    "SD3Config": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128},
    "FluxConfig": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
}


def shrunk(experiment):
    """The same experiment with few and narrow blocks."""
    config = experiment.published.config
    config = dataclasses.replace(config, **SMALL[type(config).__name__])
    return dataclasses.replace(experiment, published=dataclasses.replace(experiment.published, config=config))


FLAGS = {
    "cifar10_dmd": ["--method.other.adversary.network.layers", "enc.32x32_block0"],
    "imagenet64_dmd": ["--method.other.adversary.network.layers", "dec.64x64_in1"],
    "imagenet64_ctm": ["--method.last-layer", "dec.64x64_block1.conv1.kernel"],
}
"""Names of layers of EDM's networks, where these have one level and few blocks."""


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_settings_build_and_trace(path):
    experiment = shrunk(load_experiment(path, FLAGS.get(path.stem, [])))
    done = dry_run(experiment, max(8, experiment.fsdp))
    assert [note.split(":")[0] for note in done.notes] == ["data", "teacher"]
    for stage in done.stages:
        rows = {row.name.split(",")[0]: row for row in stage.rows}
        assert {"teacher", "student", "ema"} <= set(rows) and rows["teacher"].trained == 0 < rows["student"].trained
        assert rows["student"].optimizer > 1.9 * rows["student"].weights  # two moments
        assert stage.batch["x"].endswith(str([experiment.batch_size, *experiment.published.shape]))
        assert ("noise" in stage.batch) == ("reflow" in path.stem)
    assert sum(stage.steps for stage in done.stages) == experiment.steps


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sd15", 859_520_964),
        ("sdxl", 2_567_463_684),
        ("sit_xl_2", 674_834_720),
        ("sd3_medium", 2_028_328_000),
        ("flux_dev", 11_901_408_320),
    ],
)
def test_published_networks_have_their_parameters(name, size):
    net = Imported(Path("nowhere")).abstract(getattr(published, name)())
    assert sum(leaf.size for path, leaf in net.params.items() if not path.startswith(OURS)) == size


@pytest.mark.parametrize("path", [p for p in PUBLISHED if p.stem in FLAGS], ids=lambda p: p.stem)
def test_layers_that_settings_name_are_in_the_networks(path):
    experiment = load_experiment(path)
    net, method = experiment.network.abstract(experiment.published), experiment.method
    if path.stem == "imagenet64_ctm":
        assert net.params[method.last_layer].shape == (3, 3, 192, 192)
        return
    layers = method.other.adversary.network.layers
    assert all(any(name.startswith(f"{layer}.") for name in net.params) for layer in layers)


@pytest.mark.parametrize(
    "path", [p for p in PUBLISHED if p.stem.startswith(("cifar10", "imagenet64"))], ids=lambda p: p.stem
)
def test_students_of_edm_drop_what_the_authors_drop(path):
    """Nothing, but for CTM on CIFAR-10, whose code leaves the network at its .13."""
    experiment = load_experiment(path)
    net = experiment.network.abstract(experiment.published)
    module = module_of(net)[0](net.params, net.rest)
    assert module.config.dropout == (0.13 if path.stem == "cifar10_ctm" else 0.0)


def test_the_adapters_of_lcm_lora_have_theirs():
    """67.5 M and 197 M in the paper's table 1, which does not say which layers it counts: within 1 %."""
    for name, millions in (("sd15", 67.5), ("sdxl", 197)):
        experiment = load_experiment(EXPERIMENTS / "published" / f"{name}_lcm_lora.py")
        net = Imported(Path("nowhere")).abstract(experiment.published)
        adapter = jax.eval_shape(lambda net: adapt(net, experiment.method.lora, jax.random.key(0)), net)
        assert sum(leaf.size for leaf in adapter.params.values()) / 1e6 == pytest.approx(millions, rel=0.01)


def digits(**changes):
    experiment = load_experiment(EXPERIMENTS / "digits_kd.py")
    network = MLPNetwork(width=512, blocks=1)
    return dataclasses.replace(experiment, network=network, teacher=Teacher(steps=2), batch_size=16, **changes)


def test_bytes_on_each_device_are_those_of_the_arrays():
    """A kernel of [512, 512] is split over fsdp and its biases are not; Adam holds two arrays beside each parameter."""
    whole, split = (dry_run(digits(fsdp=n), 4).stages[0] for n in (1, 4))
    rows = {row.name: row for row in whole.rows}
    student = rows["student"]
    assert student.weights == student.gradients == 4 * student.trained
    assert 0 <= student.optimizer - 8 * student.trained < 100  # and some counters
    part = {row.name: row for row in split.rows}["student"]
    assert student.weights / 4 < part.weights < student.weights / 2
    assert whole.batch["x"] == "float32 [16, 8, 8, 1]" and whole.batch["cond"] == "int32 [16]"


def test_what_is_wrong_is_told_before_the_run(tmp_path):
    path = EXPERIMENTS / "published" / "sd3_flow_consistency.py"
    good = shrunk(load_experiment(path))
    with pytest.raises(ValueError, match="batch_size = 64 does not split into 1 parts .* over 48 devices"):
        dry_run(dataclasses.replace(good, fsdp=1), 48)
    with pytest.raises(ValueError, match="fsdp = 8 must divide the number of devices, 12"):
        dry_run(good, 12)
    with pytest.raises(FileNotFoundError, match="does not exist; give a pipeline's folder"):
        dry_run(dataclasses.replace(good, published=None), 8)
    with pytest.raises(FileNotFoundError, match="data/sd3 does not exist: give one that `ddistill encode` wrote"):
        good.data.load()
    narrow = dataclasses.replace(good.published, prompt={"states": (333, 768), "pooled": (2048,)})
    with pytest.raises(ValueError, match=r"SD3 takes.*given"):
        dry_run(dataclasses.replace(good, published=narrow), 8)


def test_the_command_prints_networks_memory_and_batches(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["distill", str(EXPERIMENTS / "digits_kd.py"), "--dry-run", "--devices", "4", "--fsdp", "2"]) == 0
    told = capsys.readouterr().out
    for part in (
        "teacher",
        "student",
        "optimiser",
        "each of 4 devices, fsdp = 2",
        "batch: noise float32 [128, 8, 8, 1]",
    ):
        assert part in told
    assert not list(tmp_path.iterdir())
    assert main(["distill", str(EXPERIMENTS / "digits_kd.py"), "--devices", "4"]) == 2
    assert "--devices is of --dry-run" in capsys.readouterr().err
