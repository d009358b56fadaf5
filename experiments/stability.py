"""How many seeds reach their number: distribution matching and adversarial distillation with their defaults.

    ddistill bench exact --methods dmd,add --mixture grid25 --seeds 10 --jobs 2 --json rows.json
    python experiments/stability.py rows.json --out experiments/results/stability.md

The first command trains the seeds whose rows are not in its file yet; experiments/results/stability.json has some.
Every seed has its own network fitted to the teacher, batches, noise and discriminator. The numbers are at one step, on
grid25; on other mixtures of two dimensions sw2 is taken as the same multiple of what two exact samples have.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

LIMITS = {
    "dmd": {"recall": 0.95, "sw2": 0.08, "precision": 0.75},
    "dmd_regression": {"recall": 1.0, "sw2": 0.045, "precision": 0.75},
    "add": {"recall": 0.9, "sw2": 0.10, "precision": 0.6},
}
"""At least so much recall and precision, at most so much sw2."""

FLOOR = 0.025
"""sw2 of two exact samples of grid25."""


def reached(row: Mapping, limits: Mapping[str, float]) -> bool:
    """Whether a row meets all of its limits."""
    wider = 1.0 if row["mixture"] == "grid25" else row["floor_sw2"] / FLOOR
    return all(row[k] <= most * wider if k == "sw2" else row[k] >= most for k, most in limits.items())


def page(rows: Sequence[Mapping]) -> str:
    """The count and the spread of each mixture and method as Markdown."""
    rows = [row for row in rows if row["method"] in LIMITS and row["steps"] == 1]
    who = dict.fromkeys((row["mixture"], row["method"]) for row in rows)
    names = ",".join(dict.fromkeys(method for _, method in who))
    lines = [
        "# Stability", "",
        f"Made by `python experiments/stability.py` from the rows of `ddistill bench exact --methods {names}`: one "
        "step, smallest to largest over seeds.", "",
        "| mixture | method | reach their number | to reach | sw2 | precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for mixture, name in who:
        mine = [row for row in rows if (row["mixture"], row["method"]) == (mixture, name)]
        good = sum(reached(row, LIMITS[name]) for row in mine)
        limits = ", ".join(f"{key} {limit}" for key, limit in LIMITS[name].items())
        spans = [
            f"{np.min(values):.3f} … {np.max(values):.3f}"
            for values in ([row[key] for row in mine] for key in ("sw2", "precision", "recall"))
        ]
        lines.append(f"| {mixture} | {name} | {good} of {len(mine)} | {limits} | " + " | ".join(spans) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="what ddistill bench exact --json wrote")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = page(json.loads(args.rows.read_text())["rows"])
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
