"""Images in folders and tar files as items: uint8 pixels as float32 [size, size, channels] in [-1, 1].

Images of other sizes are cut to a square and resized as for the models of ADM, with antialiasing: the middle square,
or a random one of at least 4/5 of it. EXIF's orientation is applied, transparency laid on white, 16 bits reduced to 8.
"""

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ddistill.data.loading import Unreadable

Crop = Literal["centre", "random"]

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
"""Names that end so are images, in upper case too."""

PROMPT_KEYS = ("prompt", "text", "caption")
"""What JSON may call a prompt."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images as items: x float32 [size, size, channels] in [-1, 1], and cond, the label, where there are labels.

    names: what to call them. read: the bytes of the image of a number. channels: 3 for RGB, 1 for grey. crop: "centre"
    or "random". flip: mirror every other image, at random. labels: [N] from 0 on. prompts: N texts, which take no part
    in batches (`ddistill encode` makes conditions of them). An image whose smaller side is below size is unreadable,
    unless `enlarge`.
    Raises ValueError for a size below 1, other channels, and labels or prompts of another number than the images.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    size: int
    channels: int = 3
    crop: Crop = "centre"
    flip: bool = True
    enlarge: bool = False
    labels: np.ndarray | None = None
    prompts: Sequence[str] | None = None

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}; images must have at least 1 pixel each way")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; 3 (RGB) and 1 (grey) are known")
        if self.crop not in ("centre", "random"):
            raise ValueError(f"crop is {self.crop!r}; 'centre' and 'random' are known")
        for what, given in (("labels", self.labels), ("prompts", self.prompts)):
            if given is not None and len(given) != len(self.names):
                raise ValueError(f"{len(given)} {what} were given for {len(self.names)} images")

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | None]:
        """Image i, whole, and its label. Raises Unreadable for one that is damaged or too small."""
        try:
            image = decode(self.read(i), self.channels)
        except Exception as error:  # a decoder that meets damaged bytes raises nearly anything
            raise Unreadable(f"{self.names[i]}: {error or type(error).__name__}") from error
        if min(image.size) < self.size and not self.enlarge:
            width, height = image.size
            raise Unreadable(f"{self.names[i]}: {width} x {height} pixels are too few for {self.size}")
        return image, None if self.labels is None else int(self.labels[i])

    def finish(self, item: tuple[Image.Image, int | None], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The row of an image: cut, resized and perhaps mirrored."""
        image, label = item
        square = centre_crop(image, self.size) if self.crop == "centre" else random_crop(image, self.size, rng)
        pixels = np.asarray(square, np.uint8).reshape(self.size, self.size, self.channels)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        row = {"x": from_bytes(pixels)}
        return row if label is None else {**row, "cond": np.asarray(label, np.int32)}


def from_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels 0 to 255 as float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def decode(content: bytes, channels: int) -> Image.Image:
    """An image file's pixels, upright, as 8-bit RGB (channels = 3) or grey (1). Raises what Pillow raises."""
    with Image.open(io.BytesIO(content)) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("grey values beyond 16 bits have no known scale")
        image = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("grey values of floating point have no known scale")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("RGB" if channels == 3 else "L")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, resized to size: ADM's `center_crop_arr` (Dhariwal & Nichol 2021)."""
    image = _smaller_side(image, size)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random square of 4/5 of the smaller side or more, resized to size: ADM's `random_crop_arr`."""
    image = _smaller_side(image, int(rng.integers(size, math.ceil(size / 0.8), endpoint=True)))
    left, top = (int(rng.integers(side - size, endpoint=True)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _smaller_side(image: Image.Image, side: int) -> Image.Image:
    """The image resized until its smaller side is `side`: halved as often as that can be, the rest bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def folder_images(
    folder: Path, size: int, *, classes: bool = True, prompts: str = "none", num_classes: int = 0, **options: Any
) -> tuple[Pictures, int]:
    """The images below a folder, in the order of their names, and their number of classes.

    classes: the folders directly in it are the classes, in the order of their names; images beside these folders must
    not be, and a folder of images alone has no classes. prompts: "none"; "beside", NAME.txt beside NAME.jpg; or a file,
    inside the folder or anywhere: .txt with one line for each image in order, or .jsonl with file_name and prompt (or
    text, caption) and perhaps label, a number. num_classes: more than the largest label where labels come from there.
    options: of `Pictures`.
    Raises FileNotFoundError for no folder, ValueError for no images and for labels or prompts that do not fit them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}: give one of images"
        )
    names = _images_below(folder)
    if not names:
        raise ValueError(f"{folder} holds no images (names that end in {', '.join(sorted(ENDINGS))})")
    labels: np.ndarray | None = None
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    if classes and any(tops):
        if not all(tops):
            raise ValueError(
                f"{folder} holds images beside folders of images, {names[tops.index('')]} among them: move them into "
                "classes, or set classes to False"
            )
        kinds = sorted(set(tops))
        number = {kind: i for i, kind in enumerate(kinds)}
        labels, num_classes = np.array([number[top] for top in tops], np.int32), len(kinds)
    texts: list[str] | None = None
    if prompts == "beside":
        texts = _texts_beside(folder, names)
    elif prompts != "none":
        texts, told = _texts_of(folder, prompts, names)
        if told is not None:
            labels, num_classes = _checked(told, num_classes if labels is None else 0, prompts)

    def read(i: int) -> bytes:
        return (folder / names[i]).read_bytes()

    return Pictures(names, read, size, labels=labels, prompts=texts, **options), 0 if labels is None else num_classes


def tar_images(
    shards: Path, size: int, *, cache: Path | None = None, num_classes: int = 0, **options: Any
) -> tuple[Pictures, int]:
    """The images in tar files in WebDataset's layout, read at random, and their number of classes.

    shards: a tar file, or a folder of files NAME.tar. Files of one name up to its first dot belong together: an image,
    and perhaps .cls (a label), .txt (a prompt), .json (with label, and prompt, text or caption). cache: a folder in
    which each file's table is kept until the file changes. num_classes: one more than the largest label by default.
    Raises FileNotFoundError for no tar files, ValueError for compressed ones, for others that are none, for no images,
    and where some images have a label or a prompt and others have none.
    """
    files = [shards] if shards.is_file() else sorted(shards.glob("*.tar"))
    if not files:
        what = "holds no files that end in .tar" if shards.is_dir() else "does not exist"
        raise FileNotFoundError(f"{shards} {what}: give a tar file or a folder of them")
    names: list[str] = []
    where: list[tuple[int, int, int]] = []
    labels: list[int | None] = []
    texts: list[str | None] = []
    for number, file in enumerate(files):
        for key, (offset, length, label, text) in tar_index(file, cache).items():
            names.append(f"{file.name}/{key}")
            where.append((number, offset, length))
            labels.append(label)
            texts.append(text)
    if not names:
        raise ValueError(f"{shards} holds no images (names that end in {', '.join(sorted(ENDINGS))})")
    told = _all_or_none(labels, names, "a label")
    prompts = _all_or_none(texts, names, "a prompt")
    numbers, classes = (None, 0) if told is None else _checked(told, num_classes, str(shards))
    places = np.asarray(where, np.int64)

    def read(i: int) -> bytes:
        number, offset, length = (int(n) for n in places[i])
        # Opened for each image: a descriptor for each of thousands of shards would be too many.
        descriptor = os.open(files[number], os.O_RDONLY)
        try:
            content = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        if len(content) < length:
            raise ValueError(f"{files[number]} ends within it")
        return content

    return Pictures(names, read, size, labels=numbers, prompts=prompts, **options), classes


def tar_index(file: Path, cache: Path | None = None) -> dict[str, tuple[int, int, int | None, str | None]]:
    """The images of a tar file by name: where their bytes begin, how many they are, their label and their prompt.

    cache: as for `tar_images`. Raises ValueError for a file that is compressed or no tar file, and for damaged labels.
    """
    state = file.stat()
    name = str(file.resolve())
    stamp = [name, state.st_size, state.st_mtime_ns]
    kept = None if cache is None else cache / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    if kept is not None and kept.is_file():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["of"] == stamp:
                return {str(key): (at, n, label, text) for key, (at, n, label, text) in found["images"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # made anew
    images = _scan(file)
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f".{kept.name}.{os.getpid()}.part")
            part.write_text(json.dumps({"of": stamp, "images": images}), encoding="utf-8")
            part.replace(kept)
        except OSError:  # a cache that cannot be written is no reason to fail
            pass
    return images


def cache_folder() -> Path:
    """Where tables of tar files are kept: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddistill" / "tars"


def _scan(file: Path) -> dict[str, tuple[int, int, int | None, str | None]]:
    with file.open("rb") as raw:
        start = raw.read(6)
        packing = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
        if packing is not None:
            raise ValueError(
                f"{file} is compressed ({packing}), and only plain tar files can be read at random: unpack it once, "
                "with gunzip or the like (images are compressed already)"
            )
        raw.seek(0)
        samples: dict[str, dict[str, tuple[str, Any]]] = {}
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, ending = base.partition(".")
                    if not member.isreg() or member.issparse() or not stem or not dot:
                        continue
                    suffix = f".{ending.rpartition('.')[2].lower()}"
                    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if suffix in ENDINGS:
                        if "image" in sample:
                            raise ValueError(f"{file}: {member.name} is a second image of {stem}")
                        sample["image"] = member.name, (member.offset_data, member.size)
                    elif suffix in (".cls", ".txt", ".json"):
                        sample[suffix] = member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no tar file, or a damaged one: {error}") from error
    found = {}
    for sample in samples.values():
        if "image" in sample:
            name, place = sample["image"]
            found[name] = (place[0], place[1], *_told(file, sample))
    return found


def _told(file: Path, sample: Mapping[str, tuple[str, Any]]) -> tuple[int | None, str | None]:
    """The label and the prompt of a sample of a tar file."""
    label = text = None
    name = ""
    try:
        if ".json" in sample:
            name, content = sample[".json"]
            label, text = _entry(json.loads(content))
        if ".cls" in sample:
            name, content = sample[".cls"]
            label = int(content)
        if ".txt" in sample:
            name, content = sample[".txt"]
            text = content.decode("utf-8").strip()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {name} holds no label or prompt: {error}") from error
    return label, text


def _entry(row: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """The label and the prompt in a JSON object."""
    label = row.get("label")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
        raise TypeError(f"label {label!r} is no whole number")
    text = next((row[key] for key in PROMPT_KEYS if key in row), None)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"prompt {text!r} is no text")
    return label, text


def _images_below(folder: Path) -> list[str]:
    names = []
    for root, _, files in os.walk(folder, followlinks=True):
        below = Path(root).relative_to(folder)
        names += [(below / f).as_posix() for f in files if Path(f).suffix.lower() in ENDINGS and not f.startswith(".")]
    return sorted(names)


def _texts_beside(folder: Path, names: Sequence[str]) -> list[str]:
    texts = []
    for name in names:
        path = (folder / name).with_suffix(".txt")
        if not path.is_file():
            raise ValueError(f"{folder / name} has no prompt beside it, {path.name}")
        texts.append(path.read_text(encoding="utf-8").strip())
    return texts


def _texts_of(folder: Path, file: str, names: Sequence[str]) -> tuple[list[str] | None, list[int] | None]:
    """The prompts and labels that a file gives to the images of a folder."""
    path = folder / file if (folder / file).is_file() else Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file {file}, in {folder} or elsewhere")
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".jsonl":
        if len(lines) != len(names):
            raise ValueError(f"{path} has {len(lines)} lines for {len(names)} images; one for each is needed, in order")
        return [line.strip() for line in lines], None
    rows: dict[str, tuple[int | None, str | None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[str(row["file_name"])] = _entry(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}, line {number}: expected {{"file_name": …, "prompt": …}}; {error}') from error
    missing, extra = [n for n in names if n not in rows], sorted(rows.keys() - set(names))
    if missing or extra:
        parts = [f"{len(missing)} images are not in it, {missing[0]} among them"] if missing else []
        parts += [f"{len(extra)} of its files are no images of {folder}, {extra[0]} among them"] if extra else []
        raise ValueError(f"{path} does not fit: {'; '.join(parts)}")
    labels = _all_or_none([rows[name][0] for name in names], names, "a label")
    return _all_or_none([rows[name][1] for name in names], names, "a prompt"), labels


def _all_or_none(values: list, names: Sequence[str], what: str) -> list | None:
    """The values, or None if all of them are None. Raises ValueError where only some are."""
    without = [i for i, value in enumerate(values) if value is None]
    if 0 < len(without) < len(values):
        raise ValueError(f"{len(without)} of {len(values)} images have not {what}, {names[without[0]]} among them")
    return None if without else values


def _checked(labels: list[int], num_classes: int, where: str) -> tuple[np.ndarray, int]:
    """Labels [N] and the number of classes, by default one more than the largest."""
    array = np.asarray(labels, np.int64)
    count = num_classes or int(array.max()) + 1
    if array.min() < 0 or array.max() >= count:
        raise ValueError(
            f"labels in {where} run from {array.min()} to {array.max()}; expected 0 to {max(count, 1) - 1}"
        )
    return array.astype(np.int32), count
