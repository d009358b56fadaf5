"""Pages for tests of the report: synthetic runs on digits-like images and on a ring of eight modes."""

import numpy as np

from ddistill.report.page import Column, Drawn, Group, Line, Motion, Page, Run, Sheet, Table

COLUMNS = (
    Column("frechet", "Fréchet", ".2f", -1),
    Column("precision", "precision", ".3f", 1),
    Column("recall", "recall", ".3f", 1),
)
STEPS = (1, 2, 4)
CENTRES = 0.7 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)


def page(runs=3, samples=9):
    """A page with so many runs: images, points with lost modes, paths, curves, and what failed."""
    rng = np.random.default_rng(0)
    names = [f"run{i:03d}" for i in range(runs)]
    lines = [
        Line("held-out", "reference", None, {"frechet": 0.99, "precision": 0.96, "recall": None}),
        Line("teacher, Heun", "teacher", 35, {"frechet": 0.5, "precision": 0.98, "recall": 0.95}),
    ]
    images = [Drawn("teacher, Heun", "teacher", {35: Sheet(rng.random((samples, 8, 8, 1)))})]
    ring = CENTRES[np.arange(200) % 8] + 0.03 * rng.standard_normal((200, 2))
    points = [Drawn("exact samples", "reference", {0: Sheet(ring)})]
    start = 0.5 * rng.standard_normal((40, 2))
    paths = [Motion("exact map", "teacher", [1.0, 0.5, 0.0], np.stack([start, (start + ring[:40]) / 2, ring[:40]]))]
    made = []
    for i, name in enumerate(names):
        for n in STEPS:
            values = {"frechet": 0.6 + ((7 * i) % 11) / n, "precision": 0.9 + 0.01 * n, "recall": 0.8 + 0.01 * (i % 10)}
            lines.append(Line(name, "student", n, values, {"frechet": 0.05}, count=3))
        images.append(Drawn(name, "student", {n: Sheet(rng.random((samples, 8, 8, 1))) for n in STEPS}))
        if i < 3:
            points.append(Drawn(name, "student", {n: Sheet(ring, [2, 5] if n == 1 else []) for n in STEPS}))
            paths.append(Motion(name, "student", [1.0, 0.0], np.stack([start, ring[:40]])))
        steps = np.arange(0, 1000, 2)
        config = {
            "type": "e.Experiment",
            "name": name,
            "seed": i,
            "steps": 300,
            "rate": (0.5, 1e-05, -0.25, None)[i % 4],
            "method": {"type": f"m.M{i % 2}", "a": 1},
        }
        curves = {"distillation: student/loss": (steps, np.exp(-steps / 300) + 0.01 * (1 + i))}
        made.append(Run(name, {"method": "KD"}, [f"ddistill distill runs/{name}/experiment.py"], config, curves))
    groups = [
        Group("digits", [Table("", COLUMNS, lines, "From the same noise.")], images),
        Group("ring8", [], points, paths, CENTRES, 8),
    ]
    return Page(
        "A report", groups, made, {"runs/broken": "is unfinished"}, f"{runs} runs.", "ddistill report runs", "0"
    )
