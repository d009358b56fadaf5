"""How good samples of digits are, against scans that were held out: the table of the quickstart.

Every sampler starts from the same noise with the same labels, all ten digits equally often. Fréchet distance (of
pixels, over the scans' variance), precision, recall, density, coverage and diversity compare with the training scans,
as the floor does: the held-out scans in place of samples. Accuracy asks a support vector machine, fitted to the
training scans, for the label.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ddistill.data.digits import Digits
from ddistill.evaluate.diversity import condition_diversity
from ddistill.evaluate.likelihood import bits_per_dimension
from ddistill.evaluate.metrics import classifier_accuracy, fit_digit_classifier, frechet
from ddistill.evaluate.neighbours import manifold
from ddistill.evaluate.samplers import Sampler, start
from ddistill.net import Net
from ddistill.process import Process

Row = dict[str, Any]

COUNT = 2000
"""Samples of each sampler where no other number is asked for."""

FLOOR = "held-out scans (floor)"
"""The name of the row of scans that no network saw."""


def evaluate(
    digits: Digits,
    process: Process,
    plan: Sequence[Sampler],
    count: int = COUNT,
    seed: int = 0,
    *,
    likelihood: Net | None = None,
    have: Collection[tuple[str, int | None]] = (),
) -> Iterator[Row]:
    """Rows of metrics, the floor first: sampler, nfe, samples, seed, accuracy, frechet, precision, … ms_per_image.

    frechet_held_out is the distance to the held-out scans, which no network saw; the training scans themselves are at
    the floor's distance from them. A sampler far below the floor in `frechet` and not in this has learned its scans.
    diversity is the mean distance between samples of one digit, over that of the training scans. nll: bits per pixel
    under the teacher given as `likelihood`, of the first 256 samples; None without. count: images per sampler, two for
    each digit at least. Times (wall_s of all samples) are those of a second call, without compilation. have: the
    sampler and steps of rows that are there already, and are left out.
    """
    classify = fit_digit_classifier(digits.train_x, digits.train_labels)
    varied = condition_diversity(digits.train_x, digits.train_labels)
    own = jax.random.fold_in(jax.random.key(seed), 20262)  # far from the key of the noise that samples start from

    def nll(x, labels) -> float | None:
        if likelihood is None:
            return None
        return bits_per_dimension(likelihood, process, x[:256], labels[:256], key=own)

    def row(name: str, steps: int | None, nfe: int | None, x, labels, ms: float | None) -> Row:
        near = manifold(digits.train_x, x)
        return {
            "sampler": name,
            "steps": steps,
            "nfe": nfe,
            "samples": len(x),
            "seed": seed,
            "accuracy": classifier_accuracy(classify, x, labels),
            "frechet": frechet(x, digits.train_x) / digits.variance,
            "frechet_held_out": None if nfe is None else frechet(x, digits.held_out_x) / digits.variance,
            **near._asdict(),
            "diversity": condition_diversity(x, labels) / varied,
            "nll": nll(x, labels),
            "ms_per_image": ms,
            "images_per_s": None if ms is None else 1000 / ms,
            "wall_s": None if ms is None else ms * len(x) / 1000,
        }

    if (FLOOR, None) not in have:
        yield row(FLOOR, None, None, digits.held_out_x, digits.held_out_labels, None)
    noise, labels, key = start(process, digits.train_x.shape[1:], digits.num_classes, count, seed)
    for sampler in plan:
        if (sampler.name, sampler.steps) in have:
            continue
        solution = jax.block_until_ready(sampler.draw(noise, labels, key))
        begin = time.monotonic()
        jax.block_until_ready(sampler.draw(noise, labels, key))
        ms = 1000 * (time.monotonic() - begin) / count
        yield row(sampler.name, sampler.steps, int(solution.nfe), np.asarray(solution.x), np.asarray(labels), ms)


def sheet(
    digits: Digits, process: Process, plan: Sequence[Sampler], columns: int = 20, seed: int = 0
) -> list[tuple[str, np.ndarray]]:
    """Rows (name, images in [0, 1]) for a sample sheet, held-out scans first; column i shows the digit i mod 10."""
    noise, labels, key = start(process, digits.train_x.shape[1:], digits.num_classes, columns, seed)
    of_class = [digits.held_out_x[digits.held_out_labels == c] for c in range(digits.num_classes)]
    scans = [of_class[i % digits.num_classes][i // digits.num_classes] for i in range(columns)]
    rows = [("held-out scans", digits.to_unit(np.stack(scans)))]
    for sampler in plan:
        solution = sampler.draw(noise, labels, key)
        calls = int(solution.nfe)
        name = f"{sampler.name}\n{calls} network call{'s' * (calls > 1)}"
        rows.append((name, digits.to_unit(np.asarray(solution.x))))
    return rows
