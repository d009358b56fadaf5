"""Exports: bit-exact round trips, and what diffusers then samples is what ddistill samples."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub_folders import DDIM, DIT, FLOW, assert_trees_equal, inputs, make, write_pipeline
from parity import made

from ddistill import grids
from ddistill.hub.configs import KINDS, diffusion_of, scheduler_json
from ddistill.hub.load import load_network
from ddistill.hub.save import (
    WITH_LORA,
    export_lora,
    export_student,
    recipe,
    save_lora,
    save_network,
    save_pipeline,
    without_inputs,
)
from ddistill.hub.tensors import open_tensors
from ddistill.lora import LoRA, LowRank, adapt, delta, merge
from ddistill.net import EDMPrecondition, Scaled, VPrecondition, from_nnx, module_of, retime
from ddistill.networks.conditions import Prompt
from ddistill.process import discrete_vp, edm, flow, linear_betas
from ddistill.sample import sample

SMALL = {**DIT, "num_layers": 2}
B, SIDE = 2, 4
LABELS = jnp.asarray([1, 4])
KEY = jax.random.key(3)
RUN = jax.jit(sample, static_argnums=1, static_argnames="gamma")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines by the name of their kind of scheduler."""
    root = tmp_path_factory.mktemp("pipelines")
    velocity = {**DDIM, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_end": 0.01}
    schedulers = {"epsilon": DDIM, "v": velocity, "flow": FLOW, "x0": {**DDIM, "prediction_type": "sample"}}
    for name, scheduler in schedulers.items():
        write_pipeline(root / name, SMALL, scheduler)
    return root


def student_of(folder, *learned):
    """The teacher in a folder; with `learned`, target or guidance, as a student that reads them."""
    net, rng = load_network(folder), np.random.default_rng(0)

    def new(path, p):
        inward = path.split(".")[0] in learned
        return jnp.asarray(rng.standard_normal(p.shape), jnp.float32) / 30 if inward else p

    return net.replace(params={path: new(path, p) for path, p in net.params.items()})


def noise_of(made, seed=1):
    unit = jax.random.normal(jax.random.key(seed), (B, SIDE, SIDE, 3))
    return unit * made.process.sigma(jnp.asarray(made.times[0]))


CASES = {
    "ddim": ("epsilon", lambda p: grids.uniform(p, 4), 0.0, ()),
    "ddim_one_step": ("v", lambda p: grids.uniform(p, 1), 0.0, ("target", "guidance")),
    "tcd": ("x0", lambda p: grids.karras(p, 3), 0.0, ("guidance",)),
    "lcm": ("epsilon", lambda p: grids.lcm(p, 4), 1.0, ("target", "guidance")),
    "lcm_any_times": ("v", lambda p: grids.karras(p, 3), 1.0, ("target",)),
    "flow": ("flow", lambda p: grids.flow_shifted(3, 2.0), 0.0, ("guidance",)),
    "flow_stochastic": ("flow", lambda p: grids.uniform(p, 2), 1.0, ("target",)),
}
SCHEDULERS = {"ddim": "DDIMScheduler", "tcd": "TCDScheduler", "lcm": "LCMScheduler"}


def exported(name, folders, to):
    """A case's student, its export and what ddistill samples."""
    kind, times, gamma, learned = CASES[name]
    student = student_of(folders / kind, *learned)
    process = diffusion_of(json.loads((folders / kind / "scheduler" / "scheduler_config.json").read_text()))[0]
    w = 3.0 if "guidance" in learned else None
    made = export_student(to, student, process, times(process), gamma, teacher=folders / kind, guidance=w)
    cond = LABELS if w is None else Scaled(LABELS, jnp.full(B, w))
    x = RUN(student, made.process, np.asarray(made.times), noise_of(made), KEY, gamma=made.gamma, cond=cond).x
    return student, made, np.asarray(x)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_diffusers_samples_from_the_export_what_ddistill_samples(name, folders, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    _, made, expected = exported(name, folders, tmp_path / "out")
    names = [SCHEDULERS.get(name.split("_")[0], "FlowMatchEulerDiscreteScheduler")]
    assert made.scheduler["_class_name"] in names
    model, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    scheduler = getattr(diffusers, names[0]).from_pretrained(tmp_path / "out", subfolder="scheduler")
    theirs = sampled(torch, model, scheduler, made, monkeypatch)
    assert np.abs(theirs - expected).max() < 1e-4 * np.abs(expected).max()


def sampled(torch, model, scheduler, made, monkeypatch, noise=None, **cond):
    """What a pipeline does, in PyTorch, with ddistill's noise."""
    shape = (B, SIDE, SIDE, 3)
    drawn = iter(np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), shape)) for i in range(9))

    def draw(*args, **kwargs):
        return torch.from_numpy(np.transpose(next(drawn), (0, 3, 1, 2)).copy())

    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", draw, raising=False)
    scheduler.set_timesteps(**made.call)
    x = torch.from_numpy(np.transpose(np.asarray(noise_of(made)), (0, 3, 1, 2)).copy())
    cond = cond or {"class_labels": torch.from_numpy(np.asarray(LABELS, np.int64))}
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = model(scaled, timestep=t.expand(B), **cond).sample
            x = scheduler.step(out, t, x, **made.step).prev_sample
    return np.transpose(x.numpy(), (0, 2, 3, 1))


UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40, "clip_denoised": True}


@pytest.mark.torch
def test_a_consistency_model_is_sampled_by_its_scheduler(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    write_pipeline(tmp_path / "p", UNET, CONSISTENCY, part="unet")
    (tmp_path / "p" / "model_index.json").unlink()
    student, process = student_of(tmp_path / "p", "target"), edm()
    made = export_student(tmp_path / "out", student, process, [80.0, 4.0, 0.5, 0.0], 1.0, teacher=tmp_path / "p")
    np.testing.assert_allclose(made.times, [80.0, 4.0, 0.5, 0.0], rtol=5e-3)
    x = RUN(student, process, np.asarray(made.times), noise_of(made), KEY, gamma=1.0).x
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler).__name__ == "CMStochasticIterativeScheduler"
    theirs = sampled(torch, pipe.unet, pipe.scheduler, made, monkeypatch, class_labels=None)
    assert np.abs(theirs - x).max() < 1e-4 * np.abs(x).max()
    one = recipe(student, process, [80.0, 0.0], 0.0)
    assert one.call == {"num_inference_steps": 1} and one.times == (80.0, 0.0)


TEXT_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 2,
}


@pytest.mark.torch
def test_a_lora_student_opens_in_diffusers(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    write_pipeline(tmp_path / "p", TEXT_UNET, part="unet")
    teacher, process = load_network(tmp_path / "p"), diffusion_of(DDIM)[0]
    layers = ("*attn*.to_*.kernel", "*conv1.kernel", "time_embedding.*.kernel")
    adapted = adapt(teacher, LoRA(rank=2, alpha=6.0, layers=layers), jax.random.key(0))
    keys = jax.random.split(KEY, len(adapted.params))
    drawn = {n: jax.random.normal(k, p.shape) / 9 for k, (n, p) in zip(keys, adapted.params.items(), strict=True)}
    adapted = adapted.replace(params=drawn)
    student = merge(adapted)
    export_lora(tmp_path / "out", student, delta(adapted), process, [1000.0, 0.0], teacher=tmp_path / "p")
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas = loader.lora_state_dict(tmp_path / "out")
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    assert state[f"{block}.lora_A.weight"].shape == (2, 6) and state[f"{block}.lora_B.weight"].shape == (8, 2)
    assert state["unet.down_blocks.1.resnets.0.conv1.lora_A.weight"].shape == (2, 8, 3, 3)
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "p", subfolder="unet")
    loader.load_lora_into_unet(state, alphas, model)
    rng = np.random.default_rng(0)
    x, states = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, 4, 4, 4), (B, 3, 6)))
    with torch.no_grad():
        given = torch.from_numpy(np.transpose(x, (0, 3, 1, 2)).copy())
        out = model(given, torch.full((B,), 500), encoder_hidden_states=torch.from_numpy(states)).sample
    theirs = np.transpose(out.numpy(), (0, 2, 3, 1))
    run = jax.jit(lambda params: module_of(teacher)[0](params, {})(x, jnp.full(B, 500.0), Prompt(jnp.asarray(states))))
    ours, before = np.asarray(run(student.params)), np.asarray(run(teacher.params))
    assert np.abs(theirs - ours).max() < 1e-4 * np.abs(ours).max()
    assert np.abs(before - ours).max() > 0.1 * np.abs(ours).max()


def test_import_export_import_is_bit_exact_in_shards_too(folders, tmp_path):
    first = load_network(folders / "epsilon")
    save_pipeline(tmp_path / "again", first)
    again = load_network(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    config = json.loads((tmp_path / "again" / "transformer" / "config.json").read_text())
    save_network(tmp_path / "shards", config, again.params, largest=20_000)
    shards = open_tensors(tmp_path / "shards")
    assert len(shards.files) > 3 and all(file.stat().st_size < 30_000 for file in shards.files)
    whole = open_tensors(folders / "epsilon" / "transformer")
    assert sorted(shards) == sorted(whole)
    for name in whole:
        np.testing.assert_array_equal(np.asarray(shards[name]), np.asarray(whole[name]))
    process, precondition = first.apply.process, first.apply.precondition
    assert_trees_equal(load_network(tmp_path / "shards", process, precondition), first)
    assert diffusion_of(scheduler_json(process, precondition)) == (process, precondition)


def test_exports_in_half_precision_are_rounded_once(folders, tmp_path):
    net = load_network(folders / "epsilon")
    for dtype, kind in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        save_pipeline(tmp_path / dtype, net, dtype=dtype)
        stored = open_tensors(tmp_path / dtype / "transformer")
        name = "proj_out_2.weight"
        np.testing.assert_array_equal(
            np.asarray(stored[name]), np.asarray(net.params["proj_out_2.kernel"]).T.astype(kind)
        )
    large = net.replace(params={**net.params, "proj_out_1.bias": jnp.full(32, 1e5)})
    with pytest.raises(ValueError, match="proj_out_1.bias holds 100000, too large for fp16"):
        save_pipeline(tmp_path / "large", large, dtype="fp16")
    assert not (tmp_path / "large").exists() and not list(tmp_path.glob(".*"))


def test_what_a_student_reads_is_folded_where_it_is_one_number(folders):
    student = student_of(folders / "v", "target", "guidance")
    process = student.apply.process
    folded = student.replace(params=without_inputs(student, 0.0, 3.0))
    assert not any(np.any(p) for path, p in folded.params.items() if path.startswith(("target.", "guidance.")))
    x, labels = inputs()
    call = jax.jit(lambda net, x, t, cond, s: net(x, t, cond, s=s))
    with_inputs = call(student, x, 300.0, Scaled(labels, jnp.full(B, 3.0)), 0.0)
    np.testing.assert_allclose(call(folded, x, 300.0, labels, None), with_inputs, rtol=1e-4, atol=1e-4)
    bare = {**student.params, **{p: jnp.zeros_like(w) for p, w in student.params.items() if p.startswith("target.")}}
    assert np.abs(call(student.replace(params=bare), x, 300.0, labels, None) - with_inputs).max() > 1e-2
    with pytest.raises(ValueError, match="jumps to several.*--drop-target"):
        without_inputs(student, None, 3.0)
    with pytest.raises(ValueError, match="reads a guidance scale.*guidance="):
        without_inputs(student, 0.0, None)
    dropped = without_inputs(student, None, None, drop=True)
    np.testing.assert_array_equal(dropped["proj_out_2.kernel"], student.params["proj_out_2.kernel"])
    assert process.t_max == 1000


def test_students_of_other_processes_are_sampled_in_their_teachers(folders):
    teacher = load_network(folders / "epsilon")
    own, there = teacher.apply.process, flow()
    made = recipe(retime(teacher, own, there), there, [1.0, 0.5, 0.0], 0.0)
    assert made.process == own and made.scheduler["_class_name"] == "TCDScheduler"
    # Half noise, half data: rho = 1, where alpha² = 1/2.
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert made.call["timesteps"] == [999, int(np.argmin(np.abs(alphas - 0.5)))]


def test_the_card_tells_how_to_sample(folders, tmp_path):
    _, made, _ = exported("lcm", folders, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "4 network calls",
        "`LCMScheduler`",
        "timesteps=[999, 759, 499, 259]",
        "a scale of 3 is in the weights",
    ):
        assert words in card
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"] and index["_class_name"] == "DiTPipeline"
    assert made.scheduler["beta_start"] == 1e-4  # LCM's own default is another


@pytest.mark.torch
def test_networks_that_take_lora_files_are_those_whose_models_take_adapters():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    names = {name for name in KINDS if hasattr(getattr(diffusers, name), "load_lora_adapter")}
    assert set(WITH_LORA) == names


def test_all_layers_of_a_lora_file_have_one_rank(tmp_path):
    """Zeros fill up the lower ranks, and change no product: 3 × 4 of rank 1, and 2 × 2 taps of 5 × 2 of rank 3."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    update = {"a.kernel": LowRank(draw(3, 1), draw(1, 4)), "b.kernel": LowRank(draw(20, 3), draw(3, 2))}
    save_lora(tmp_path, update, {"a.kernel": np.zeros((3, 4)), "b.kernel": np.zeros((2, 2, 5, 2))}, "unet")
    stored = {n: np.asarray(t) for n, t in open_tensors(tmp_path / "pytorch_lora_weights.safetensors").items()}
    assert {n: a.shape for n, a in stored.items()} == {
        "unet.a.lora_A.weight": (3, 3), "unet.a.lora_B.weight": (4, 3),
        "unet.b.lora_A.weight": (3, 5, 2, 2), "unet.b.lora_B.weight": (2, 3, 1, 1),
    }  # fmt: skip
    product = stored["unet.a.lora_B.weight"] @ stored["unet.a.lora_A.weight"]
    np.testing.assert_allclose(product, (update["a.kernel"].down @ update["a.kernel"].up).T, rtol=1e-6)


def test_what_diffusers_cannot_do_is_refused_in_words(folders, tmp_path, monkeypatch):
    student = student_of(folders / "epsilon", "target")
    process = student.apply.process
    times = [1000.0, 500.0, 0.0]
    with pytest.raises(ValueError, match="jumps to several"):
        export_student(tmp_path / "out", student, process, times, teacher=folders / "epsilon")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"gamma = 0\.5"):
        recipe(student, process, times, 0.5)
    with pytest.raises(ValueError, match="are not 2 whole numbers"):
        recipe(student, process, [1.4, 1.2, 0.0], 0.0)
    module = made(lambda: make(SMALL))
    song = from_nnx(module, edm(), EDMPrecondition())
    with pytest.raises(ValueError, match="takes no times of its own: export one step"):
        recipe(song, edm(), [80.0, 1.0, 0.0], 1.0)
    assert recipe(song, edm(), [80.0, 0.0], 1.0).scheduler["_class_name"] == "EDMEulerScheduler"
    odd = from_nnx(module, discrete_vp(linear_betas(10)), VPrecondition())
    with pytest.raises(ValueError, match="no scheduler of diffusers is of DiscreteVP with VPrecondition"):
        recipe(odd, odd.apply.process, [10.0, 0.0], 0.0)
    update = {"proj_out_2.kernel": LowRank(jnp.ones((16, 1)), jnp.ones((1, 24)))}
    with pytest.raises(ValueError, match=r"no LoRA file into a DiTTransformer2DModel, .*: export the whole network"):
        export_lora(tmp_path / "lora", student, update, process, times, 1.0)
    monkeypatch.setattr("ddistill.hub.save.WITH_LORA", ("DiTTransformer2DModel",))
    update = {"proj_out_1.bias": jnp.ones(32)}
    with pytest.raises(ValueError, match="low-rank updates of kernels alone; these are not: proj_out_1.bias"):
        export_lora(tmp_path / "lora", student, update, process, times, 1.0)
    update = {"target.linear.kernel": LowRank(jnp.ones((256, 1)), jnp.ones((1, 16)))}
    with pytest.raises(ValueError, match=r"this student learned target\.linear\.kernel"):
        export_lora(tmp_path / "lora", student, update, process, times, 1.0)
    assert not (tmp_path / "lora").exists()
