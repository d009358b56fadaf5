"""Folders of tiny models in diffusers' format, written without diffusers, for the tests of the hub."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parity import weights
from safetensors.numpy import save_file

from ddistill.hub.configs import kind_of, network_config
from ddistill.hub.weights import OURS, tensors_of
from ddistill.net import split
from ddistill.networks.layers import rngs_of

DIT = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 12,
    "sample_size": 4,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "norm_num_groups": 32,
}
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def make(config, **options):
    """The module of a config.json."""
    return kind_of(config).network(network_config(config), rngs=rngs_of(0), **options)


def tensors_for(config):
    """Weights by PyTorch's names for a config.json."""
    params = split(nnx.eval_shape(lambda: make(config)))[0]
    return weights(
        {t.name: t.shape for p, a in params.items() if not p.startswith(OURS) for t in tensors_of(p, a.shape)}
    )


def write_model(folder, config=DIT, tensors=None, name="diffusion_pytorch_model.safetensors"):
    """A model's folder; answers its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tensors_for(config) if tensors is None else tensors
    save_file(tensors, folder / name)
    return tensors


def write_pipeline(folder, config=DIT, scheduler=DDIM, tensors=None, part="transformer"):
    """A pipeline's folder with its scheduler; answers the model's tensors."""
    tensors = write_model(folder / part, config, tensors)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    names = {"_class_name": "DiTPipeline", part: ["diffusers", config["_class_name"]]}
    names["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(names))
    return tensors


def inputs(channels=3, side=4, batch=2, seed=0):
    """x [B, side, side, channels] and labels [B]."""
    x = np.random.default_rng(seed).standard_normal((batch, side, side, channels)).astype(np.float32)
    return jnp.asarray(x), jnp.arange(batch)


def assert_trees_equal(a, b):
    """Bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
