"""Data of one's own as fields of an experiment: folders of images, tar files, array files, encoded items."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddistill.config import Data
from ddistill.data.images import Crop, Pictures, cache_folder, folder_images, tar_images
from ddistill.data.latents import Encoded, encode, open_latents
from ddistill.data.loading import Items, Readable
from ddistill.data.rows import Rows, array_rows
from ddistill.digests import digest_of
from ddistill.hub.autoencoders import Autoencoder, load_autoencoder
from ddistill.hub.configs import read_json
from ddistill.networks.conditions import Prompt
from ddistill.prompts import open_prompts, time_ids
from ddistill.sharding import batch_sharding, local_mesh, replicated


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, whose folders are the classes; `data.images.folder_images` tells the fields."""

    folder: Path | str
    size: int = 64
    channels: int = 3
    crop: Crop = "centre"
    flip: bool = True
    enlarge: bool = False
    classes: bool = True
    prompts: str = "none"
    num_classes: int = 0

    def open(self) -> tuple[Pictures, int]:
        """The images, and the number of classes."""
        return folder_images(
            Path(self.folder), self.size, channels=self.channels, crop=self.crop, flip=self.flip, enlarge=self.enlarge,
            classes=self.classes, prompts=self.prompts, num_classes=self.num_classes,
        )  # fmt: skip

    def load(self) -> Data:
        """List the images."""
        images, classes = self.open()
        return _data(images, (self.size, self.size, self.channels), classes)


@dataclass(frozen=True)
class TarShards:
    """The images in one or many tar files, in WebDataset's layout; `data.images.tar_images` tells the fields."""

    shards: Path | str
    size: int = 64
    channels: int = 3
    crop: Crop = "centre"
    flip: bool = True
    enlarge: bool = False
    num_classes: int = 0

    def open(self) -> tuple[Pictures, int]:
        """The images, and the number of classes."""
        return tar_images(
            Path(self.shards), self.size, channels=self.channels, crop=self.crop, flip=self.flip, enlarge=self.enlarge,
            num_classes=self.num_classes, cache=cache_folder(),
        )  # fmt: skip

    def load(self) -> Data:
        """List the images."""
        images, classes = self.open()
        return _data(images, (self.size, self.size, self.channels), classes)


@dataclass(frozen=True)
class ArrayFile:
    """The rows of an .npy file, which is mapped and not loaded, or .npz; `data.rows.array_rows` tells the fields."""

    file: Path | str
    labels: Path | str | None = None
    flip: bool = False
    num_classes: int = 0

    def open(self) -> tuple[Rows, tuple[int, ...], int]:
        """The rows, the shape of each, and the number of classes."""
        labels = None if self.labels is None else Path(self.labels)
        return array_rows(Path(self.file), labels=labels, num_classes=self.num_classes, flip=self.flip)

    def load(self) -> Data:
        """Open the file."""
        return _data(*self.open())


@dataclass(frozen=True)
class LatentFolder:
    """What `ddistill encode` wrote: latents, drawn anew each time, with labels or encoded prompts.

    flip: take the mirror image every other time, if it was encoded. models: the folder of the autoencoder, or of its
    pipeline, for pictures of samples. verify: check every file's digest, some seconds per gigabyte.
    """

    folder: Path | str
    flip: bool = False
    models: Path | str | None = None
    verify: bool = True

    def load(self) -> Data:
        """Open the folder."""
        latents = open_latents(self.folder, flip=self.flip, verify=self.verify)
        data = _data(latents, latents.shape, latents.records.made["num_classes"], null=latents.none())
        return data if self.models is None else replace(data, to_unit=_Brightness(Path(self.models)))


@dataclass(frozen=True)
class _Brightness:
    """From latents to brightness in [0, 1], by an autoencoder that is read when it is needed."""

    models: Path

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        return np.asarray(_autoencoder(self.models).pictures(jnp.asarray(latents, jnp.float32)) + 1) / 2


@functools.lru_cache(maxsize=1)
def _autoencoder(models: Path) -> Autoencoder:
    return load_autoencoder(models)


def open_images(
    data: Path, size: int, channels: int = 3, *, classes: bool = True, prompts: str = "none"
) -> tuple[Pictures | Rows, int]:
    """What a path holds, as items in an order of their own, and the number of classes.

    data: a folder of images, a tar file or a folder of them, .npy or .npz with bytes [N, size, size, channels].
    classes, prompts: as for `folder_images`; with tar files any prompts but "none" are those in them.
    Raises as `folder_images`, `tar_images` and `array_rows`, and ValueError for arrays of another shape.
    """
    if data.suffix in (".npy", ".npz"):
        rows, shape, count = array_rows(data)
        if shape != (size, size, channels) or prompts != "none":
            raise ValueError(
                f"{data} holds rows of shape {list(shape)}: expected images {[size, size, channels]}, without prompts"
            )
        return rows, count
    if data.suffix == ".tar" or (data.is_dir() and any(data.glob("*.tar"))):
        images, count = tar_images(data, size, channels=channels, flip=False, cache=cache_folder())
        if prompts != "none" and images.prompts is None:
            raise ValueError(f"{data} holds no prompts: put NAME.txt or NAME.json beside the images in the tar files")
        return (images if prompts != "none" else replace(images, prompts=None)), count
    return folder_images(data, size, channels=channels, flip=False, classes=classes, prompts=prompts)


def encode_images(
    data: Path,
    to: Path,
    models: Path,
    size: int,
    *,
    classes: bool = True,
    prompts: str = "none",
    mirrored: bool = False,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    bfloat16: bool = False,
    variant: str | None = None,
    batch_size: int = 16,
    shard_size: int = 1024,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Encoded:
    """Encode images, and where there are any their prompts, with the models in a pipeline's folder (`latents.encode`).

    models: a folder of diffusers with vae/, and text encoders for prompts; or an autoencoder's own. data, classes,
    prompts: as for `open_images`; images are cut to the middle square. bfloat16: the models compute in it. To SDXL all
    images are said to be whole ones of their size. Raises as `open_images`, `load_autoencoder`, `open_prompts` and
    `latents.encode`.
    """
    mesh, compute = local_mesh(), jnp.bfloat16 if bfloat16 else jnp.float32
    autoencoder = load_autoencoder(models, mesh=mesh, dtype=compute, variant=variant)
    items, num_classes = open_images(data, size, autoencoder.config.in_channels, classes=classes, prompts=prompts)
    named = items.names if isinstance(items, Pictures) else [f"row {i}" for i in range(len(items))]
    labels = np.zeros(0, np.int32) if items.labels is None else np.asarray(items.labels, np.int32)
    made = {
        "size": size,
        "labels": digest_of(labels),
        "autoencoder": digest_of((autoencoder.params, autoencoder.rest)),
        "compute": jnp.dtype(compute).name,
    }
    how: dict[str, Any] = {}
    if isinstance(items, Pictures) and items.prompts is not None:
        encoder = open_prompts(models, dtype=compute, mesh=mesh, variant=variant)
        pipeline = read_json(models / "model_index.json", "the index of a pipeline's parts")["_class_name"]
        sizes = time_ids((size, size), (0, 0), (size, size)) if pipeline.startswith("StableDiffusionXL") else None

        def sized(prompt: Prompt) -> Prompt:
            return prompt if sizes is None else replace(prompt, sizes=jnp.tile(sizes, (len(prompt.states), 1)))

        def texts(batch: Sequence[str]) -> Prompt:
            tokens = encoder.tokenize(batch)
            shared = batch_sharding(mesh) if len(batch) % mesh.size == 0 else replicated(mesh)
            return sized(encoder.encode(encoder.params, jax.device_put(tokens, shared)))

        made["texts"] = digest_of(encoder.params)
        how = {"prompts": items.prompts, "texts": texts, "none": sized(encoder.null())}
    return encode(
        to, items, autoencoder.moments, names=named, made=made, num_classes=num_classes, mirrored=mirrored, dtype=dtype,
        batch_size=batch_size, shard_size=shard_size, report=report, **how,
    )  # fmt: skip


def _data(items: Items, shape: tuple[int, ...], num_classes: int, **more) -> Data:
    readable = Readable(items)
    readable[0]  # where nothing can be read this is told now, and not after the first compilation
    return Data({}, tuple(shape), num_classes, items=readable, **more)
