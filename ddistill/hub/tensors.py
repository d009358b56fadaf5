"""The tensors of safetensors files, by name, read slice by slice: a model of any size is never whole in memory."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the file of a model's weights."""

_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?"
    r"\.(safetensors|bin)(?:\.index(?:\.(\w+))?\.json)?"
)

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `tensor[slices]` reads these slices alone; numpy.asarray(tensor) all of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    _slices: Any

    def __getitem__(self, index) -> np.ndarray:
        """The slices of index (slices of step 1, or ...) as an array in the file's dtype."""
        return self._slices[index]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self[...]
        return array if dtype is None else array.astype(dtype)


class StoredTensors(Mapping[str, StoredTensor]):
    """The tensors of some safetensors files by name, in the files' order. Make one with `open_tensors`."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        return list(dict.fromkeys(tensor.file for tensor in self._tensors.values()))


def open_tensors(path: Path | str, variant: str | None = None) -> StoredTensors:
    """Open a safetensors file, or the weights in a model's folder: one file, or shards with their index.

    variant: "fp16" for <stem>.fp16.safetensors; by default the file without one. bfloat16 is ml_dtypes'. Reads nothing
    but headers. Raises FileNotFoundError for a folder without such weights, saying what it has, and for missing shards;
    ValueError for files that are cut off or damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_file(path, variant)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a safetensors file or a model's folder")
    if path.suffix != ".json":
        return StoredTensors(_in_file(path))
    home = _index(path)
    missing = sorted({file for file in home.values() if not (path.parent / file).is_file()})
    if missing:
        raise FileNotFoundError(
            f"{path.parent} lacks {', '.join(missing)}, which {path.name} names: copy all its files"
        )
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(home.values())):
        found |= _in_file(path.parent / file)
    absent = [name for name in home if name not in found or found[name].file.name != home[name]]
    if absent:
        raise ValueError(
            f"{path} places tensors in files that do not have them: {', '.join(absent[:8])}"
            f"{f' and {len(absent) - 8} more' * (len(absent) > 8)}. The folder mixes two models, or is damaged"
        )
    return StoredTensors({name: found[name] for name in home})


def weights_among(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the names of a folder's files those of its weights: of the variant, or else without one; pickles last."""
    return _among(names, variant)[1]


def variant_among(names: Iterable[str], variant: str | None = None) -> str | None:
    """The variant of the weights that `weights_among` gives: the one asked for, or None."""
    return _among(names, variant)[0]


def _among(names: Iterable[str], variant: str | None) -> tuple[str | None, list[str]]:
    found: dict[tuple[str, str | None], list[str]] = {}
    for name in names:
        if match := _FILE.fullmatch(name):
            before, after, kind, of_index = match.groups()
            found.setdefault((kind, before or after or of_index), []).append(name)
    wanted = [(kind, of) for kind in ("safetensors", "bin") for of in (variant, None)]
    return next(((key[1], found[key]) for key in wanted if key in found), (None, []))


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """The file of weights in a model's folder, or the index of its shards."""
    middle = "" if variant is None else f".{variant}"
    for stem in STEMS:
        names = [f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"]
        for name in (*names, f"{stem}{middle}.safetensors.index.json"):
            if (folder / name).is_file():
                return folder / name
    there = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".json", ".bin", ".ckpt", ".pt"))
    how = ""
    if any(name.startswith(STEMS) and ".safetensors" in name for name in there):
        how = "; name one of its variants (fp16, bf16) where there is one"
    elif any(name.endswith((".bin", ".ckpt", ".pt")) for name in there):
        how = "; pickled weights are read once, by `ddistill import`, which writes safetensors"
    named = f"{STEMS[0]}{middle}.safetensors"
    raise FileNotFoundError(f"{folder} has no {named}, only {', '.join(there) or 'no weights'}{how}")


def _index(path: Path) -> dict[str, str]:
    try:
        home = dict(json.loads(path.read_text("utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: it is no index of shards, with a weight_map from tensors to files"
        ) from error
    strange = [str(file) for file in home.values() if not isinstance(file, str) or Path(file).name != file]
    if strange:
        raise ValueError(f"{path} names files outside its folder: {', '.join(strange[:3])}")
    return home


def _in_file(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, "numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} cannot be read ({error}): its {size} bytes are cut off or damaged, copy it again"
        ) from error
    return {
        name: StoredTensor(path, name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()), part)
        for name, part in slices.items()
    }
