"""A folder of encoded items: images as an encoder sees them, and their prompts as text encoders do."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddistill.data.loading import Items, Unreadable, read_ahead
from ddistill.data.pairs import at_least_one
from ddistill.data.records import Kind, Records, open_records, put_single, write_records
from ddistill.networks.conditions import Prompt
from ddistill.sharding import batch_sharding, local_mesh

KIND = Kind("ddistill encoded items, format 1", "encoded items", "items", "ddistill encode", gaps=True)

Encoder = Callable[[jax.Array], Mapping[str, Any]]
"""x [B, ...] in [-1, 1] -> arrays [B, ...]: mean and std of a latent that is drawn anew each time, or x itself."""

TextEncoder = Callable[[Sequence[str]], Prompt]
"""B texts -> their conditions."""

_NONE = "none"
_PROMPT = tuple(field.name for field in dataclasses.fields(Prompt))


class Encoded(NamedTuple):
    """What a call of `encode` did: the shards it had to make; how many items have a record; the names of the others."""

    shards: int
    records: int
    skipped: list[str]


def encode(
    folder: Path | str,
    items: Items,
    encoder: Encoder,
    *,
    names: Sequence[str],
    made: Mapping[str, Any],
    num_classes: int = 0,
    prompts: Sequence[str] | None = None,
    texts: TextEncoder | None = None,
    none: Prompt | None = None,
    mirrored: bool = False,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 64,
    shard_size: int = 1024,
    report: Callable[[int, int], None] = lambda done, of: None,
    part: tuple[int, int] | None = None,
) -> Encoded:
    """Encode all items, in order, into a folder; a call that was cut off goes on from its last whole shard.

    items: finished with the random numbers of their index alone (they should draw none). names: of the items, for the
    report. made: JSON that tells apart what must not be mixed, such as fingerprints of the encoders. num_classes: of
    the labels that items have. prompts, texts: what conditions are made of, in place of labels. none: the condition, of
    a batch of one, that means none, by default the empty text's. mirrored: encode the mirror image too, as every
    field's second. dtype: of all floats. part: as for `write_records`. Items that cannot be read have no record.
    Raises ValueError for NaN or values beyond the dtype, for fields that two encoders give, for prompts without `texts`
    or the other way round, where the folder holds something else, and where no item can be read.
    """
    folder = Path(folder)
    at_least_one(count=len(items), batch_size=batch_size, shard_size=shard_size)
    if (prompts is None) != (texts is None):
        lack = "a text encoder" if texts is None else "prompts"
        raise ValueError(f"{lack} is what is missing: conditions need prompts and a text encoder")
    mesh = local_mesh()
    size = -(-min(batch_size, shard_size, len(items)) // mesh.size) * mesh.size

    def images(x: np.ndarray) -> dict[str, np.ndarray]:
        return {k: np.asarray(v) for k, v in encoder(jax.device_put(x, batch_sharding(mesh))).items()}

    def batch(rows: list[tuple[int, dict[str, Any]]]) -> dict[str, np.ndarray]:
        kept = len(rows)
        rows = rows + rows[-1:] * (size - kept)  # filled up and cut, so that one compilation serves all
        numbers = [i for i, _ in rows]
        x = np.stack([row["x"] for _, row in rows])
        out = images(x)
        if mirrored:
            other = images(x[:, :, ::-1])
            out = {k: np.stack([a, other[k]], axis=1) for k, a in out.items()}
        if prompts is not None and texts is not None:
            out = _merged(out, _fields(texts([prompts[i] for i in numbers])))
        elif "cond" in rows[0][1]:
            out = _merged(out, {"label": np.stack([row["cond"] for _, row in rows])})
        stored = _stored(_merged({"index": np.asarray(numbers, np.int64)}, out), dtype, [names[i] for i in numbers])
        return {k: a[:kept] for k, a in stored.items()}

    def make(first: int, count: int) -> dict[str, np.ndarray]:
        rows = list[tuple[int, dict[str, Any]]]()
        parts: list[dict[str, np.ndarray]] = []
        for row in _finished(items, first, count, 2 * size):
            rows.append(row)
            if len(rows) == size:
                parts.append(batch(rows))
                rows = []
        parts += [batch(rows)] if rows else []
        if not parts:
            return {"index": np.zeros(0, np.int64)}
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    digest = hashlib.sha256("\n".join([*names, *(prompts or ())]).encode()).hexdigest()
    of = {
        "items": f"sha256:{digest}",
        "dtype": dtype,
        "mirrored": mirrored,
        "prompts": prompts is not None,
        "num_classes": num_classes if prompts is None else 0,
        **made,
    }
    shards = write_records(folder, KIND, of, len(items), shard_size, make, report=report, part=part)
    if texts is not None and (part or (jax.process_index(), 0))[0] == 0:
        put_single(folder, _NONE, _stored(_fields(texts([""]) if none is None else none), dtype, ["the empty text"]))
    if part is not None:
        return Encoded(shards, len(items), [])
    records = open_records(folder, KIND, verify=False)
    return Encoded(shards, len(records), [names[i] for i in records.missing()])


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded items, as a batch has them: x, drawn anew each time where mean and std are stored; cond as stored.

    cond is the label, int32 [], or a `Prompt`, float32. flip: take the mirror image every other time, at random.
    Raises ValueError for flip where no mirror images were encoded.
    """

    records: Records
    flip: bool = False

    def __post_init__(self):
        if self.flip and not self.records.made["mirrored"]:
            raise ValueError(f"{self.records.folder} holds no mirror images: encode them too, or set flip to False")

    def __len__(self) -> int:
        """The number of records."""
        return len(self.records)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of x."""
        record = self[0]
        return record["x" if "x" in record else "mean"].shape[int(self.records.made["mirrored"]) :]

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Record i, floats in the dtype they are stored in."""
        return {name: array[0] for name, array in self.records.rows(np.asarray([i])).items()}

    def finish(self, item: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
        """The row of a record, float32."""
        side = int(self.flip and rng.random() < 0.5)
        pick = slice(None) if not self.records.made["mirrored"] else side
        images = {k: item[k][pick].astype(np.float32) for k in ("x", "mean", "std") if k in item}
        x = images.get("x")
        if x is None:
            mean = images["mean"]
            x = mean + images["std"] * rng.standard_normal(mean.shape, np.float32)
        row: dict[str, Any] = {"x": x}
        if "states" in item:
            row["cond"] = _prompt(item)
        elif "label" in item:
            row["cond"] = np.asarray(item["label"], np.int32)
        return row

    def none(self) -> Prompt | None:
        """The condition that means none, without a leading axis; None where there are no prompts."""
        single = self.records.single(_NONE)
        return None if single is None else _prompt(single)


def open_latents(folder: Path | str, *, flip: bool = False, verify: bool = True) -> Latents:
    """Open a folder that `encode` wrote; verify and what it raises: as for `open_records`."""
    latents = Latents(open_records(Path(folder), KIND, verify), flip)
    if latents.records.made["prompts"] and latents.none() is None:
        raise ValueError(f"{folder} lacks the condition that means none: repeat the command that made it")
    return latents


def _finished(items: Items, first: int, count: int, ahead: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbers and rows of the items that can be read, read ahead by several threads."""

    def read(i: int) -> tuple[int, dict[str, Any] | None]:
        try:
            return i, items.finish(items[i], np.random.default_rng(i))
        except Unreadable:
            return i, None

    with read_ahead(read, first, first + count, ahead) as rows:
        for i, row in rows:
            if row is not None:
                yield i, row


def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    both = a.keys() & b.keys()
    if both:
        raise ValueError(f"fields {sorted(both)} are given twice: {sorted(a)} and {sorted(b)}")
    return {**a, **b}


def _stored(arrays: Mapping[str, Any], dtype: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays [B, ...] as they are kept: floats in dtype, all finite."""
    out = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        if jnp.issubdtype(array.dtype, jnp.floating):
            with np.errstate(over="ignore"):
                array = array.astype(jnp.dtype(dtype))
            bad = ~np.isfinite(array.astype(np.float32)).reshape(len(array), -1).all(axis=1)
            if bad.any():
                raise ValueError(
                    f"{name} of {names[int(np.argmax(bad))]} is NaN or too large for {dtype}: take bfloat16, or look "
                    "at the encoder"
                )
        out[name] = array
    return out


def _fields(prompt: Prompt) -> dict[str, Any]:
    return {k: v for k in _PROMPT if (v := getattr(prompt, k)) is not None}


def _prompt(fields: Mapping[str, np.ndarray]) -> Prompt:
    return Prompt(**{k: fields[k].astype(np.float32) for k in _PROMPT if k in fields})  # type: ignore[arg-type]
