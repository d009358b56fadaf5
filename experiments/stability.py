"""How many of ten seeds reach their number: distribution matching and adversarial distillation with their defaults.

    python experiments/stability.py --mixture grid25 --out experiments/results/stability.md

One network is fitted to the exact teacher and every seed starts its student there: it has its own batches, noise and
discriminator. The numbers to reach are at one step. Rows are kept in --json, and a second call goes on where it ended.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from ddistill.bench.exact import fitted_network, problem, recipe, student_rows
from ddistill.methods import METHODS

LIMITS = {
    "dmd": {"recall": 0.95, "sw2": 0.08, "precision": 0.75},
    "dmd_regression": {"recall": 1.0, "sw2": 0.045, "precision": 0.75},
    "add": {"recall": 0.9, "sw2": 0.10, "precision": 0.6},
}
"""At least so much recall and precision, at most so much sw2: for two dimensions."""


def reached(row, limits):
    """Whether a row meets all of its limits."""
    return all(row[name] <= limit if name == "sw2" else row[name] >= limit for name, limit in limits.items())


def rows_of(case, names, seeds, have):
    """Rows of all seeds and methods at one step, those that are there first."""
    plan = recipe(case.mixture.d)
    start = fitted_network(case, 0, plan)
    rows = list(have)
    for seed in range(seeds):
        for name in names:
            if any(row["method"] == name and row["seed"] == seed for row in rows):
                continue
            entry = METHODS[name]
            trained = dataclasses.replace(plan, steps=round(entry.effort * plan.steps))
            rows += student_rows(case, name, entry.make()(case.process), start, seed, trained, (1,))
            yield rows


def page(rows, mixture, names):
    """The count and the spread of each method as Markdown."""
    lines = [
        f"# Stability on {mixture}", "",
        f"Made by `python experiments/stability.py --mixture {mixture}`; smallest to largest over seeds, one step.", "",
        "| method | reach their number | to reach | sw2 | precision | recall |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        mine = [row for row in rows if row["method"] == name]
        good = sum(reached(row, LIMITS[name]) for row in mine)
        limits = ", ".join(f"{key} {limit}" for key, limit in LIMITS[name].items())
        spans = [
            f"{np.min(values):.3f} … {np.max(values):.3f}"
            for values in ([row[key] for row in mine] for key in ("sw2", "precision", "recall"))
        ]
        lines.append(f"| {name} | {good} of {len(mine)} | {limits} | " + " | ".join(spans) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", default="grid25")
    parser.add_argument("--methods", default="dmd,add")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("stability.json"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = args.methods.split(",")
    have = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows = have
    for rows in rows_of(problem(args.mixture), names, args.seeds, have):
        args.json.write_text(json.dumps({"rows": rows}))
        last = rows[-1]
        print(*(f"{key} {last[key]}" for key in ("method", "seed", "sw2", "precision", "recall")), flush=True)
    text = page(rows, args.mixture, names)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
