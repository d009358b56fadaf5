"""Every class of diffusers that there is a network for: its config.json and tensors fit, as diffusers writes them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_folders import DDIM, FLOW, assert_trees_equal, make, tensors_for, write_pipeline
from parity import made

from ddistill.hub.configs import KINDS, config_json, diffusion_of, kind_of, network_config
from ddistill.hub.load import load_network, open_weights, plan
from ddistill.hub.save import save_pipeline
from ddistill.hub.weights import params_from
from ddistill.net import from_nnx

TINY = {
    "UNet2DModel": {
        "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 3,
    },
    "UNet2DConditionModel": {
        "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 6, "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 28,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 12,
        "sample_size": 4, "num_embeds_ada_norm": 5,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 6,
    },
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 6,
        "sample_size": 4,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 6, "caption_projection_dim": 16, "pooled_projection_dim": 5,
        "pos_embed_max_size": 6, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 6, "pooled_projection_dim": 5, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True,
    },
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", KINDS)
def test_what_diffusers_writes_is_taken_whole(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**TINY[name])
    config = json.loads(model.to_json_string())
    tensors = {n: np.empty(t.shape, np.float16) for n, t in model.state_dict().items()}
    abstract = from_nnx(nnx.eval_shape(lambda: make(config)), *diffusion_of(FLOW if "Flux" in name else DDIM))
    read, kept = plan(tensors, abstract)
    assert all(path.startswith(("target.", "guidance.")) for path in kept if path in abstract.params)
    assert {part.name for parts in read.values() for part in parts} == set(tensors)
    assert network_config(config_json(network_config(config))) == network_config(config)
    assert kind_of(config).folder == ("unet" if "UNet" in name else "transformer")


def test_buffers_that_a_model_keeps_are_written_and_read(tmp_path):
    config = {"_class_name": "SD3Transformer2DModel", **TINY["SD3Transformer2DModel"]}
    net = from_nnx(made(lambda: make(config)), *diffusion_of(FLOW))
    table = np.random.default_rng(0).standard_normal(net.rest["pos_embed.pos_embed"].shape).astype(np.float32)
    net = net.replace(rest={"pos_embed.pos_embed": jnp.asarray(table)})
    save_pipeline(tmp_path / "p", net)
    np.testing.assert_array_equal(open_weights(tmp_path / "p")["pos_embed.pos_embed"], table)
    assert_trees_equal(load_network(tmp_path / "p"), net)


def test_attention_of_old_checkpoints_is_read_by_todays_names(tmp_path):
    config = {"_class_name": "UNet2DModel", **TINY["UNet2DModel"]}
    tensors = tensors_for(config)
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in tensors.items():
        for today, once in new.items():
            name = name.replace(today, once) if ".attentions." in name else name
        old[name] = tensor
    assert sum(".proj_attn." in name for name in old) > 2
    write_pipeline(tmp_path / "p", config, DDIM, old, part="unet")
    back = load_network(tmp_path / "p")
    assert_trees_equal(back.params, params_from(tensors, back.params))
