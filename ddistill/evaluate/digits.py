"""How good samples of digits are, against scans that were held out: the table of the quickstart.

Every sampler starts from the same noise with the same labels, all ten digits equally often. Fréchet distance (of
pixels, over the scans' variance), precision, recall, density, coverage and diversity compare with the training scans,
as the floor does: the held-out scans in place of samples. Accuracy asks a support vector machine, fitted to the
training scans, for the label.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill import grids
from ddistill.data.digits import Digits
from ddistill.evaluate.diversity import condition_diversity
from ddistill.evaluate.likelihood import bits_per_dimension
from ddistill.evaluate.metrics import classifier_accuracy, fit_digit_classifier, frechet
from ddistill.evaluate.neighbours import manifold
from ddistill.integrators import Solution, euler, heun
from ddistill.methods.base import Made, home, sampling_of
from ddistill.net import Net, Scaled
from ddistill.process import Process
from ddistill.sample import matched_noise, sample

Row = dict[str, Any]


@dataclass(frozen=True)
class Sampler:
    """A way to sample: draw(noise [B, ...], labels [B] or None, key) -> Solution."""

    name: str
    draw: Callable[[Array, Array | None, Array], Solution]


def teacher_sampler(teacher: Net, process: Process, integrator: Callable, steps: int, name: str) -> Sampler:
    """A teacher under an integrator, on Karras' grid of so many steps."""
    grid = grids.karras(process, steps)
    solve = jax.jit(lambda net, x, cond: integrator(net.bind(cond), process, grid, x))
    return Sampler(name, lambda noise, cond, key: solve(teacher, noise, cond))


def student_sampler(
    student: Net, made: Made, process: Process, steps: int, gamma: float | None = None, guidance: float | None = None
) -> Sampler:
    """The student of a method with so many steps, from noise of the teacher's process.

    gamma, guidance: other than the method's. Raises ValueError for steps that the student does not serve, and for a
    guidance scale where it embeds none.
    """
    sampling, own = sampling_of(made), home(made, process)
    if guidance is not None and sampling.guidance is None:
        raise ValueError(
            f"guidance = {guidance}: this student's guidance is built in; only students of `guidance` or "
            "`lcm` take a scale when they sample"
        )
    times = sampling.times(steps)
    gamma = sampling.gamma if gamma is None else gamma
    w = sampling.guidance if guidance is None else guidance

    @jax.jit
    def draw(net, x, cond, key):
        given = cond if w is None else Scaled(cond, jnp.full(x.shape[:1], w))
        return sample(net, own, times, matched_noise(x, process, own), key, gamma=gamma, cond=given)

    return Sampler("student", lambda noise, cond, key: draw(student, noise, cond, key))


def samplers(
    teacher: Net, student: Net, made: Made, process: Process, steps: Sequence[int] = (1, 2, 4)
) -> list[Sampler]:
    """The rows of the table: the teacher with 35 calls (Heun) and as few as the student's, and the student."""
    few = [teacher_sampler(teacher, process, euler, n, "teacher, Euler") for n in sorted(steps, reverse=True)]
    students = [student_sampler(student, made, process, n) for n in sorted(steps)]
    return [teacher_sampler(teacher, process, heun, 18, "teacher, Heun"), *few, *students]


def evaluate(
    digits: Digits,
    process: Process,
    plan: Sequence[Sampler],
    count: int = 2000,
    seed: int = 0,
    *,
    likelihood: Net | None = None,
) -> Iterator[Row]:
    """Rows of metrics, the floor first: sampler, nfe, accuracy, frechet, precision, recall, density, … ms_per_image.

    frechet_held_out is the distance to the held-out scans, which no network saw; the training scans themselves are at
    the floor's distance from them. A sampler far below the floor in `frechet` and not in this has learned its scans.
    diversity is the mean distance between samples of one digit, over that of the training scans. nll: bits per pixel
    under the teacher given as `likelihood`, of the first 256 samples; None without. count: images per sampler, two for
    each digit at least. Times are those of a second call, without compilation.
    """
    classify = fit_digit_classifier(digits.train_x, digits.train_labels)
    varied = condition_diversity(digits.train_x, digits.train_labels)
    own = jax.random.fold_in(jax.random.key(seed), 20262)  # far from the key of the noise that samples start from

    def nll(x, labels) -> float | None:
        if likelihood is None:
            return None
        return bits_per_dimension(likelihood, process, x[:256], labels[:256], key=own)

    def row(name: str, nfe: int | None, x, labels, ms: float | None) -> Row:
        near = manifold(digits.train_x, x)
        return {
            "sampler": name,
            "nfe": nfe,
            "accuracy": classifier_accuracy(classify, x, labels),
            "frechet": frechet(x, digits.train_x) / digits.variance,
            "frechet_held_out": None if nfe is None else frechet(x, digits.held_out_x) / digits.variance,
            **near._asdict(),
            "diversity": condition_diversity(x, labels) / varied,
            "nll": nll(x, labels),
            "ms_per_image": ms,
        }

    yield row("held-out scans (floor)", None, digits.held_out_x, digits.held_out_labels, None)
    noise, labels, key = start(process, digits.train_x.shape[1:], digits.num_classes, count, seed)
    for sampler in plan:
        solution = jax.block_until_ready(sampler.draw(noise, labels, key))
        begin = time.monotonic()
        jax.block_until_ready(sampler.draw(noise, labels, key))
        ms = 1000 * (time.monotonic() - begin) / count
        yield row(sampler.name, int(solution.nfe), np.asarray(solution.x), np.asarray(labels), ms)


def start(
    process: Process, shape: tuple[int, ...], num_classes: int, count: int, seed: int
) -> tuple[Array, Array | None, Array]:
    """Noise [count, ...] at t_max, labels [count] 0, 1, 2, … in turn (None without classes), a key for γ > 0."""
    k_noise, k_sampler = jax.random.split(jax.random.key(seed))
    labels = jnp.arange(count, dtype=jnp.int32) % num_classes if num_classes else None
    return process.prior(k_noise, (count, *shape)), labels, k_sampler


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
