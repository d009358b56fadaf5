"""Networks whose features metrics compare, with published weights read from a file.

    inception = load_features(InceptionConfig(), "pt_inception-2015-12-05-6726825d.pth")
    inception.apply(images)["pool"]

A file is safetensors or of torch.save; nothing is downloaded, and no code in a file runs.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from ddistill import sharding
from ddistill.digests import digest_of
from ddistill.hub.pickles import checkpoint_tensors
from ddistill.hub.tensors import open_tensors
from ddistill.hub.vision import vision_params
from ddistill.hub.weights import params_from
from ddistill.losses.distances import LPIPS
from ddistill.net import Definition, split
from ddistill.networks.inception import InceptionConfig, InceptionV3
from ddistill.networks.layers import rngs_of
from ddistill.networks.preprocess import Preprocessing, clean, dgm_eval, openai_clip
from ddistill.networks.vgg import Convolutions, ConvolutionsConfig
from ddistill.networks.vit import CLIP, DINOV2, VisionTransformer, ViTConfig

Network = InceptionConfig | ViTConfig
"""The configurations of networks with features."""

NETWORKS: Mapping[str, Network] = {InceptionConfig().name: InceptionConfig(), **CLIP, **DINOV2}
"""Published networks by name."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Features:
    """A network with its weights and the preprocessing of its images: data, so that jitted code takes it as it is.

    name: of the network. digest: of its weights in float32, the same whichever file they came from.
    Statistics compare where name, digest and the preprocessing's name agree.
    """

    params: dict[str, Array]
    definition: Definition = field(metadata={"static": True})
    preprocessing: Preprocessing = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    digest: str = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The side of the images that the network sees."""
        return self.preprocessing.size

    def apply(self, images: Array) -> dict[str, Array]:
        """Images [B, H, W, 3], uint8 or of floats in [0, 1] -> features [B, D] by name, float32.

        Inception answers "pool", "logits" and "spatial" (`InceptionV3`), CLIP and DINOv2 "embedding"
        (`VisionTransformer`). Products are of full float32 precision on every device. Under jit images may lie sharded
        along their first axis, and so do the features. Raises ValueError for other shapes and types.
        """
        with jax.default_matmul_precision("float32"):
            return self.definition(self.params, {})(self.preprocessing(images))

    def on(self, mesh: Mesh) -> "Features":
        """The same with its weights on every device of a mesh, as batches that lie on several processes need it."""
        return replace(self, params=jax.device_put(self.params, sharding.replicated(mesh)))


def load_features(
    network: Network, path: Path | str, preprocessing: Preprocessing | None = None, *, dtype: Any = jnp.float32
) -> Features:
    """A network with the weights of a published file, safetensors (a file, or a folder of one model) or torch.save's.

    network: a configuration, the published ones being in `NETWORKS`. preprocessing: by default Clean-FID's for
    Inception, CLIP's own for CLIP, FD-DINOv2's for DINOv2. dtype: what the network computes in.

    Files are, for Inception, pytorch-fid's pt_inception-2015-12-05-6726825d.pth (its releases on GitHub) or
    torch-fidelity's weights-inception-2015-12-05-6726825d.pth; for CLIP, model.safetensors of the Hugging Face models
    openai/clip-vit-base-patch32, -base-patch16, -large-patch14 and -large-patch14-336, or open_clip's files of the same
    (OpenAI's own .pt are TorchScript); for DINOv2, its authors' dinov2_vitl14_pretrain.pth,
    dinov2_vitl14_reg4_pretrain.pth and so on, or model.safetensors of facebook/dinov2-large,
    facebook/dinov2-with-registers-large and so on.

    Raises ValueError that lists all tensors that are missing, not expected or of another shape, and as `read_tensors`.
    """
    tensors = read_tensors(path)
    code, shapes = _definition(network, jnp.dtype(dtype))
    params = (vision_params if isinstance(network, ViTConfig) else params_from)(tensors, shapes)
    return _features(network, code, params, preprocessing)


def random_features(
    network: Network, preprocessing: Preprocessing | None = None, *, seed: int = 0, dtype: Any = jnp.float32
) -> Features:
    """A network with random weights that keep activations of order one: to try things without a file."""
    code, shapes = _definition(network, jnp.dtype(dtype))
    return _features(network, code, {path: _random(path, leaf, seed) for path, leaf in shapes.items()}, preprocessing)


def load_lpips(
    network: ConvolutionsConfig,
    path: Path | str,
    heads: Path | str,
    *,
    size: int | None = None,
    dtype: Any = jnp.float32,
) -> LPIPS:
    """LPIPS on VGG16 or AlexNet, with the weights of published files.

    path: torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth. heads: weights/v0.1/vgg.pth or alex.pth in the
    package lpips. size: what images are brought to. Gradients flow through the images. Raises ValueError that lists all
    tensors that are missing, not expected or of another shape, and as `read_tensors`.
    """
    shapes = _definition(network, jnp.dtype(dtype))[1]
    body = {name: t for name, t in read_tensors(path).items() if not name.startswith("classifier.")}
    last = {
        f"lin{i}.model.1.kernel": jax.ShapeDtypeStruct((1, 1, c, 1), "float32") for i, c in enumerate(network.widths)
    }
    weights = params_from(read_tensors(heads), last)
    return _lpips(network, params_from(body, shapes), [weights[name].reshape(-1) for name in last], size, dtype)


def random_lpips(network: ConvolutionsConfig, *, size: int | None = None, seed: int = 0) -> LPIPS:
    """LPIPS on a network with random weights, of heads that are not negative: to try things without files."""
    shapes = _definition(network, jnp.dtype("float32"))[1]
    draw = np.random.default_rng(seed)
    heads = [draw.uniform(0, 2 / width, width).astype(np.float32) for width in network.widths]
    return _lpips(network, {path: _random(path, leaf, seed) for path, leaf in shapes.items()}, heads, size, "float32")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)  # two of them are equal only as one object: arrays have no hash
class Maps:
    """Convolutions with their weights, a function from normalised images [B, H, W, 3] to maps [B, h, w, C]."""

    network: ConvolutionsConfig = field(metadata={"static": True})
    params: Mapping[str, Array]
    dtype: str = field(default="float32", metadata={"static": True})

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """[B, H, W, 3] -> the maps of the layers that are seen."""
        return _definition(self.network, jnp.dtype(self.dtype))[0](dict(self.params), {})(x)


def _lpips(
    network: ConvolutionsConfig, params: Mapping[str, Any], heads: Sequence[np.ndarray], size: int | None, dtype: Any
) -> LPIPS:
    arrays = {path: jnp.asarray(array) for path, array in params.items()}
    return LPIPS(Maps(network, arrays, jnp.dtype(dtype).name), tuple(map(jnp.asarray, heads)), size)


def read_tensors(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors in a file by name: safetensors, or torch.save's (.pth, .pt, .bin) with nothing in it executed.

    Counters of batches, which only training reads, are left out. Raises FileNotFoundError for a path that is not there
    and ValueError for damaged files, TorchScript archives, and files without tensors by name.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        found = {name: np.asarray(tensor) for name, tensor in open_tensors(path).items()}
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file of weights, safetensors or torch.save's")
    elif _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, a program with its weights: take the model as safetensors or as a "
            "state_dict of torch.save"
        )
    else:
        found = checkpoint_tensors(path)
    return {name: tensor for name, tensor in found.items() if not name.endswith("num_batches_tracked")}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def float32(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters by path as float32: what digests of weights are taken of, whichever type a file had."""
    return {path: np.asarray(array, np.float32) for path, array in params.items()}


@lru_cache(maxsize=16)
def _definition(network: Network | ConvolutionsConfig, dtype: np.dtype) -> tuple[Definition, dict[str, Any]]:
    """A network's code, and the shapes of its parameters."""
    make = _MODULES[type(network)]
    shapes, _, code = split(nnx.eval_shape(lambda: make(network, dtype=dtype, rngs=rngs_of(0))))
    return code, shapes


def _features(network: Network, code: Definition, params: Mapping[str, Any], given: Preprocessing | None) -> Features:
    preprocessing = _reference(network) if given is None else given
    arrays = {path: jnp.asarray(params[path]) for path in params}
    return Features(arrays, code, preprocessing, network.name, digest_of(float32(params)))


def _random(path: str, leaf: Any, seed: int) -> np.ndarray:
    """Kernels for ReLU (He et al. 2015), scales and variances about 1, everything else about 0."""
    draw = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) >= 2:
        return draw * np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
    last = path.rpartition(".")[2]
    return np.exp(0.1 * draw) if last in ("scale", "running_var") else 0.1 * draw


def _reference(network: Network) -> Preprocessing:
    if isinstance(network, InceptionConfig):
        return clean()
    return openai_clip(network.image) if network.clip else dgm_eval()


_MODULES: dict[type, Callable[..., nnx.Module]] = {
    InceptionConfig: InceptionV3, ViTConfig: VisionTransformer, ConvolutionsConfig: Convolutions
}  # fmt: skip
