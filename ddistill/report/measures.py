"""Rows of an evaluation as a table of the page: which measures there are, how they are written, which way is better."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddistill.report.page import Column, Kind, Line, Table

MEASURES = {
    column.name: column
    for column in (
        Column("fid", "FID", ".2f", -1),
        Column("accuracy", "accuracy", ".3f", 1, "share of samples that a classifier reads as asked"),
        Column("frechet", "Fréchet", ".2f", -1, "Fréchet distance to the training data"),
        Column("frechet_held_out", "to held-out", ".2f", -1, "Fréchet distance to data that was held out"),
        Column("endpoint", "endpoint", ".3f", -1, "distance to where the exact flow takes the same noise"),
        Column("sw2", "sliced W2", ".4f", -1, "sliced Wasserstein-2 distance to exact samples"),
        Column("precision", "precision", ".3f", 1),
        Column("recall", "recall", ".3f", 1),
        Column("density", "density", ".2f", 1),
        Column("coverage", "coverage", ".3f", 1),
        Column("diversity", "diversity", ".3f", 1, "mean distance within a condition, over the data's"),
        Column("spread", "spread", ".2f", 0, "width within the modes over the true one; 1 is right"),
        Column("weights", "weights", ".4f", -1, "KL divergence of the modes' weights"),
        Column("ll_gap", "ll gap", ".2f", -1, "what the mean log-density lacks"),
        Column("encoding", "encoding", ".3f", -1, "error of the noise that data is encoded to"),
        Column("round_trip", "round trip", ".3f", -1, "error of data that was encoded and decoded"),
        Column("kid", "KID", ".4f", -1),
        Column("sfid", "sFID", ".2f", -1),
        Column("inception_score", "IS", ".2f", 1, "Inception score"),
        Column("cmmd", "CMMD", ".3f", -1),
        Column("clip_score", "CLIP", ".2f", 1, "CLIP score"),
        Column("fd_dinov2", "FD-DINOv2", ".1f", -1),
        Column("lpips", "LPIPS", ".3f", 1, "mean distance between images of one condition"),
        Column("nll", "bits/pixel", ".3f", 0, "likelihood under the teacher"),
        Column("images_per_s", "images/s", ".4g", 1),
        Column("ms_per_image", "ms/image", ".3f", -1),
        Column("train_s", "training, s", ".0f", -1),
        Column("samples", "samples", ",.0f", 0, "how many were judged"),
    )
}
"""Measures that are known, by their key in a row, in the order of a table's columns."""

_NO_MEASURES = {"nfe", "steps", "seed", "count", "w", "wall_s", "compile_s", "decode_s", "floor_sw2", "not_finite"}
_SPREAD = "_std"  # kid_std is the standard deviation of kid


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns for all numbers in the rows: known measures in their order, then others under their own names."""
    there = dict.fromkeys(k for row in rows for k in _numbers(row) if not k.endswith(_SPREAD))
    known = [column for name, column in MEASURES.items() if name in there]
    return [*known, *(Column(name, name.replace("_", " "), ".4g") for name in there if name not in MEASURES)]


def table(named: Sequence[tuple[str | None, Mapping[str, Any]]], title: str = "") -> Table:
    """A table of an evaluation's rows, each with the name of its run, or None for the teacher and the data.

    Of rows without a run that are the same sampler at the same cost the first stays: runs of one teacher repeat it.
    Below it stand the seeds of the samples and what rows have to say (`notes`).
    """
    lines: list[Line] = []
    seen = set()
    for run, row in named:
        nfe = _number(row.get("nfe"))
        label = str(row.get("sampler", "?")) if run is None else run
        if run is None:
            if (label, nfe) in seen:
                continue
            seen.add((label, nfe))
        kind: Kind = "student" if run is not None else "reference" if nfe is None else "teacher"
        numbers = _numbers(row)
        spread = {k.removesuffix(_SPREAD): v for k, v in numbers.items() if k.endswith(_SPREAD)}
        values = {k: v for k, v in numbers.items() if not k.endswith(_SPREAD)}
        lines.append(Line(label, kind, None if nfe is None else int(nfe), values, spread))
    order = {"reference": 0, "teacher": 1, "student": 2}
    rows = [row for _, row in named]
    seeds = sorted({row["seed"] for row in rows if row.get("seed") is not None})
    notes = dict.fromkeys(str(note) for row in rows for note in row.get("notes") or ())
    words = [*([f"Samples of seed {', '.join(map(str, seeds))}"] if seeds else []), *notes]
    return Table(title, columns_of(rows), sorted(lines, key=lambda line: order[line.kind]), "; ".join(words))


def is_student(row: Mapping[str, Any]) -> bool:
    """Whether a row of an evaluation is of a student, and not of the teacher or the data."""
    return str(row.get("sampler", "")).startswith("student") or row.get("train_s") is not None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: n for k, v in row.items() if k not in _NO_MEASURES and (n := _number(v)) is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
