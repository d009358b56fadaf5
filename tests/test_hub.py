"""Reading models of diffusers: tensors slice by slice, configurations, schedulers, networks."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub_folders import DDIM, DIT, FLOW, inputs, make, tensors_for, write_model, write_pipeline
from jax.sharding import PartitionSpec
from parity import made
from safetensors.numpy import save_file

from ddistill import process as processes
from ddistill import sharding
from ddistill.hub.configs import config_json, diffusion_of, network_config, with_dropout
from ddistill.hub.load import load_network, network_from, open_diffusion, parts_of
from ddistill.hub.tensors import open_tensors
from ddistill.hub.weights import params_from
from ddistill.net import (
    BoundaryPrecondition,
    DataPrecondition,
    EDMPrecondition,
    EpsPrecondition,
    Net,
    VelocityPrecondition,
    from_nnx,
)
from ddistill.networks.edm import SongUNetConfig
from ddistill.process import discrete_vp, edm, flow

SMALL = {**DIT, "num_layers": 2}


def arrays(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_shards(folder, tensors, variant=""):
    folder.mkdir(exist_ok=True)
    where = {}
    for i, (name, array) in enumerate(tensors.items()):
        file = f"diffusion_pytorch_model{variant}-{i:05}-of-{len(tensors):05}.safetensors"
        save_file({name: array}, folder / file)
        where[name] = file
    index = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_tensors_of_a_file_of_shards_and_of_variants_are_read_slice_by_slice(tmp_path):
    tensors = arrays(a=(4, 6), b=(3,))
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    brain = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    write_shards(tmp_path, brain, ".bf16")
    for variant, expected in ((None, tensors), ("fp16", half), ("bf16", brain)):
        found = open_tensors(tmp_path, variant)
        assert sorted(found) == ["a", "b"] and len(found.files) == (2 if variant == "bf16" else 1)
        assert (found["a"].shape, found["a"].dtype) == ((4, 6), str(expected["a"].dtype))
        part = found["a"][1:3, 2:]
        assert part.dtype == expected["a"].dtype
        np.testing.assert_array_equal(part, expected["a"][1:3, 2:])
        np.testing.assert_array_equal(np.asarray(found["b"]), expected["b"])
    direct = open_tensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    np.testing.assert_array_equal(direct["b"], half["b"])


def test_weights_that_are_damaged_missing_or_pickled_get_words(tmp_path):
    whole = tmp_path / "model.safetensors"
    save_file(arrays(a=(4, 6)), whole)
    for size in (0, 5, 60, whole.stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=f"cut.safetensors cannot be read .*its {size} bytes are cut off or damaged"
        ):
            open_tensors(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors does not exist"):
        open_tensors(tmp_path / "none.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"has no .*fp16.safetensors, only .*model.safetensors; name one of its var"
    ):
        open_tensors(tmp_path, "fp16")
    old = tmp_path / "old"
    old.mkdir()
    (old / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights are read once, by `ddistill import`"):
        open_tensors(old)
    shards = tmp_path / "shards"
    index = write_shards(shards, arrays(a=(2,), b=(3,), c=(4,)))
    for i in (0, 2):
        (shards / f"diffusion_pytorch_model-{i:05}-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks diffusion_pytorch_model-00000-of-00003.*-00002-of-00003"):
        open_tensors(shards)
    for text, words in (
        ("{", "is damaged"),
        ('{"weight_map": {"z": "diffusion_pytorch_model-00001-of-00003.safetensors"}}', "do not have them: z"),
        ('{"weight_map": {"z": "../model.safetensors"}}', "outside its folder"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=words):
            open_tensors(shards)


def test_a_config_becomes_a_networks_and_comes_back():
    config = network_config(DIT)
    assert (config.num_layers, config.sample_size, config.norm_eps) == (12, 4, 1e-5)
    assert network_config(config_json(config)) == config
    old = {**DIT, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_vector_embeds": None}
    assert network_config(old) == config


def test_everything_wrong_in_a_config_is_told_at_once():
    bad = {**DIT, "num_layers": "12", "norm_type": "layer_norm", "flux": 1, "dropout": 0.5}
    with pytest.raises(ValueError) as error:
        network_config(bad)
    for words in (
        'num_layers = "12" should be int',
        'norm_type = "layer_norm" is not supported, only "ada_norm_zero"',
        "flux = 1 is an option that is not known",
        "dropout = 0.5 is not supported, only 0.0",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="has no _class_name"):
        network_config({"num_layers": 2})
    with pytest.raises(ValueError, match="of the class VQModel, for which there is no network"):
        network_config({"_class_name": "VQModel"})


def test_schedulers_become_processes():
    t = jnp.asarray([1.0, 500.0, 1000.0])
    process, precondition = diffusion_of(DDIM)
    np.testing.assert_allclose(
        process.alpha(t) ** 2, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, 499, 999]], 1e-5
    )
    assert precondition == EpsPrecondition(time_offset=-1.0) and process.t_max == 1000
    np.testing.assert_array_equal(precondition(process, t)[3], [0, 499, 999])  # diffusers' index
    lcm, _ = diffusion_of({"_class_name": "LCMScheduler"})
    np.testing.assert_allclose(lcm.schedule.betas, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    table = [0.1, 0.2, 0.5]
    assert diffusion_of({**DDIM, "trained_betas": table})[0] == discrete_vp(table)
    zero = {**DDIM, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert float(diffusion_of(zero)[0].alpha(1000.0)) == 0
    cosine = {**DDIM, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 10, "prediction_type": "sample"}
    assert diffusion_of(cosine)[0] == discrete_vp(list(processes.squared_cosine_betas(10)))
    assert diffusion_of(FLOW) == (flow(), VelocityPrecondition(1000.0))
    solver = {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    }
    assert diffusion_of(solver, 1.0) == (flow(), VelocityPrecondition(1.0))
    consistency = {"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 0.01}
    assert diffusion_of(consistency) == (edm(0.01), BoundaryPrecondition(0.5, 1000.0))
    assert diffusion_of({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}) == (edm(), EDMPrecondition(1.0))
    for bad, words in (
        ({"_class_name": "ScoreSdeVeScheduler"}, "is of ScoreSdeVeScheduler; supported are DDIM"),
        ({**DDIM, "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported"),
        ({**DDIM, "prediction_type": "score"}, "prediction_type = 'score' is not supported"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "only 'epsilon'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({**DDIM, "prediction_type": "v_prediction", "predict_epsilon": False}, "says both prediction_type = 'v_pred"),
    ):
        with pytest.raises(ValueError, match=words):
            diffusion_of(bad)


def test_schedulers_from_before_prediction_type_say_whether_the_network_predicts_epsilon():
    for of, expected in ((True, EpsPrecondition), (False, DataPrecondition), (None, EpsPrecondition)):
        assert diffusion_of({**DDIM, "predict_epsilon": of})[1] == expected(time_offset=-1.0)
    same = {**DDIM, "predict_epsilon": False, "prediction_type": "sample", "timestep_type": "discrete"}
    assert diffusion_of(same)[1] == DataPrecondition(time_offset=-1.0)


def test_dropout_is_set_where_a_network_has_it():
    config = SongUNetConfig(8, dropout=0.13)
    assert with_dropout(config, None) == config and with_dropout(config, 0.0) == SongUNetConfig(8, dropout=0.0)
    dit = network_config(DIT)
    assert with_dropout(dit, 0.0) == dit
    with pytest.raises(ValueError, match=r"dropout = 0\.1: DiT has none"):
        with_dropout(dit, 0.1)
    with pytest.raises(ValueError, match=r"dropout = 1\.0 must be a rate in \[0, 1\)"):
        with_dropout(config, 1.0)


def test_a_pipeline_becomes_a_teacher_bit_for_bit_on_one_device_and_on_eight(tmp_path):
    tensors = write_pipeline(tmp_path / "p")
    process, precondition = open_diffusion(tmp_path / "p")
    expected = from_nnx(made(lambda: make(DIT)), process, precondition)
    expected = expected.replace(params=params_from(tensors, expected.params))
    mesh = sharding.make_mesh(8)
    x, labels = inputs()
    for net in (load_network(tmp_path / "p"), load_network(tmp_path / "p" / "transformer", mesh=mesh)):
        assert net.apply == expected.apply and net.params.keys() == expected.params.keys()
        jax.tree.map(np.testing.assert_array_equal, net.params, expected.params)
    assert net.params["transformer_blocks.stack.attn1.to_q.kernel"].sharding.mesh == mesh
    call = jax.jit(Net.__call__)
    np.testing.assert_allclose(call(net, x, 7.0, labels), call(expected, x, 7.0, labels), rtol=1e-5, atol=1e-5)


def test_shards_of_a_parameter_are_read_from_their_part_of_the_file_alone():
    tensors = tensors_for(SMALL)
    reads = []

    class Watched:
        def __init__(self, name):
            self.name, self.shape, self.dtype = name, tensors[name].shape, "float32"

        def __getitem__(self, index):
            part = tensors[self.name][index]
            reads.append(part.size)
            return part

    process, precondition = diffusion_of(DDIM)
    lazy = {name: Watched(name) for name in tensors}
    mesh, rule = sharding.make_mesh(8), sharding.Rule(smallest=1)
    net = network_from(lazy, lambda: make(SMALL), process, precondition, mesh, rule)
    name = "transformer_blocks.stack.ff.net.2.kernel"  # [2, 64, 16] over eight devices
    assert net.params[name].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert max(reads) < max(a.size for a in tensors.values())
    back = params_from(tensors, net.params)
    jax.tree.map(np.testing.assert_array_equal, net.params, back)


def test_half_precision_files_become_float32_parameters(tmp_path):
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors_for(SMALL).items()}
    write_model(tmp_path, SMALL, tensors, "diffusion_pytorch_model.bf16.safetensors")
    net = load_network(tmp_path, *diffusion_of(DDIM), variant="bf16")
    assert {a.dtype for a in net.params.values()} == {np.dtype("float32")}
    name = "proj_out_1.bias"
    np.testing.assert_array_equal(net.params[name], tensors[name].astype(np.float32))
    assert not np.any(net.params["target.linear.kernel"]) and not np.any(net.params["guidance.linear.kernel"])


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    tensors = tensors_for(SMALL)
    tensors["proj_out_1.bias"] = np.zeros(3, np.float32)
    del tensors["proj_out_2.bias"], tensors["transformer_blocks.1.attn1.to_q.weight"]
    tensors["mid_block.weight"] = np.zeros((2, 2), np.float32)
    write_pipeline(tmp_path / "p", SMALL, DDIM, tensors)
    with pytest.raises(ValueError) as error:
        load_network(tmp_path / "p")
    for words in (
        "missing: proj_out_2.bias [12]",
        "missing: transformer_blocks.1.attn1.to_q.weight [16, 16]",
        "not expected: mid_block.weight [2, 2]",
        "another shape: proj_out_1.bias is [3], expected [32]",
    ):
        assert words in str(error.value)
    whole = tensors_for(SMALL)
    whole["proj_out_1.bias"] = whole["proj_out_1.bias"].astype(np.int32)
    write_pipeline(tmp_path / "ints", SMALL, DDIM, whole)
    with pytest.raises(ValueError, match="floating-point numbers: proj_out_1.bias is int32"):
        load_network(tmp_path / "ints")


def test_folders_that_are_no_models_get_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a pipeline's folder"):
        parts_of(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds nothing, no model of diffusers"):
        parts_of(tmp_path)
    write_model(tmp_path / "m", SMALL)
    with pytest.raises(FileNotFoundError, match="has no scheduler/, which tells the noise process"):
        load_network(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="a JSON object, but a list"):
        load_network(tmp_path / "m", *diffusion_of(DDIM))
    epsilon = {**DDIM, "rescale_betas_zero_snr": True}
    write_pipeline(tmp_path / "zero", SMALL, epsilon)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        load_network(tmp_path / "zero")
