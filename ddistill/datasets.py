"""Data of one's own as fields of an experiment: folders of images, tar files, array files, encoded items."""

from dataclasses import dataclass
from pathlib import Path

from ddistill.config import Data
from ddistill.data.images import Crop, Pictures, cache_folder, folder_images, tar_images
from ddistill.data.latents import open_latents
from ddistill.data.loading import Items, Readable
from ddistill.data.rows import Rows, array_rows


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, whose folders are the classes; `data.images.folder_images` tells the fields."""

    folder: Path
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
            self.folder, self.size, channels=self.channels, crop=self.crop, flip=self.flip, enlarge=self.enlarge,
            classes=self.classes, prompts=self.prompts, num_classes=self.num_classes,
        )  # fmt: skip

    def load(self) -> Data:
        """List the images."""
        images, classes = self.open()
        return _data(images, (self.size, self.size, self.channels), classes)


@dataclass(frozen=True)
class TarShards:
    """The images in one or many tar files, in WebDataset's layout; `data.images.tar_images` tells the fields."""

    shards: Path
    size: int = 64
    channels: int = 3
    crop: Crop = "centre"
    flip: bool = True
    enlarge: bool = False
    num_classes: int = 0

    def open(self) -> tuple[Pictures, int]:
        """The images, and the number of classes."""
        return tar_images(
            self.shards, self.size, channels=self.channels, crop=self.crop, flip=self.flip, enlarge=self.enlarge,
            num_classes=self.num_classes, cache=cache_folder(),
        )  # fmt: skip

    def load(self) -> Data:
        """List the images."""
        images, classes = self.open()
        return _data(images, (self.size, self.size, self.channels), classes)


@dataclass(frozen=True)
class ArrayFile:
    """The rows of an .npy file, which is mapped and not loaded, or .npz; `data.rows.array_rows` tells the fields."""

    file: Path
    labels: Path | None = None
    flip: bool = False
    num_classes: int = 0

    def open(self) -> tuple[Rows, tuple[int, ...], int]:
        """The rows, the shape of each, and the number of classes."""
        return array_rows(self.file, labels=self.labels, num_classes=self.num_classes, flip=self.flip)

    def load(self) -> Data:
        """Open the file."""
        return _data(*self.open())


@dataclass(frozen=True)
class LatentFolder:
    """What `ddistill encode` wrote: latents, drawn anew each time, with labels or encoded prompts.

    flip: take the mirror image every other time, if it was encoded. verify: check every file's digest, some seconds per
    gigabyte.
    """

    folder: Path
    flip: bool = False
    verify: bool = True

    def load(self) -> Data:
        """Open the folder."""
        latents = open_latents(self.folder, flip=self.flip, verify=self.verify)
        return _data(latents, latents.shape, latents.records.made["num_classes"], null=latents.empty())


def _data(items: Items, shape: tuple[int, ...], num_classes: int, **more) -> Data:
    readable = Readable(items)
    readable[0]  # where nothing can be read this is told now, and not after the first compilation
    return Data({}, tuple(shape), num_classes, items=readable, **more)
