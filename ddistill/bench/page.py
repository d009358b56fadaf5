"""Rows of the benchmark as a page: a table for each mixture, means over seeds with their spread."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddistill.bench.exact import Row

COLUMNS = {
    "endpoint": ".3f", "sw2": ".4f", "precision": ".3f", "recall": ".2f", "spread": ".2f", "weights": ".4f",
    "ll_gap": ".2f",
}  # fmt: skip
_INVERSION = {"encoding": ".3f", "round_trip": ".3f"}
_GUIDED = {"endpoint": ".3f", "sw2": ".4f", "recall": ".2f"}


def markdown(rows: Sequence[Row], command: str) -> str:
    """The rows as Markdown: mean ± standard deviation over seeds, where there are several."""
    lines = [
        "# Exact teachers",
        "",
        f"Made by `{command}`. The teacher's answers are known in closed form: students are compared with the truth. "
        "endpoint: root-mean-square distance to where the exact flow takes the same noise, over the data's "
        "root-mean-square; sw2: sliced Wasserstein-2 distance to exact samples, over the same; precision: share of "
        "samples in the region of 99 % of the data, over .99; recall: share of modes that hold a fifth of their weight "
        "or more; spread: width within modes over the true width; weights: Kullback-Leibler divergence of the modes' "
        "weights; ll gap: what the mean log-density lacks. A method has its defaults, the same for all mixtures.",
    ]
    for mixture in dict.fromkeys(row["mixture"] for row in rows):
        here = [row for row in rows if row["mixture"] == mixture]
        plain = [r for r in here if r["w"] is None and r.get("encoding") is None]
        lines += ["", f"## {mixture}", "", f"Two exact samples have an sw2 of {here[0]['floor_sw2']:.4f}."]
        lines += _table(plain, ("method", "steps", "nfe"), COLUMNS)
        for title, kind, keys, columns in (
            ("Guidance", [r for r in here if r["w"] is not None], ("method", "w", "steps"), _GUIDED),
            ("Inversion", [r for r in here if r.get("encoding") is not None], ("method", "steps", "nfe"), _INVERSION),
        ):
            if kind:
                lines += ["", f"### {title}", *_table(kind, keys, columns)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], keys: Sequence[str], columns: dict[str, str]) -> list[str]:
    head = (*keys, *columns)
    lines = ["", "| " + " | ".join(name.replace("_", " ") for name in head) + " |", "|" + "---|" * len(head)]
    for who in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        same = [row for row in rows if tuple(row[k] for k in keys) == who]
        cells = [_value(name, form, same) for name, form in columns.items()]
        lines.append("| " + " | ".join([*(f"{k:g}" if isinstance(k, float) else str(k) for k in who), *cells]) + " |")
    return lines


def _value(name: str, form: str, rows: Sequence[Row]) -> str:
    values: list[Any] = [row.get(name) for row in rows]
    if any(value is None for value in values):
        return "–"
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ± {float(np.std(values)):{form}}"
